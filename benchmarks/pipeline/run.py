"""Pipeline speed: lamp3d's schedules beside one process, torchgpipe 0.0.7 and torch.distributed.pipelining.

    lamp3d bench pipeline [--micro-batches 1 2 4 8 16] [--rounds 5] [--only PART …]

U-Net-16, M cases of 64³ in M micro-batches, fp32, two workers of one thread each. One process takes a case at a time
and adds up gradients, which is faster on a CPU than all cases at once. Figures are medians. Writes results.json and
time-line pictures beside this file, and prints the tables. The parts beside these schedules are in single.py, engine.py
and concat.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import lamp3d
from benchmarks.harness import (
    FILTERS,
    PEER,
    WORKERS,
    Job,
    Measured,
    OneProcess,
    alone,
    contest,
    keep,
    network,
    one_engine,
    plain,
    torchgpipe,
)
from benchmarks.pipeline import concat, engine, single
from lamp3d.plan import SCHEDULES, format_bytes
from lamp3d.report import time_line_picture

SIDE = 64
HERE = Path(__file__).parent


def run(micro_batches: int, rounds: int, console: Console) -> dict[str, Any]:
    """All competitors on one mini-batch; prints the table and draws the time lines."""
    shape = (micro_batches, 1, SIDE, SIDE, SIDE)

    def plan(devices: int, schedule: str, **settings: Any) -> lamp3d.Plan:
        return lamp3d.make_plan(
            network(), shape, devices, data=1, space=1, micro_batches=micro_batches, recompute="never",
            schedule=schedule, **settings,
        )  # fmt: skip

    plans = {name: plan(WORKERS, name) for name in SCHEDULES}
    cut = plans["gpipe"]
    console.print(cut.table())
    one_device = plan(1, "1f1b", channels_last=plans["1f1b"].channels_last)
    competitors: dict[str, OneProcess | Job] = {
        "one process, 1 thread": (plain, (Job(shape), 1, cut.channels_last, micro_batches)),
        "one process, 2 threads": (plain, (Job(shape), 2, cut.channels_last, micro_batches)),
        "lamp3d, one device, 1 thread": (one_engine, (Job(shape, one_device),)),
        "torchgpipe 0.0.7": (torchgpipe, (Job(shape, cut),)),
    }
    if micro_batches >= WORKERS:  # it refuses fewer micro-batches than stages
        competitors |= {f"{PEER}, {how}": Job(shape, cut, how) for how in ("GPipe", "1F1B")}
    competitors |= {f"lamp3d, {name}": Job(shape, plan) for name, plan in plans.items()}
    found = contest(f"M = {micro_batches}", competitors, rounds, console)
    draw(micro_batches, plans, found)
    return summarise(micro_batches, plans, found, console)


def draw(micro_batches: int, plans: dict[str, lamp3d.Plan], found: dict[str, Measured]) -> None:
    """Each schedule's predicted and measured time line, one above the other."""
    for name, plan in plans.items():
        if (line := found[f"lamp3d, {name}"].line) is not None:
            figure = time_line_picture({f"{name}, predicted": plan.time_line(), f"{name}, measured": line})
            figure.savefig(HERE / f"timeline-{name}-{micro_batches}.png", dpi=110)


def summarise(
    micro_batches: int, plans: dict[str, lamp3d.Plan], found: dict[str, Measured], console: Console
) -> dict[str, Any]:
    """The table of one mini-batch, and what results.json keeps of it."""
    one, two = (found[f"one process, {threads}"].median for threads in ("1 thread", "2 threads"))
    table = Table(title=f"U-Net-{FILTERS}, {micro_batches} × {SIDE}³, fp32: a training step")
    for column in ("", "s a step", "range", "× 1 thread", "× 2 threads", "predicted s", "sent", "peak of a process"):
        table.add_column(column, justify="left" if not column else "right")
    for name, measured in sorted(found.items(), key=lambda item: -item[1].median):
        spread = f"{min(measured.seconds):.2f}-{max(measured.seconds):.2f}"
        plan = plans.get(name.removeprefix("lamp3d, "))
        ratios = f"{one / measured.median:.2f}", f"{two / measured.median:.2f}"
        extra = ("", "") if plan is None else (f"{plan.step_seconds:.2f}", format_bytes(measured.bytes_sent))
        table.add_row(name, f"{measured.median:.2f}", spread, *ratios, *extra, format_bytes(max(measured.peak_bytes)))
    console.print(table)
    return {
        "cut": {name: [[stage.rank, stage.cells[0]] for stage in plan.stages] for name, plan in plans.items()},
        "channels_last": {name: plan.channels_last for name, plan in plans.items()},
        "predicted_seconds": {name: plan.step_seconds for name, plan in plans.items()},
        "bytes_sent": {name: found[f"lamp3d, {name}"].bytes_sent for name in plans},
        "peak_bytes": {name: measured.peak_bytes for name, measured in found.items()},
        "seconds": {name: measured.seconds for name, measured in found.items()},
        "median_seconds": {name: measured.median for name, measured in found.items()},
        "over_one_thread": {name: one / measured.median for name, measured in found.items()},
        "over_two_threads": {name: two / measured.median for name, measured in found.items()},
    }


def main() -> None:
    """Run the parts that are asked for, print what they find, keep it in results.json beside that of the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8])
    parser.add_argument("--only", nargs="+", default=["schedules"], choices=["schedules", *PARTS], metavar="PART")
    arguments = parser.parse_args()
    console = Console(width=150)
    command = f"lamp3d bench pipeline --rounds {arguments.rounds}"
    for part in arguments.only:
        if part == "schedules":
            for m in arguments.micro_batches:
                found = run(m, arguments.rounds, console)
                keep(HERE / "results.json", f"schedules, M = {m}", f"{command} --micro-batches {m}", found)
        else:
            found = PARTS[part](arguments.rounds)
            console.print(part, found)
            keep(HERE / "results.json", part, f"{command} --only {part}", found)


PARTS: dict[str, Callable[[int], Any]] = {
    "single": lambda rounds: {str(side): alone(single.measure, side, rounds) for side in (64, 96)},
    "memory": lambda rounds: engine.measure_memory(SIDE),
    "growth": lambda rounds: engine.measure_growth(SIDE // 2),
    "shapes": engine.measure_shapes,
    "ablation": lambda rounds: engine.measure_ablation(SIDE, rounds),
    "skips": lambda rounds: engine.direct_skips(SIDE),
    "bytes": lambda rounds: engine.measure_bytes(SIDE),
    "concat": lambda rounds: alone(concat.measure, SIDE, rounds),
}
"""Beside the schedules: what each returns goes into results.json as it is."""


if __name__ == "__main__":
    from benchmarks.pipeline import run as module  # under its own name, by which workers import it

    module.main()
