"""Seconds and memory of a training step: predicted by plans, and measured."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from monai.networks.nets import DynUNet
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import lamp3d
from benchmarks.harness import images, loss_fn
from lamp3d.graph.allocator import keep_freed_memory
from lamp3d.graph.footprint import LiveBytes
from lamp3d.plan import Plan, format_bytes, make_plan
from lamp3d.plan.hardware import has_fast_bf16, worker_threads
from lamp3d.report.style import ACCENT, FONT, INK, MUTED, WARM

PICTURE = Path(__file__).parent / "predictions.png"


@dataclass(frozen=True)
class Case:
    """One plan to hold against what happens."""

    net: str
    filters: int
    batch: int
    side: int
    devices: int
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        return f"{self.net}-{self.filters} {self.batch}×{self.side}³ on {self.devices}" + f", {settings}" * bool(
            settings
        )


_PIPE = {"data": 1, "space": 1}
CASES = (
    Case("UNet", 8, 1, 64, 1),
    Case("UNet", 16, 1, 64, 1),
    Case("UNet", 8, 1, 96, 1),
    Case("UNet", 16, 1, 96, 1),
    Case("UNet", 8, 1, 128, 1),
    Case("UNet", 16, 2, 64, 1, {"micro_batches": 2}),
    Case("UNet", 16, 1, 64, 1, {"recompute": "always"}),
    Case("SEUNet", 8, 1, 64, 1),
    Case("SEUNet", 16, 1, 64, 1),
    Case("SEUNet", 8, 1, 96, 1),
    Case("DynUNet", 8, 1, 64, 1),
    Case("DynUNet", 16, 1, 64, 1),
    Case("UNet", 16, 4, 64, 2, {**_PIPE, "schedule": "gpipe", "micro_batches": 4}),
    Case("UNet", 16, 4, 64, 2, {**_PIPE, "schedule": "1f1b", "micro_batches": 4}),
    Case("UNet", 16, 4, 64, 2, {**_PIPE, "schedule": "folded", "micro_batches": 4}),
    Case("UNet", 16, 4, 64, 2, {**_PIPE, "schedule": "zero_bubble_v", "micro_batches": 4}),
    Case("UNet", 16, 4, 64, 2, {**_PIPE, "schedule": "interleaved", "micro_batches": 4}),
    Case("UNet", 8, 4, 64, 2, {**_PIPE, "schedule": "gpipe", "micro_batches": 4, "recompute": "always"}),
    Case("SEUNet", 8, 4, 64, 2, {**_PIPE, "schedule": "gpipe", "micro_batches": 4}),
    Case("SEUNet", 8, 4, 64, 2, {**_PIPE, "schedule": "zero_bubble_v", "micro_batches": 4}),
    Case("DynUNet", 8, 4, 64, 2, {**_PIPE, "schedule": "zero_bubble_v", "micro_batches": 4}),
    Case("UNet", 16, 2, 64, 2, {"data": 2}),
    Case("UNet", 8, 4, 64, 2, {"data": 2}),
    Case("SEUNet", 8, 2, 64, 2, {"data": 2}),
    Case("UNet", 16, 1, 64, 2, {"space": 2}),
    Case("UNet", 16, 1, 96, 2, {"space": 2}),
    Case("UNet", 8, 1, 128, 2, {"space": 2}),
    Case("UNet", 8, 1, 160, 2, {"space": 2}),
    Case("SEUNet", 8, 1, 96, 2, {"space": 2}),
    Case("UNet", 8, 1, 96, 2, {"space": 2, "recompute": "always"}),
)
BF16 = (
    Case("UNet", 16, 1, 96, 1, {"precision": "bf16"}),
    Case("UNet", 16, 1, 96, 2, {"space": 2, "precision": "bf16"}),
    Case("UNet", 16, 4, 64, 2, {**_PIPE, "schedule": "zero_bubble_v", "micro_batches": 4, "precision": "bf16"}),
    Case("SEUNet", 16, 1, 96, 1, {"precision": "bf16"}),
)


def network(net: str, filters: int) -> nn.Module:
    """With the same weights everywhere."""
    torch.manual_seed(0)
    if net == "DynUNet":
        widths = [filters * 2**level for level in range(5)]
        dynamic: nn.Module = DynUNet(3, 1, 8, [3] * 5, [1, 2, 2, 2, 2], [2] * 4, filters=widths)
        return dynamic
    return lamp3d.SEUNet(1, 8, filters=filters) if net == "SEUNet" else lamp3d.UNet(1, 8, filters=filters)


def measure(rounds: int, console: Console) -> dict[str, Any]:
    """Every case's step, predicted and measured; draws the scatter plot."""
    found: dict[str, dict[str, Any]] = {}
    cases = CASES + BF16 * has_fast_bf16("cpu")
    for case in track(cases, description="plans", console=console):
        # Profiled in the same minutes as it is measured: the machine's speed changes in the course of a day.
        plan = make_plan(
            network(case.net, case.filters), (case.batch, 1, case.side, case.side, case.side), case.devices,
            fresh=True, loss=lamp3d.mean_over_cases(lambda logits: loss_fn(logits, None)), **case.settings,
        )  # fmt: skip
        by_rank = lamp3d.launch(_step, case.devices, (case, plan, rounds))
        predicted_bytes = max(device.peak_bytes for device in plan.per_device)
        static = [sum(s.parameter_bytes for s in plan.stages if s.rank == rank) for rank in range(plan.pipe)]
        # Parameters, gradients and what an optimizer will hold are no part of what a step makes.
        predicted_bytes = max(
            device.peak_bytes - 4 * of_rank for device, of_rank in zip(plan.per_device, static, strict=True)
        )
        found[str(case)] = {
            "predicted_seconds": plan.step_seconds,
            "seconds": statistics.median(by_rank[0][0]),
            "all_seconds": by_rank[0][0],
            "predicted_bytes": predicted_bytes,
            "bytes": max(peak for _, peak in by_rank),
            "uncertainty": plan.uncertainty,
        }
    table = Table(title="A training step: predicted / measured")
    for column in ("plan", "s predicted", "s measured", "ratio", "memory predicted", "measured", "ratio"):
        table.add_column(column, justify="left" if column == "plan" else "right")
    for name, f in found.items():
        row = []
        for what, text in (("seconds", "{:.2f}".format), ("bytes", format_bytes)):
            predicted, measured = f[f"predicted_{what}"], f[what]
            row += [text(predicted), text(measured), f"{predicted / measured:.2f}"]
        table.add_row(name, *row)
    console.print(table)
    errors = {
        what: sorted(abs(f[f"predicted_{what}"] / f[what] - 1) for f in found.values()) for what in ("seconds", "bytes")
    }
    for what, of in errors.items():
        console.print(f"{what}: median error {statistics.median(of):.1%}, largest {of[-1]:.1%}, of {len(of)} plans")
    _scatter(found).savefig(PICTURE, dpi=150)
    return {"plans": found, "errors": {what: [statistics.median(of), of[-1]] for what, of in errors.items()}}


def _step(case: Case, plan: Plan, rounds: int) -> tuple[list[float], int]:
    torch.set_num_threads(worker_threads(case.devices))
    keep_freed_memory()
    engine = lamp3d.Engine(network(case.net, case.filters), plan)
    batch = images(plan.image_shape)
    seconds = []
    for _ in range(rounds + 1):
        for parameter in engine.parameters.values():
            parameter.grad = None
        if case.devices > 1:
            dist.barrier()
        begin = time.perf_counter()
        engine.step(batch if engine.reads_input else None, None, loss_fn)
        if case.devices > 1:
            dist.barrier()
        seconds.append(time.perf_counter() - begin)
    with LiveBytes() as live:
        engine.step(batch if engine.reads_input else None, None, loss_fn)
    return seconds[1:], live.highest


def _scatter(found: dict[str, dict[str, Any]]) -> Figure:
    with rc_context(FONT):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, what, unit, scale in zip(
            figure.subplots(1, 2), ("seconds", "bytes"), ("s", "GB"), (1, 1e9), strict=True
        ):
            x = [f[what] / scale for f in found.values()]
            y = [f[f"predicted_{what}"] / scale for f in found.values()]
            low, high = min(x + y) * 0.8, max(x + y) * 1.25
            axes.fill_between(
                [low, high], [low * 0.9, high * 0.9], [low * 1.1, high * 1.1], color="#e8eef5", label="± 10 %"
            )
            axes.plot([low, high], [low, high], color=MUTED, linewidth=0.8)
            axes.scatter(
                x, y, s=22, color=ACCENT if what == "seconds" else WARM, edgecolor=INK, linewidth=0.4, zorder=3
            )
            axes.set(
                xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel=f"measured ({unit})",
                ylabel=f"predicted ({unit})", title={"seconds": "A training step", "bytes": "Peak memory"}[what],
            )  # fmt: skip
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter(NullFormatter())
            axes.legend(frameon=False, loc="upper left", fontsize=8)
    return figure
