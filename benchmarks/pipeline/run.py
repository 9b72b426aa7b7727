"""Pipeline speed: lamp3d's engine beside one process and torchgpipe 0.0.7, the same network, weights and cut.

    lamp3d bench pipeline

U-Net-16, mini-batch of 8 × 64³, fp32, two stages, eight micro-batches, one thread a worker. The competitors take
turns, several rounds of one step each, so that a slow minute of the machine hits all of them; figures are medians.
Writes results.json beside this file and prints the table.
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
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import lamp3d
from benchmarks.pipeline.peers import torchgpipe_unet

FILTERS, BATCH, SIDE, CLASSES = 16, 8, 64, 8
HERE = Path(__file__).parent
Step = Callable[[], object]


def network() -> nn.Module:
    """The benchmark's network, the same weights everywhere."""
    torch.manual_seed(0)
    return lamp3d.UNet(1, CLASSES, filters=FILTERS)


def images() -> Tensor:
    """The benchmark's mini-batch."""
    return torch.randn(BATCH, 1, SIDE, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def loss_fn(logits: Tensor, targets: object) -> Tensor:
    """As cheap as a loss can be, so that the network is what is timed."""
    return logits.square().mean()


def plain(threads: int, channels_last: bool, pieces: int) -> Step:
    """One process: the mini-batch in ``pieces`` passes (1: as a whole; 8: gradient accumulation)."""
    torch.set_num_threads(threads)
    model, batch = network(), images()
    if channels_last:
        model = model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        batch = batch.contiguous(memory_format=torch.channels_last_3d)

    def step() -> None:
        model.zero_grad()
        for piece in batch.chunk(pieces):
            torch.autograd.backward(loss_fn(model(piece), None) / pieces)

    return step


def torchgpipe(plan: lamp3d.Plan) -> Step:
    """torchgpipe with the plan's cut, a thread for each partition's forward."""
    torch.set_num_threads(1)
    cuts = [stage.cells[0] for stage in plan.stages[1:]]
    model, batch = torchgpipe_unet(network(), cuts, plan.micro_batches), images()

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
        pipe.send(time.perf_counter() - begin)


def serve_engine(plan: lamp3d.Plan, address: str) -> None:
    """lamp3d's workers: rank 0 talks to the parent, all take part in every step."""
    from multiprocessing.connection import Client

    model = network()
    engine = lamp3d.Engine(model, plan)
    batch = images() if engine.reads_input else None
    pipe = Client(address) if engine.rank == 0 else None
    go = torch.zeros(1)
    while True:
        if pipe is not None:
            go.fill_(float(pipe.recv()))
        dist.broadcast(go, 0)
        if not go.item():
            return
        model.zero_grad()
        begin = time.perf_counter()
        engine.step(batch, None, loss_fn)
        dist.all_reduce(torch.zeros(1))  # a step is over when every rank is done
        if pipe is not None:
            pipe.send(time.perf_counter() - begin)


def launch_engine(plan: lamp3d.Plan, address: str) -> None:
    """Start lamp3d's workers (in a process of its own, since the launcher blocks)."""
    lamp3d.launch(serve_engine, plan.devices, (plan, address))


def main() -> None:
    """Run all competitors, print the table, write results.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    plan = lamp3d.make_plan(network(), (BATCH, 1, SIDE, SIDE, SIDE), 2, micro_batches=BATCH, recompute="never")
    console = Console()
    console.print(plan.table())

    competitors: dict[str, tuple[Callable[..., Step], tuple[Any, ...]]] = {
        "one process, 1 thread": (plain, (1, False, 1)),
        "one process, 1 thread, channels-last": (plain, (1, True, 1)),
        "one process, 1 thread, 8 passes of 1": (plain, (1, plan.channels_last, BATCH)),
        "one process, 2 threads": (plain, (2, False, 1)),
        "one process, 2 threads, channels-last": (plain, (2, True, 1)),
        "torchgpipe 0.0.7, same cut": (torchgpipe, (plan,)),
    }
    context = get_context("spawn")
    pipes: dict[str, Any] = {}
    processes = []
    for name, (make, args) in competitors.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(make, args, theirs), daemon=True))
    from multiprocessing.connection import Listener

    listener = Listener()
    address = str(listener.address)
    processes.append(context.Process(target=launch_engine, args=(plan, address)))
    for process in processes:
        process.start()
    lamp = f"lamp3d, gpipe, {plan.devices} workers of 1 thread"
    pipes[lamp] = listener.accept()

    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for turn in track(range(rounds + 1), description="Rounds"):
        for name, pipe in pipes.items():
            pipe.send(True)
            took = pipe.recv()
            if turn:  # the first one warms up
                seconds[name].append(took)
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()

    medians = {name: statistics.median(took) for name, took in seconds.items()}
    one_thread = min(took for name, took in medians.items() if "1 thread" in name and "lamp3d" not in name)
    two_threads = min(took for name, took in medians.items() if "2 threads" in name)
    table = Table(title=f"U-Net-{FILTERS}, {BATCH} × {SIDE}³, fp32: a training step")
    for column in ("", "s a step", "range", "× the best of 1 thread", "× the best of 2 threads"):
        table.add_column(column, justify="left" if not column else "right")
    for name, took in sorted(medians.items(), key=lambda item: -item[1]):
        spread = f"{min(seconds[name]):.2f}-{max(seconds[name]):.2f}"
        table.add_row(name, f"{took:.2f}", spread, f"{one_thread / took:.2f}", f"{two_threads / took:.2f}")
    console.print(table)
    limit = BATCH * 2 / (BATCH + 1)
    console.print(f"GPipe's limit with 2 stages and {BATCH} micro-batches is {limit:.2f}; the plan predicts "
                  f"{plan.step_seconds:.2f} s a step.")  # fmt: skip
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    results = {
        "command": f"lamp3d bench pipeline --rounds {rounds}",
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "cut": [stage.cells[0] for stage in plan.stages],
        "channels_last": plan.channels_last,
        "predicted_seconds": plan.step_seconds,
        "seconds": seconds,
        "median_seconds": medians,
        "lamp3d_over_one_thread": one_thread / medians[lamp],
        "lamp3d_over_two_threads": two_threads / medians[lamp],
        "lamp3d_over_torchgpipe": medians["torchgpipe 0.0.7, same cut"] / medians[lamp],
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    from benchmarks.pipeline import run  # under its own name, by which workers import it

    run.main()
