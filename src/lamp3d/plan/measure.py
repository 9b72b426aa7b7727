"""Profiles that are timed on this machine.

A volume whose step would take too long to time is timed on a smaller one: every cell's seconds then grow with what it
has to compute. Of micro-batches the smallest in question is timed, and larger ones of whole volumes where that takes
moments; others take in proportion.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from lamp3d.graph import CellGraph, lay_out_weights, trace
from lamp3d.graph.allocator import freed_memory_kept
from lamp3d.graph.inputs import InputShape, Shape, with_batch
from lamp3d.plan.allowance import cpu_cores
from lamp3d.plan.cache import remembered
from lamp3d.plan.hardware import (
    device_memory,
    device_name,
    device_type,
    has_fast_bf16,
    local_workers,
    worker_threads,
)
from lamp3d.plan.links import Links
from lamp3d.plan.meter import Meter, Way
from lamp3d.plan.neighbours import neighbours_at_work
from lamp3d.plan.plan import Precision
from lamp3d.plan.profile import LossCost, Timing, scale_timing
from lamp3d.plan.slabs import Slabs, slab_shape
from lamp3d.plan.timing import TimedLoss, time_cells, time_loss

BUDGET_SECONDS = 20.0
"""What timing all cells may take; a volume that takes longer is timed on a smaller one."""

CASES_SECONDS = 4.0
"""What timing all cells on several cases at once may take; more of them take in proportion."""

GLANCE_SECONDS = 5.0
"""What timing all cells may take to find out which precision and layout are the faster ones."""

SMALLEST_TIMED = 32
"""Voxels along the sides of a volume below which seconds would no longer grow with the work."""


class MeasuringMeter(Meter):
    """Profiles that are timed on this machine, under the conditions of one of its workers.

    Args:
        workers: that will be at work at once.
        loss: that the network is trained with; None: it is not counted.
        repeats: timed passes through all cells.
        fresh: time them even if that was done before.
    """

    def __init__(
        self,
        network: nn.Module,
        input_shape: InputShape,
        micro_batch: int,
        links: Links,
        graph: CellGraph | None = None,
        *,
        workers: int,
        loss: TimedLoss | None = None,
        repeats: int = 3,
        fresh: bool = False,
    ):
        super().__init__(network, input_shape, micro_batch, links, device_type(), graph)
        self.workers, self.loss, self.repeats, self.fresh = workers, loss, repeats, fresh
        self._timed: dict[str, Timing] = {}  # so that nothing is timed twice, also where the disk does not remember
        self.timing_of, self.loss_cost_of = functools.cache(self._timing), functools.cache(self._loss_cost)

    @property
    def memory(self) -> int:
        return device_memory(self.kind, self.workers)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        return ("fp32", "bf16") if has_fast_bf16(self.kind) else ("fp32",)

    def timing(self, slabs: Slabs, precision: str, channels_last: bool, split: bool, cases: int) -> Timing:
        if cases == self.micro_batch:
            return self.timing_of(slabs, precision, channels_last, split)
        together = self._time(with_batch(self.input_shape, cases), precision, channels_last, split)
        return together.share(self.micro_batch / cases)

    def timed_cases(self, slabs: Slabs, precision: str, channels_last: bool, split: bool, cases: int) -> int:
        if slabs.mesh or self._affordable(self.shape, precision, channels_last)[-1] != self.shape:
            return self.micro_batch
        alone = self.timing_of(slabs, precision, channels_last, split).seconds * (self.repeats + 1) / self.micro_batch
        while cases * alone > CASES_SECONDS and cases % 2 == 0:
            cases //= 2  # all of them, or a half, a quarter …
        return cases if cases * alone <= CASES_SECONDS and cases % self.micro_batch == 0 else self.micro_batch

    def glance(self, ways: Sequence[Way]) -> Sequence[float]:
        shapes = [self._affordable(self.shape, *way, GLANCE_SECONDS)[-1] for way in ways]
        smallest = min(shapes, key=_elements)
        return [self._time(smallest, *way, False).seconds for way in ways]

    def loss_cost(self, precision: str, channels_last: bool) -> LossCost:
        return self.loss_cost_of(precision, channels_last)

    def _loss_cost(self, precision: str, channels_last: bool) -> LossCost:
        if self.loss is None:
            return LossCost(0.0, 0)
        values = self.whole(precision, channels_last).values
        with self._worker_conditions(), neighbours_at_work(self._neighbours, precision):
            return time_loss(self.loss, self.graph, values, torch.device(self.kind), self.repeats)

    def _timing(self, slabs: Slabs, precision: str, channels_last: bool, split: bool) -> Timing:
        wanted = slab_shape(self.shape, slabs, self.divisor)
        shapes = self._affordable(wanted, precision, channels_last)
        if shapes[-1] == wanted:
            return self._time(wanted, precision, channels_last, split)
        how = precision, channels_last, split
        timings = [(self._time(shape, *how), self._account(shape, *how)) for shape in shapes]
        return scale_timing(timings, self.work(slabs, precision, channels_last, split))

    def _time(self, shape: InputShape, precision: str, channels_last: bool, split: bool) -> Timing:
        settings = {"precision": precision, "channels_last": channels_last, "split": split}
        asked = str((shape, settings))
        if asked in self._timed:
            return self._timed[asked]
        threads = worker_threads(self.workers) if self.kind == "cpu" else None
        key = {
            "network": hashlib.sha256(self.graph.root.code.encode()).hexdigest(),
            "layers": [str(module) for module in self.network.modules() if not list(module.children())],
            "parameters": [(tuple(p.shape), str(p.dtype), p.requires_grad) for p in self.network.parameters()],
            "training": self.network.training,
            "shape": shape,
            "device": device_name(self.kind),
            "threads": threads,
            "neighbours": self._neighbours,
            "repeats": self.repeats,
            **settings,
        }

        def measure() -> Timing:
            with self._worker_conditions():
                twin = trace(self._twin(channels_last), shape)
                with neighbours_at_work(self._neighbours, precision):
                    return time_cells(twin, shape, repeats=self.repeats, **settings)  # type: ignore[arg-type]

        self._timed[asked] = remembered(key, measure, fresh=self.fresh)
        return self._timed[asked]

    def _affordable(
        self, wanted: Shape | dict[str, Shape], precision: str, channels_last: bool, budget: float | None = None
    ) -> list[Shape] | list[Shape | dict[str, Shape]]:
        """What to time: the wanted volume, or the smallest and the largest within the budget.

        Smaller volumes are those that halving the longest axis leads to.
        """
        if self.graph.reads_shape or isinstance(wanted, dict):
            return [wanted]  # another volume might be another graph
        shapes = [wanted]
        while (smaller := self._halved(shapes[-1])) is not None and self.takes(smaller):
            shapes.append(smaller)
        least = shapes[-1]
        if least == wanted:
            return [wanted]
        seconds = self._time(least, precision, channels_last, False).seconds
        voxels = (BUDGET_SECONDS if budget is None else budget) / (seconds * (self.repeats + 1)) * math.prod(least)
        largest = next((shape for shape in shapes if math.prod(shape) <= voxels), least)
        return [wanted] if largest == wanted else [least] * (largest != least) + [largest]

    def _halved(self, shape: Shape) -> Shape | None:
        longest = max(range(2, len(shape)), key=lambda dim: shape[dim])
        half = -(-shape[longest] // 2 // self.divisor) * self.divisor
        if half < max(SMALLEST_TIMED, 2 * self.divisor) or half >= shape[longest]:
            return None
        return (*shape[:longest], half, *shape[longest + 1 :])

    @contextmanager
    def _worker_conditions(self) -> Iterator[None]:
        """The threads and the allocator that a worker has; random numbers are as they were afterwards."""
        devices = [torch.cuda.current_device()] if self.kind == "cuda" else []
        threads = torch.get_num_threads()
        with torch.random.fork_rng(devices), freed_memory_kept() if self.kind == "cpu" else nullcontext():
            if self.kind == "cpu":
                torch.set_num_threads(worker_threads(self.workers))
            try:
                yield
            finally:
                torch.set_num_threads(threads)

    @property
    def _neighbours(self) -> int:
        """How many other workers compute on this machine at the same time, on cores of their own."""
        return min(local_workers(self.workers), cpu_cores()) - 1 if self.kind == "cpu" else 0

    def _twin(self, channels_last: bool) -> nn.Module:
        """A copy of the network on the device and in the layout."""
        twin = copy.deepcopy(self.network)
        lay_out_weights(twin, channels_last)
        return twin.to(self.kind)


def _elements(shape: InputShape) -> int:
    return sum(math.prod(extents) for extents in (shape.values() if isinstance(shape, Mapping) else (shape,)))
