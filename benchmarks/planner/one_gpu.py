"""The paper's set-ups on the GPU at hand: a step by the plan made from the GPU's description, and by plain PyTorch."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import lamp3d
from benchmarks.harness import loss_fn
from benchmarks.planner.predictions import network
from lamp3d.errors import ConfigError, PlanError
from lamp3d.graph.inputs import input_text
from lamp3d.plan import Plan, format_bytes, make_plan
from lamp3d.plan.hardware import device_name

SET_UPS = tuple(
    (kind, filters, sides)
    for sides in ((64, 64, 64), (128, 128, 128), (192, 192, 192), (352, 256, 288))
    for kind in ("UNet", "SEUNet")
    for filters in (32, 64, 128)
)

PRECISIONS = ("fp32", "bf16")
"""fp32: convolutions compute in TF32, as is PyTorch's default."""

COLUMNS = (
    "predicted_seconds", "measured_seconds", "predicted_bytes", "measured_bytes", "plain_seconds", "plain_bytes",
)  # fmt: skip


def measure(rounds: int, console: Console) -> dict[str, Any]:
    """Seconds and allocated bytes of every set-up's step at batch 1, predicted and measured."""
    name = device_name("cuda")
    hardware = "h100-80g" if "H100" in name else "a100-80g" if "A100" in name else None
    if hardware is None:
        raise ConfigError(f"there is no description of {name} in src/lamp3d/plan/devices: add one, and name it here.")
    found: dict[str, Any] = {"device": name}
    table = Table(title=f"{name}: a step at batch 1; predicted / measured, beside plain PyTorch")
    for column in ("", "volume", "recomputed", *(key.replace("_", " ") for key in COLUMNS)):
        table.add_column(column, justify="left" if not column else "right")
    for (kind, filters, sides), precision in track(
        list(itertools.product(SET_UPS, PRECISIONS)), description="set-ups", console=console
    ):
        row = set_up(kind, filters, sides, precision, hardware, rounds)
        found[f"{kind}-{filters}, {input_text(sides)}, {precision}"] = row
        texts = [_text(row.get(key), key) for key in COLUMNS]
        table.add_row(f"{kind}-{filters}, {precision}", input_text(sides), row.get("recompute", "does not fit"), *texts)
    console.print(table)
    return found


def _text(value: float | None, key: str) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if key.endswith("seconds") else format_bytes(int(value))


def set_up(
    kind: str, filters: int, sides: tuple[int, ...], precision: str, hardware: str, rounds: int
) -> dict[str, Any]:
    """One set-up's step by lamp3d and by plain PyTorch, in the same precision."""
    shape = (1, 1, *sides)
    images = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    row: dict[str, Any] = {}
    try:
        with torch.device("meta"):
            plan = make_plan(network(kind, filters), shape, 1, hardware=hardware, precision=precision)
    except PlanError:
        pass
    else:
        parameters = sum(stage.parameter_bytes for stage in plan.stages)
        row["recompute"] = plan.recompute if isinstance(plan.recompute, str) else f"{len(plan.recompute)} blocks"
        row["predicted_seconds"] = plan.step_seconds
        row["predicted_bytes"] = plan.per_device[0].peak_bytes - 2 * parameters  # the optimizer is not here
        row["measured_seconds"], row["measured_bytes"] = _measured(lambda: _ours(kind, filters, plan, images), rounds)
    row["plain_seconds"], row["plain_bytes"] = _measured(lambda: _plain(kind, filters, images, precision), rounds)
    return row


def _ours(kind: str, filters: int, plan: Plan, images: Tensor) -> Callable[[], object]:
    engine = lamp3d.Engine(network(kind, filters), plan)

    def step() -> None:
        for parameter in engine.parameters.values():
            parameter.grad = None
        engine.step(images, None, loss_fn)

    return step


def _plain(kind: str, filters: int, images: Tensor, precision: str) -> Callable[[], object]:
    model = network(kind, filters).cuda().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    batch = images.contiguous(memory_format=torch.channels_last_3d)

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_fn(model(batch), None)
        torch.autograd.backward(loss)

    return step


def _measured(make: Callable[[], Callable[[], object]], rounds: int) -> tuple[float | None, int | None]:
    """Median seconds and peak bytes of a step; None where memory runs out."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        step = make()
        step()
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(rounds):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds), torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        return None, None
