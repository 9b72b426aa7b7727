"""The peers of the pipeline benchmark, on the same network, weights, cut and micro-batches.

torch.distributed.pipelining runs one process a stage, as lamp3d does; a skip that crosses the cut travels as one more
value from a stage to the next, and tensors must be contiguous, so channels-last is not open to it.

torchgpipe is one process; a device has one worker thread for the forward pass, and the backward pass is left to
autograd. On CUDA the host only queues kernels, so that is enough. On a CPU two things follow. All CPU "devices" are
taken for one and share one worker thread, so nothing would overlap: :class:`ThreadedGPipe` gives every partition its
own thread, the best that can be done for it from outside. And autograd runs the CPU part of a backward pass in the
calling thread alone, so the backward passes of the partitions cannot overlap, whatever is done.
"""

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from queue import Queue
from threading import Thread
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torchgpipe import GPipe
from torchgpipe.skip import Namespace, pop, skippable, stash
from torchgpipe.worker import worker

from lamp3d.errors import ConfigError
from lamp3d.graph import trace
from lamp3d.plan import Plan


@skippable(stash=["skip"])
class Stash(nn.Module):
    """Sends its input on, and a portal to where the skip is used."""

    def forward(self, x: Tensor) -> Generator[Any, None, Tensor]:
        yield stash("skip", x)
        return x


@skippable(pop=["skip"])
class PopConcat(nn.Module):
    """Concatenates the skip that comes through the portal with its input, along the channels."""

    def forward(self, x: Tensor) -> Generator[Any, Tensor, Tensor]:
        skip = yield pop("skip")
        return torch.cat([skip, x], dim=1)


class ThreadedGPipe(GPipe):  # type: ignore[misc]
    """A `GPipe` on the CPU with one worker thread a partition, instead of one for all."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C, D, H, W) of images, in micro-batches through the partitions."""
        with patch("torchgpipe.pipeline.spawn_workers", _spawn_workers):
            logits: Tensor = super().forward(images)
        return logits


class PipeliningPeer:
    """``torch.distributed.pipelining`` on the two stages of a plan; to be made in every worker.

    Args:
        network: the whole network.
        plan: with two stages.
        schedule: "GPipe" or "1F1B".
        loss_fn: from output and targets to a 0-dim mean over cases.
    """

    def __init__(self, network: nn.Module, plan: Plan, schedule: str, loss_fn: Callable[[Tensor, Any], Tensor]):
        first, second = trace(network, plan.input_shape).cut(plan.starts)
        assert tuple(first.outputs) == tuple(second.inputs), "values must pass from the first stage to the second"
        rank = dist.get_rank()
        stage = PipelineStage((first, second)[rank], rank, 2, torch.device("cpu"))
        kinds = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}
        self._first = rank == 0
        self._schedule = kinds[schedule](
            stage, plan.micro_batches, loss_fn=lambda output, target: loss_fn(output[0], target)
        )

    def step(self, images: Tensor) -> None:
        """Forward and backward of a mini-batch."""
        if self._first:
            self._schedule.step(images)
        else:
            self._schedule.step(target=images)  # as many as images; the loss does not look at them


def torchgpipe_unet(network: nn.Module, cuts: Sequence[str], chunks: int) -> ThreadedGPipe:
    """A torchgpipe model that shares the weights of a U-Net; its skips travel through portals.

    Args:
        network: `lamp3d.nets.UNet`, or any chain of modules that `torch.fx` can trace, with skips that are concatenated
            in front of the chain's value: ``torch.cat([skip, x], dim=1)``.
        cuts: the cells (modules; `cat`, `cat_1`, … for the concatenations) with which the second and further stages
            begin, in order; the cell names of a `Plan` will do.
        chunks: micro-batches a mini-batch is cut into (the paper's M).

    Raises:
        ConfigError: the network is no such chain, or a cut names none of its cells, or cuts are out of order.
    """
    layers, starts = _sequence(network)
    missing = [cut for cut in cuts if _first_target(cut) not in starts]
    if missing:
        raise ConfigError(f"no cell begins with {', '.join(map(repr, missing))}; there are {', '.join(starts)}")
    bounds = [0, *(starts[_first_target(cut)] for cut in cuts), len(layers)]
    balance = [end - begin for begin, end in pairwise(bounds)]
    if min(balance) < 1:
        raise ConfigError(f"the cuts {list(cuts)} are not in the order of the network")
    devices = [torch.device("cpu")] * len(balance)
    return ThreadedGPipe(nn.Sequential(layers), balance, devices=devices, chunks=chunks, checkpoint="never")


def _sequence(network: nn.Module) -> tuple[OrderedDict[str, nn.Module], dict[str, int]]:
    """The network's own modules in a row, with stashes and pops between, and where each cell begins in it."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    starts: dict[str, int] = {}
    pops: dict[fx.Node, nn.Module] = {}
    stashes: dict[fx.Node, nn.Module] = {}
    nodes = list(fx.symbolic_trace(network).graph.nodes)
    for node in nodes:  # portals come in pairs, each in a namespace of its own
        if node.target is torch.cat:
            skip, _ = node.args[0]
            sender: Any = Stash()
            receiver: Any = PopConcat()
            namespace = Namespace()
            stashes[skip] = sender.isolate(namespace)
            pops[node] = receiver.isolate(namespace)
    previous = nodes[0]
    for node in nodes[1:-1]:
        inputs = list(node.all_input_nodes)
        if node in pops and inputs[-1] is previous:
            starts[node.name] = len(layers)
            layers[node.name] = pops[node]
        elif node.op == "call_module" and inputs == [previous]:
            starts[node.target] = len(layers)
            layers[node.name] = network.get_submodule(node.target)
        else:
            raise ConfigError(f"{type(network).__name__} is no chain of modules with concatenated skips: {node.name}")
        if node in stashes:
            layers[f"{node.name}_stash"] = stashes[node]
        previous = node
    return layers, starts


def _first_target(cell: str) -> str:
    """The planner names a cell of several modules `first + second`."""
    return cell.split(" + ")[0]


@contextmanager
def _spawn_workers(devices: list[torch.device]) -> Iterator[tuple[list[Any], list[Any]]]:
    """torchgpipe's worker threads, one for each entry of `devices` even where these are equal."""
    inputs: list[Any] = [Queue() for _ in devices]
    outputs: list[Any] = [Queue() for _ in devices]
    run: Callable[..., None] = worker
    threads = [
        Thread(target=run, args=(tasks, results, device, torch.is_grad_enabled()), daemon=True)
        for tasks, results, device in zip(inputs, outputs, devices, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        yield inputs, outputs
    finally:
        for tasks in inputs:
            tasks.put(None)
        for thread in threads:
            thread.join()
