"""Whole volumes at batch 1: slabs on two workers beside one process, torchgpipe 0.0.7 and lamp3d's pipeline.

    lamp3d bench spatial [--rounds 5] [--only speed memory …]

U-Net-16, a training step at batch 1, two workers of one thread each on two cores. Figures are medians. Writes
results.json beside this file. What is in bf16 needs a CPU that computes in it (AVX512-BF16 or AMX).
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

import lamp3d
from benchmarks.harness import (
    WORKERS,
    Job,
    OneProcess,
    Part,
    contest,
    network,
    one_engine,
    plain,
    run_parts,
    torchgpipe,
)
from benchmarks.spatial import inference, largest, memory, traffic
from lamp3d.plan import format_bytes
from lamp3d.plan.hardware import has_fast_bf16

SIDES = (96, 128)


def measure_speed(rounds: int, console: Console) -> dict[str, Any]:
    """Seconds of a step by side and precision."""
    return {
        f"{side}³, {precision}": contest_at(side, precision, rounds, console)
        for side in SIDES
        for precision in ("fp32", "bf16")
        if precision == "fp32" or has_fast_bf16("cpu")
    }


def contest_at(side: int, precision: Any, rounds: int, console: Console) -> dict[str, Any]:
    """All competitors at one size; prints their table."""
    shape = (1, 1, side, side, side)

    def plan(devices: int, **settings: Any) -> lamp3d.Plan:
        return lamp3d.make_plan(
            network(), shape, devices, precision=precision, recompute="never", repeats=2, **settings
        )

    one = plan(1)
    bf16, last = precision == "bf16", one.channels_last
    competitors: dict[str, OneProcess | Job] = {
        "one process, 1 thread": (plain, (Job(shape), 1, last and bf16, 1, bf16)),
        "one process, 2 threads": (plain, (Job(shape), 2, last and bf16, 1, bf16)),
        "lamp3d, one device, 1 thread": (one_engine, (Job(shape, one), 1)),
        "lamp3d, one device, 2 threads": (one_engine, (Job(shape, one), 2)),
        "lamp3d, pipeline": Job(shape, plan(WORKERS, space=1, channels_last=last)),
        "lamp3d, slabs": Job(shape, plan(WORKERS, space=WORKERS, channels_last=last)),
    }
    if not bf16:  # it knows no autocast on a CPU
        competitors["torchgpipe 0.0.7"] = (torchgpipe, (Job(shape, plan(WORKERS, space=1, channels_last=False)),))
    found = contest(f"{side}³, {precision}", competitors, rounds, console)
    threads = {name: found[f"one process, {name}"].median for name in ("1 thread", "2 threads")}
    ours = {name: found[f"lamp3d, one device, {name}"].median for name in ("1 thread", "2 threads")}
    table = Table(title=f"U-Net-16, batch 1, {side}³, {precision}: a training step")
    peers = ("plain, 1 thread", "plain, 2 threads", "lamp3d, 1 thread", "lamp3d, 2 threads")
    for column in ("", "s a step", *(f"× {peer}" for peer in peers), "sent", "peak of a process"):
        table.add_column(column, justify="left" if not column else "right")
    for name, measured in sorted(found.items(), key=lambda item: -item[1].median):
        ratios = [f"{s / measured.median:.2f}" for s in (*threads.values(), *ours.values())]
        sent = format_bytes(measured.bytes_sent) if measured.bytes_sent else ""
        table.add_row(name, f"{measured.median:.3f}", *ratios, sent, format_bytes(max(measured.peak_bytes)))
    console.print(table)
    return {
        name: {"seconds": m.seconds, "median": m.median, "peak_bytes": m.peak_bytes, "bytes_sent": m.bytes_sent}
        for name, m in found.items()
    }


def main() -> None:
    """Run the parts that are asked for."""
    run_parts("spatial", __doc__, PARTS, rounds=5)


PARTS: dict[str, Part] = {
    "speed": measure_speed,
    "memory": memory.measure,
    "largest": largest.measure,
    "inference": inference.measure,
    "traffic": traffic.measure,
}


if __name__ == "__main__":
    from benchmarks.spatial import run as module  # under its own name, by which workers import it

    module.main()
