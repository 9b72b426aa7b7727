"""Pipeline speed: lamp3d's schedules beside one process, torchgpipe 0.0.7 and torch.distributed.pipelining.

    lamp3d bench pipeline [--micro-batches 1 2 4 8 16] [--rounds 5] [--only PART …]

U-Net-16, M cases of 64³ in M micro-batches, fp32, two workers of one thread each. One process takes a case at a time
and adds up gradients, which is faster on a CPU than all cases at once. The competitors run one after the other, each
one step to warm up and then several; figures are medians. Writes results.json and time-line pictures beside this file,
and prints the tables. The parts beside these schedules are in single.py and engine.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import lamp3d
from benchmarks.pipeline import concat, engine, single
from benchmarks.pipeline.peers import PipeliningPeer, torchgpipe_unet
from lamp3d.parallel.allocator import keep_freed_memory
from lamp3d.plan import SCHEDULES, TimeLine
from lamp3d.report import time_line_picture

FILTERS, SIDE, CLASSES, WORKERS = 16, 64, 8, 2
HERE = Path(__file__).parent
Step = Callable[[], object]


@dataclass(frozen=True)
class Job:
    """What a competitor is to run: the mini-batch, and, for those that are cut, the plan."""

    batch: int
    plan: lamp3d.Plan | None = None
    how: str = ""


def network() -> nn.Module:
    """The benchmark's network, the same weights everywhere."""
    torch.manual_seed(0)
    return lamp3d.UNet(1, CLASSES, filters=FILTERS)


def images(batch: int) -> Tensor:
    """The benchmark's mini-batch."""
    return torch.randn(batch, 1, SIDE, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@lamp3d.mean_over_cases
def loss_fn(logits: Tensor, targets: object) -> Tensor:
    """As cheap as a loss can be, so that the network is what is timed."""
    return logits.square().mean()


def plain(job: Job, threads: int, channels_last: bool, pieces: int) -> Step:
    """One process: the mini-batch in ``pieces`` passes (1: as a whole; M: gradient accumulation)."""
    torch.set_num_threads(threads)
    model, batch = network(), images(job.batch)
    if channels_last:
        model = model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        batch = batch.contiguous(memory_format=torch.channels_last_3d)

    def step() -> None:
        model.zero_grad()
        for piece in batch.chunk(pieces):
            torch.autograd.backward(loss_fn(model(piece), None) / pieces)

    return step


def one_engine(job: Job) -> Step:
    """lamp3d's engine on one device: what its arithmetic is worth without any pipeline."""
    torch.set_num_threads(1)
    keep_freed_memory()
    assert job.plan is not None
    ours, batch = lamp3d.Engine(network(), job.plan), images(job.batch)

    def step() -> None:
        for parameter in ours.parameters.values():
            parameter.grad = None
        ours.step(batch, None, loss_fn)

    return step


def torchgpipe(job: Job) -> Step:
    """torchgpipe with the plan's cut, a thread for each partition's forward."""
    torch.set_num_threads(1)
    assert job.plan is not None
    cuts = [stage.cells[0] for stage in job.plan.stages[1:]]
    model, batch = torchgpipe_unet(network(), cuts, job.plan.micro_batches), images(job.batch)

    def step() -> None:
        model.zero_grad()
        torch.autograd.backward(loss_fn(model(batch), None))

    return step


def serve(make: Callable[..., Step], args: tuple[Any, ...], pipe: Connection) -> None:
    """A competitor in a process of its own: each message from the parent is one step, timed here."""
    step = make(*args)
    while pipe.recv():
        begin = time.perf_counter()
        step()
        pipe.send((time.perf_counter() - begin, None))


def serve_workers(job: Job, address: str) -> None:
    """A competitor of several workers: rank 0 talks to the parent, all take part in every step."""
    assert job.plan is not None
    model, batch = network(), images(job.batch)
    ours = peer = None
    if job.how in SCHEDULES:
        ours = lamp3d.Engine(model, job.plan)
    else:
        peer = PipeliningPeer(model, job.plan, job.how, loss_fn)
    pipe = Client(address) if dist.get_rank() == 0 else None
    go = torch.zeros(1)
    while True:
        if pipe is not None:
            go.fill_(float(pipe.recv()))
        dist.broadcast(go, 0)
        if not go.item():
            return
        model.zero_grad()
        begin = time.perf_counter()
        if ours is not None:
            ours.step(batch if ours.reads_input else None, None, loss_fn)
        elif peer is not None:
            peer.step(batch)
        dist.all_reduce(torch.zeros(1))  # a step is over when every rank is done
        seconds = time.perf_counter() - begin
        line = None if ours is None else ours.time_line()
        if pipe is not None:
            pipe.send((seconds, line))


def launch_workers(job: Job, address: str) -> None:
    """Start the workers (in a process of its own, since the launcher blocks)."""
    lamp3d.launch(serve_workers, WORKERS, (job, address))


def run(micro_batches: int, rounds: int, console: Console) -> dict[str, Any]:
    """All competitors on one mini-batch; prints the table and draws the time lines."""
    plans = {
        name: lamp3d.make_plan(
            network(), (micro_batches, 1, SIDE, SIDE, SIDE), WORKERS, micro_batches=micro_batches, recompute="never",
            schedule=name,
        )
        for name in SCHEDULES
    }  # fmt: skip
    cut = plans["gpipe"]
    console.print(cut.table())
    job = Job(micro_batches)
    one_process: dict[str, tuple[Callable[..., Step], tuple[Any, ...]]] = {
        f"one process, {threads} thread{'s' * (threads > 1)}": (
            plain,
            (job, threads, cut.channels_last, micro_batches),
        )
        for threads in (1, 2)
    }
    one_device = lamp3d.make_plan(
        network(), (micro_batches, 1, SIDE, SIDE, SIDE), 1, micro_batches=micro_batches, recompute="never",
        schedule="1f1b", channels_last=plans["1f1b"].channels_last,
    )  # fmt: skip
    one_process["lamp3d, one device, 1 thread"] = (one_engine, (Job(micro_batches, one_device),))
    one_process["torchgpipe 0.0.7"] = (torchgpipe, (Job(micro_batches, cut),))
    several: dict[str, Job] = {}
    if micro_batches >= WORKERS:  # it refuses fewer micro-batches than stages
        several = {f"torch.distributed.pipelining, {how}": Job(micro_batches, cut, how) for how in ("GPipe", "1F1B")}
    several |= {f"lamp3d, {name}": Job(micro_batches, plan, name) for name, plan in plans.items()}

    # One after the other, each in processes of its own: a process that waits would keep the memory of its last step.
    context = get_context("spawn")
    seconds: dict[str, list[float]] = {}
    lines: dict[str, TimeLine] = {}
    for name in track([*one_process, *several], description=f"M = {micro_batches}", console=console):
        if name in one_process:
            pipe, theirs = context.Pipe()
            process = context.Process(target=serve, args=(*one_process[name], theirs))
            process.start()
        else:
            listener = Listener()
            process = context.Process(target=launch_workers, args=(several[name], str(listener.address)))
            process.start()
            pipe = listener.accept()
        took = []
        for turn in range(rounds + 1):
            pipe.send(True)
            step, line = pipe.recv()
            if turn:  # the first one warms up
                took.append(step)
                if line is not None and step <= statistics.median(took):
                    lines[name] = line
        pipe.send(False)
        process.join()
        seconds[name] = took
    draw(micro_batches, plans, lines)
    return summarise(micro_batches, plans, seconds, console)


def draw(micro_batches: int, plans: dict[str, lamp3d.Plan], lines: dict[str, TimeLine]) -> None:
    """Each schedule's predicted and measured time line, one above the other."""
    for name, plan in plans.items():
        measured = lines.get(f"lamp3d, {name}")
        if measured is not None:
            figure = time_line_picture({f"{name}, predicted": plan.time_line(), f"{name}, measured": measured})
            figure.savefig(HERE / f"timeline-{name}-{micro_batches}.png", dpi=110)


def summarise(
    micro_batches: int, plans: dict[str, lamp3d.Plan], seconds: dict[str, list[float]], console: Console
) -> dict[str, Any]:
    """The table of one mini-batch, and what results.json keeps of it."""
    medians = {name: statistics.median(took) for name, took in seconds.items()}
    best = {
        text: min(took for name, took in medians.items() if name.startswith("one process") and text in name)
        for text in ("1 thread", "2 threads")
    }
    table = Table(title=f"U-Net-{FILTERS}, {micro_batches} × {SIDE}³, fp32: a training step")
    for column in ("", "s a step", "range", "× best of 1 thread", "× best of 2 threads", "predicted s", "sent"):
        table.add_column(column, justify="left" if not column else "right")
    for name, took in sorted(medians.items(), key=lambda item: -item[1]):
        spread = f"{min(seconds[name]):.2f}-{max(seconds[name]):.2f}"
        plan = plans.get(name.removeprefix("lamp3d, "))
        extra = ("", "")
        if plan is not None:
            sent = sum(stage.sent_bytes for stage in plan.stages)
            extra = (f"{plan.step_seconds:.2f}", lamp3d.plan.format_bytes(sent))
        ratios = (f"{best['1 thread'] / took:.2f}", f"{best['2 threads'] / took:.2f}")
        table.add_row(name, f"{took:.2f}", spread, *ratios, *extra)
    console.print(table)
    return {
        "cut": {name: [[stage.rank, stage.cells[0]] for stage in plan.stages] for name, plan in plans.items()},
        "channels_last": {name: plan.channels_last for name, plan in plans.items()},
        "predicted_seconds": {name: plan.step_seconds for name, plan in plans.items()},
        "bytes_sent": {name: sum(stage.sent_bytes for stage in plan.stages) for name, plan in plans.items()},
        "seconds": seconds,
        "median_seconds": medians,
        "over_one_thread": {name: best["1 thread"] / took for name, took in medians.items()},
        "over_two_threads": {name: best["2 threads"] / took for name, took in medians.items()},
    }


def alone(measure: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a process of its own."""
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_send_result, args=(theirs, measure, args))
    process.start()
    found = pipe.recv()
    process.join()
    return found


def _send_result(pipe: Connection, measure: Callable[..., Any], args: tuple[Any, ...]) -> None:
    pipe.send(measure(*args))


def main() -> None:
    """Run the parts that are asked for, print what they find, keep it in results.json beside that of the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8])
    parser.add_argument("--only", nargs="+", default=["schedules"], choices=["schedules", *PARTS], metavar="PART")
    arguments = parser.parse_args()
    console = Console(width=150)
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in arguments.only:
        if part == "schedules":
            for m in arguments.micro_batches:
                found = run(m, arguments.rounds, console)
                keep(results, f"schedules, M = {m}", f"--micro-batches {m}", found, arguments)
                write(path, results)
        else:
            found = PARTS[part](arguments.rounds)
            console.print(part, found)
            keep(results, part, f"--only {part}", found, arguments)
            write(path, results)


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the results, so that a part that fails loses none of those before it."""
    path.write_text(json.dumps(results, indent=1) + "\n")


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


def keep(results: dict[str, Any], part: str, options: str, found: Any, arguments: argparse.Namespace) -> None:
    """Put what was found among the results, with the command, the commit and the machine that it comes from."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    cpu = next((line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")), "")
    results[part] = {
        "command": f"lamp3d bench pipeline {options} --rounds {arguments.rounds}",
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "cpu": f"{cpu or platform.machine()}, {os.cpu_count()} cores",
        "found": found,
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    from benchmarks.pipeline import run as module  # under its own name, by which workers import it

    module.main()
