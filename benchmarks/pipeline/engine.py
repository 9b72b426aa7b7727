"""The engine on two workers: memory by schedule, growth, changing shapes, and what each of its parts is worth.

Every function below that begins with ``measure`` starts its own workers and returns what goes into results.json.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

import lamp3d
from benchmarks.harness import WORKERS, loss_fn, network
from lamp3d.graph import trace
from lamp3d.graph.footprint import LiveBytes
from lamp3d.plan import SCHEDULES, Plan, make_plan

CASES = 8


def plan_of(side: int, schedule: str, micro_batches: int = CASES, **settings: Any) -> Plan:
    """A plan for eight cases."""
    shape = (CASES, 1, side, side, side)
    return make_plan(
        network(), shape, WORKERS, data=1, space=1, schedule=schedule, micro_batches=micro_batches, recompute="never",
        **settings,
    )  # fmt: skip


def step_of(engine: lamp3d.Engine, images: Any) -> float:
    """Seconds of one step, from the moment at which all ranks are ready until all are done."""
    dist.all_reduce(torch.zeros(1))
    begin = time.perf_counter()
    engine.step(images if engine.reads_input else None, None if isinstance(images, Tensor) else [None] * len(images),
                loss_fn)  # fmt: skip
    dist.all_reduce(torch.zeros(1))
    return time.perf_counter() - begin


def measure_memory(side: int) -> dict[str, Any]:
    """What a rank holds between two actions at most, on paper and in a step in which every tensor is followed."""
    plans = {schedule: plan_of(side, schedule) for schedule in SCHEDULES}
    measured = lamp3d.launch(_memory, WORKERS, (plans,))
    return {
        schedule: {
            "predicted_bytes": [device.saved_bytes for device in plan.per_device],
            "measured_bytes": [found[schedule] for found in measured],
        }
        for schedule, plan in plans.items()
    }


def _memory(plans: dict[str, Plan]) -> dict[str, int]:
    peaks = {}
    for schedule, plan in plans.items():
        engine, images = lamp3d.Engine(network(), plan), torch.randn(plan.image_shape)
        for _ in range(2):  # parameters' gradients are made by the first step, and belong to no action
            live = LiveBytes()
            engine.on_action = live.note
            with live:
                step_of(engine, images)
        peaks[schedule] = live.peak
        del engine
        gc.collect()
    return peaks


def measure_growth(side: int, steps: int = 200) -> dict[str, Any]:
    """Resident memory after twenty steps, and after so many more."""
    before_after = lamp3d.launch(_growth, WORKERS, (plan_of(side, "zero_bubble_v"), steps))
    return {"steps": steps, "side": side, "resident_bytes_before_and_after": before_after}


def _growth(plan: Plan, steps: int) -> tuple[int, int]:
    engine, images = lamp3d.Engine(network(), plan), torch.randn(plan.image_shape)
    for _ in range(20):
        step_of(engine, images)
    before = _resident()
    for _ in range(steps):
        step_of(engine, images)
    return before, _resident()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


SHAPES = ((64, 64, 64), (32, 128, 64), (128, 32, 64), (64, 128, 32), (32, 64, 128), (128, 64, 32))
"""Of one size: 64³ voxels."""


def measure_shapes(rounds: int) -> dict[str, Any]:
    """Steps of four volumes of one shape for all, and of a shape that is another one each time, turn by turn.

    Each shape is compared with itself: its step among others against its step among its like.
    """
    plan = plan_of(64, "zero_bubble_v")
    return lamp3d.launch(_shapes, WORKERS, (plan, rounds))[0]


def _shapes(plan: Plan, rounds: int) -> dict[str, Any]:
    engine = lamp3d.Engine(network(), plan)
    volumes = {shape: [torch.randn(1, 1, *shape) for _ in range(4)] for shape in SHAPES}
    for images in volumes.values():
        step_of(engine, images)
    fixed: dict[tuple[int, ...], list[float]] = {shape: [] for shape in SHAPES}
    changing: dict[tuple[int, ...], list[float]] = {shape: [] for shape in SHAPES}
    for _ in range(rounds):
        for shape, images in volumes.items():
            changing[shape].append(step_of(engine, images))
    for shape, images in volumes.items():
        step_of(engine, images)
        fixed[shape] += [step_of(engine, images) for _ in range(rounds)]
    medians = {
        "x".join(map(str, shape)): [statistics.median(fixed[shape]), statistics.median(changing[shape])]
        for shape in SHAPES
    }
    return {
        "fixed_and_changing_seconds": medians,
        "ratio": sum(pair[1] for pair in medians.values()) / sum(pair[0] for pair in medians.values()),
    }


@dataclass(frozen=True)
class Row:
    """One line of the ablation."""

    name: str
    schedule: str
    micro_batches: int
    torchs_arithmetic: bool = False
    blocking: bool = False
    precision: str = "fp32"


ABLATION = (
    Row("naive model parallelism", "gpipe", 1, torchs_arithmetic=True, blocking=True),
    Row("+ micro-batches", "gpipe", CASES, torchs_arithmetic=True, blocking=True),
    Row("+ overlapped transfers", "gpipe", CASES, torchs_arithmetic=True),
    Row("+ lamp3d's arithmetic", "gpipe", CASES),
    Row("1F1B", "1f1b", CASES),
    Row("folded", "folded", CASES),
    Row("zero bubble V", "zero_bubble_v", CASES),
    Row("+ bf16", "zero_bubble_v", CASES, precision="bf16"),
)


def measure_ablation(side: int, rounds: int) -> list[dict[str, Any]]:
    """What each part of the engine is worth: throughput, utilisation by the measured time line, peak memory."""
    found = []
    for row in ABLATION:
        with _arithmetic(row.torchs_arithmetic):  # the planner is to time what will run
            plan = plan_of(side, row.schedule, row.micro_batches, precision=row.precision)
        seconds, busy, peaks = lamp3d.launch(_ablation, WORKERS, (row, plan, rounds))[0]
        found.append(asdict(row) | {
            "seconds": seconds, "cases_per_second": CASES / seconds, "utilisation": busy, "peak_bytes": peaks,
            "bytes_sent": sum(stage.sent_bytes for stage in plan.stages),
        })  # fmt: skip
    return found


def _ablation(row: Row, plan: Plan, rounds: int) -> tuple[float, float, list[int]]:
    with _arithmetic(row.torchs_arithmetic), _transfers(row.blocking):
        engine, images = lamp3d.Engine(network(), plan), torch.randn(plan.image_shape)
        step_of(engine, images)
        took, busy = [], []
        for _ in range(rounds):
            took.append(step_of(engine, images))
            busy.append(1 - engine.time_line().bubble)
    peaks: list[Any] = [None] * WORKERS
    dist.all_gather_object(peaks, engine.peak_bytes())
    return statistics.median(took), statistics.median(busy), peaks


@contextlib.contextmanager
def _arithmetic(torchs: bool) -> Iterator[None]:
    """Cells computed as torch would, where asked for."""
    with contextlib.ExitStack() as stack:
        if torchs:
            for module in ("lamp3d.parallel.stage", "lamp3d.plan.timing", "lamp3d.graph.shapes"):
                stack.enter_context(patch(f"{module}.arithmetic", lambda *_: contextlib.nullcontext()))
        yield


@contextlib.contextmanager
def _transfers(blocking: bool) -> Iterator[None]:
    """Receives that are posted when they are needed, and sends that are waited for, where asked for."""
    if not blocking:
        yield
        return
    send = lamp3d.parallel.transfer.Transfer.send

    def send_and_wait(self: Any, *message: Any) -> None:
        send(self, *message)
        self.flush()

    with patch("lamp3d.parallel.transfer.Transfer.send", send_and_wait), patch("lamp3d.parallel.step.AHEAD", 0):
        yield


def direct_skips(side: int, devices: Sequence[int] = (2, 3, 4, 8)) -> dict[str, list[int]]:
    """Bytes sent in a step by a straight cut into equal numbers of seconds: values sent straight, and passed along."""
    found = {}
    shape = (1, 1, side, side, side)
    graph = trace(network(), shape)
    for count in devices:
        plan = make_plan(
            network(), (CASES, *shape[1:]), count, data=1, space=1, micro_batches=CASES, schedule="gpipe",
            recompute="never", repeats=1,
        )  # fmt: skip
        straight = sum(stage.sent_bytes for stage in plan.stages)
        specs = lamp3d.graph.infer_specs(graph, [(shape, torch.float32)], "fp32", False, torch.device("cpu"))
        relayed = 0
        for edge in graph.stage_edges(plan.starts):
            both_ways = 1 if edge.value in graph.inputs else 2
            relayed += specs[edge.value].nbytes * (max(edge.users) - edge.maker) * both_ways * CASES
        found[str(count)] = [straight, relayed]
    return found


SLOW_LINK = "125MB"
"""A gigabit network: what is sent counts for more than what is computed."""


def measure_bytes(side: int, devices: Sequence[int] = (2, 3, 4)) -> dict[str, Any]:
    """Bytes that a step sends, as the engine counts them: straight and folded cuts, for a fast and for a slow link."""
    found = {}
    for count in devices:
        shape = (CASES, 1, side, side, side)
        plans = {
            f"{schedule}, {'slow' if link else 'own'} link": make_plan(
                network(),
                shape,
                count,
                data=1,
                space=1,
                micro_batches=CASES,
                schedule=schedule,
                recompute="never",
                link=link,
                channels_last=False,
            )
            for schedule in ("gpipe", "folded")
            for link in (None, SLOW_LINK)
        }
        sent = lamp3d.launch(_sent, count, (plans,))
        found[str(count)] = {
            name: {
                "sent_bytes": sum(rank[name] for rank in sent),
                "predicted_bytes": sum(stage.sent_bytes for stage in plan.stages),
                "predicted_seconds": plan.step_seconds,
                "cut": [[stage.rank, stage.cells[0]] for stage in plan.stages],
            }
            for name, plan in plans.items()
        }
    return found


def _sent(plans: dict[str, Plan]) -> dict[str, int]:
    sent = {}
    for name, plan in plans.items():
        engine = lamp3d.Engine(network(), plan)
        step_of(engine, torch.randn(plan.image_shape))
        sent[name] = engine.bytes_sent
        del engine
        gc.collect()
    return sent
