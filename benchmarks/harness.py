"""Competitors that take the same training step, one after the other, each in processes of its own.

Each takes one step to warm up and then several that are timed; a process that waited for its turn would keep the
memory of its last step. Every process computes with one thread, unless it is said to have more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import lamp3d
from benchmarks.pipeline.peers import PipeliningPeer, torchgpipe_unet
from lamp3d.graph.allocator import keep_freed_memory, peak_resident_bytes
from lamp3d.plan import TimeLine

FILTERS, CLASSES, WORKERS = 16, 8, 2
Step = Callable[[], object]
PEER = "torch.distributed.pipelining"


@dataclass(frozen=True)
class Job:
    """What a competitor is to run: the mini-batch, and, for those that are cut, the plan.

    Attributes:
        shape: of the mini-batch.
        plan: of lamp3d, or whose cut a peer takes.
        peer: the schedule of torch.distributed.pipelining, instead of lamp3d's engine.
    """

    shape: tuple[int, ...]
    plan: lamp3d.Plan | None = None
    peer: str = ""


@dataclass(frozen=True)
class Measured:
    """What was measured of a competitor.

    Attributes:
        seconds: of every step that counts.
        peak_bytes: resident memory of each of its processes.
        bytes_sent: by all of its workers in a step (of lamp3d's).
        line: the time line of one of its faster steps (of lamp3d's workers).
    """

    seconds: list[float]
    peak_bytes: list[int]
    bytes_sent: int = 0
    line: TimeLine | None = None

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)


def network() -> nn.Module:
    """The benchmarks' network, the same weights everywhere."""
    torch.manual_seed(0)
    return lamp3d.UNet(1, CLASSES, filters=FILTERS)


def images(shape: tuple[int, ...]) -> Tensor:
    """A mini-batch."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@lamp3d.mean_over_cases
def loss_fn(logits: Tensor, targets: object) -> Tensor:
    """As cheap as a loss can be, so that the network is what is timed."""
    return logits.float().square().mean()


def plain(job: Job, threads: int, channels_last: bool, pieces: int, bf16: bool = False) -> Step:
    """One process: the mini-batch in ``pieces`` passes (1: as a whole; M: gradient accumulation)."""
    torch.set_num_threads(threads)
    model, batch = network(), images(job.shape)
    if channels_last:
        model = model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        batch = batch.contiguous(memory_format=torch.channels_last_3d)

    def step() -> None:
        model.zero_grad()
        for piece in batch.chunk(pieces):
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                loss = loss_fn(model(piece), None) / pieces
            torch.autograd.backward(loss)

    return step


def one_engine(job: Job, threads: int = 1) -> Step:
    """lamp3d's engine on one device: what its arithmetic is worth without any pipeline."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    assert job.plan is not None
    ours, batch = lamp3d.Engine(network(), job.plan), images(job.shape)

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
    model, batch = torchgpipe_unet(network(), cuts, job.plan.micro_batches), images(job.shape)

    def step() -> None:
        model.zero_grad()
        torch.autograd.backward(loss_fn(model(batch), None))

    return step


OneProcess = tuple[Callable[..., Step], tuple[Any, ...]]
"""What makes a competitor's step in its process, and from what."""


def contest(
    description: str, competitors: Mapping[str, OneProcess | Job], rounds: int, console: Console
) -> dict[str, Measured]:
    """Measure all of them: those of one process, and jobs for several workers."""
    context = get_context("spawn")
    found = {}
    for name in track(competitors, description=description, console=console):
        competitor = competitors[name]
        if isinstance(competitor, Job):
            listener = Listener()
            process = context.Process(target=_launch_workers, args=(competitor, str(listener.address)))
            process.start()
            pipe = listener.accept()
        else:
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(*competitor, theirs))
            process.start()
        seconds: list[float] = []
        line, sent = None, 0
        for turn in range(rounds + 1):
            pipe.send(True)
            took, sent, of_step = pipe.recv()
            if turn:  # the first one warms up
                seconds.append(took)
                if of_step is not None and took <= statistics.median(seconds):
                    line = of_step
        pipe.send(False)
        found[name] = Measured(seconds, pipe.recv(), sent, line)
        process.join()
    return found


def _serve(make: Callable[..., Step], args: tuple[Any, ...], pipe: Connection) -> None:
    """A competitor in a process of its own: each message from the parent is one step, timed here."""
    step = make(*args)
    while pipe.recv():
        begin = time.perf_counter()
        step()
        pipe.send((time.perf_counter() - begin, 0, None))
    pipe.send([peak_resident_bytes()])


def _launch_workers(job: Job, address: str) -> None:
    """Start the workers (in a process of its own, since the launcher blocks)."""
    assert job.plan is not None
    lamp3d.launch(_serve_workers, job.plan.devices, (job, address))


def _serve_workers(job: Job, address: str) -> None:
    """A competitor of several workers: rank 0 talks to the parent, all take part in every step."""
    assert job.plan is not None
    model, batch = network(), images(job.shape)
    ours = lamp3d.Engine(model, job.plan) if not job.peer else None
    peer = PipeliningPeer(model, job.plan, job.peer, loss_fn) if job.peer else None
    pipe = Client(address) if dist.get_rank() == 0 else None
    go, sent = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    while True:
        if pipe is not None:
            go.fill_(float(pipe.recv()))
        dist.broadcast(go, 0)
        if not go.item():
            break
        model.zero_grad()
        before = 0 if ours is None else ours.bytes_sent
        begin = time.perf_counter()
        if ours is not None:
            ours.step(batch if ours.reads_input else None, None, loss_fn)
        elif peer is not None:
            peer.step(batch)
        dist.all_reduce(torch.zeros(1))  # a step is over when every rank is done
        seconds = time.perf_counter() - begin
        sent.fill_(0 if ours is None else ours.bytes_sent - before)
        dist.all_reduce(sent)
        line = None if ours is None or job.plan.pipe == 1 else ours.time_line()
        if pipe is not None:
            pipe.send((seconds, int(sent), line))
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, peak_resident_bytes())
    if pipe is not None:
        pipe.send(peaks)


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


Part = Callable[[int, Console], Any]
"""A part of a benchmark: from the number of rounds, and where to print, to what results.json is to hold."""


def run_parts(name: str, about: str | None, parts: Mapping[str, Part], rounds: int) -> None:
    """Run the parts of a benchmark that the command line asks for, all by default, and keep what they find.

    Args:
        name: of the benchmark's folder, where results.json is.
        about: what its help says.
        parts: by name.
        rounds: by default.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--only", nargs="+", default=list(parts), choices=list(parts), metavar="PART")
    arguments = parser.parse_args()
    console = Console(width=150)
    for part in arguments.only:
        found = parts[part](arguments.rounds, console)
        command = f"lamp3d bench {name} --rounds {arguments.rounds} --only {part}"
        keep(Path(__file__).parent / name / "results.json", part, command, found)


def keep(path: Path, part: str, command: str, found: Any) -> None:
    """Put what was found among a benchmark's results, with the command, the commit and the machine it comes from."""
    results = json.loads(path.read_text()) if path.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=path.parent, capture_output=True, text=True, check=False)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    results[part] = {
        "command": command,
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "found": found,
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
