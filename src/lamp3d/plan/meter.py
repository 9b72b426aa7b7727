"""Profiles of one network for every micro-batch, cut and precision in question: measured here, or worked out.

A volume whose step would take too long to time is timed on a smaller one: every cell's seconds then grow with what it
has to compute. Of micro-batches the smallest in question is timed, and larger ones of whole volumes where that takes
moments; others take in proportion.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import nn

from lamp3d.errors import ConfigError
from lamp3d.graph import CellGraph, lay_out_weights, trace
from lamp3d.graph.allocator import freed_memory_kept
from lamp3d.graph.inputs import InputShape, Shape, divisor_of, input_text, title_of, with_batch
from lamp3d.plan.allowance import cpu_cores
from lamp3d.plan.cache import remembered
from lamp3d.plan.hardware import (
    DeviceType,
    Hardware,
    device_memory,
    device_name,
    device_type,
    has_fast_bf16,
    local_workers,
    worker_threads,
)
from lamp3d.plan.links import Link, Links
from lamp3d.plan.neighbours import neighbours_at_work
from lamp3d.plan.plan import Precision
from lamp3d.plan.profile import LossCost, Profile, Timing, model_cells, profile_of, scale_timing
from lamp3d.plan.slabs import Slabs, longest_axes, shared, slab_shape
from lamp3d.plan.timing import TimedLoss, time_cells, time_loss
from lamp3d.plan.work import Work, account
from lamp3d.space.trial import refusal

BUDGET_SECONDS = 20.0
"""What timing all cells may take; a volume that takes longer is timed on a smaller one."""

CASES_SECONDS = 4.0
"""What timing all cells on several cases at once may take; more of them take in proportion."""

GLANCE_SECONDS = 5.0
"""What timing all cells may take to find out which precision and layout are the faster ones."""

FAR_SLOWER = 1.5
"""A precision that takes so many times the fastest one's seconds is not considered."""

Way = tuple[Precision, bool]
"""A precision, and whether volumes are laid out channels-last."""

SMALLEST_TIMED = 32
"""Voxels along the sides of a volume below which seconds would no longer grow with the work."""


class Meter(ABC):
    """Profiles of one network.

    Args:
        network: any traceable module; left as it is. Its parameters may be on the meta device if nothing is timed.
        input_shape: of the mini-batch.
        micro_batch: the smallest in question.
        links: between the devices.
        kind: of the devices.
        graph: the network's, where it is known already.

    Attributes:
        graph: the network's cells.
        work: what they do, of a slab.
        refusal: why the network cannot be run on volumes that are cut along so many axes; None if it can.

    Raises:
        ConfigError: the network cannot be traced, or has nothing to compute.
    """

    def __init__(
        self,
        network: nn.Module,
        input_shape: InputShape,
        micro_batch: int,
        links: Links,
        kind: DeviceType,
        graph: CellGraph | None = None,
    ):
        self.network = network
        self.input_shape = input_shape
        self.micro_batch = micro_batch
        self.links = links
        self.kind = kind
        self.divisor = divisor_of(network)
        self.graph = trace(self.network, self.shape) if graph is None or graph.reads_shape else graph
        if not self.graph.cells:
            raise ConfigError(f"{title_of(network)} has nothing to compute: it gives back what it gets.")
        self.work = functools.cache(self._work)
        self.refusal = functools.cache(self._refusal)

    @property
    def shape(self) -> Shape | dict[str, Shape]:
        """Of the smallest micro-batch's whole volumes."""
        return with_batch(self.input_shape, self.micro_batch)

    @property
    @abstractmethod
    def memory(self) -> int:
        """Bytes that a device's tensors can have."""

    @property
    @abstractmethod
    def precisions(self) -> tuple[Precision, ...]:
        """Those that the devices are fast in, the most exact first."""

    @abstractmethod
    def timing(self, slabs: Slabs, precision: str, channels_last: bool, split: bool, cases: int) -> Timing:
        """Seconds of all cells on a volume that is cut as `near` says, computed as fast as slabs are.

        Args:
            slabs: how volumes are cut.
            precision, channels_last, split: as for :func:`lamp3d.plan.timing.time_cells`.
            cases: that are computed at once.

        Returns:
            the seconds of the smallest micro-batch; its share of them, where more cases are computed at once.
        """

    def near(self, slabs: Slabs) -> Slabs:
        """How the volume is cut whose seconds `timing` gives: `profile` brings them to what a slab has to do."""
        return slabs

    def timed_cases(self, slabs: Slabs, precision: str, channels_last: bool, split: bool, cases: int) -> int:
        """How many cases to time at once so as to know what ``cases`` of them take."""
        return self.micro_batch

    def layouts(self, precision: str) -> tuple[bool, ...]:
        """Whether volumes are laid out channels-last: what is to be compared."""
        return False, True

    @abstractmethod
    def glance(self, ways: Sequence[Way]) -> Sequence[float]:
        """Seconds of all cells, each way, for a volume of which they are soon known, the same for all."""

    def ways(self, precisions: Sequence[Precision], channels_last: bool | None = None) -> list[Way]:
        """Each precision in which a step may be the fastest, in the better layout.

        Args:
            precisions: to choose from; one alone is not questioned.
            channels_last: None: the faster one.
        """
        layouts = {p: self.layouts(p) if channels_last is None else (channels_last,) for p in precisions}
        every = [(precision, last) for precision in precisions for last in layouts[precision]]
        seconds = dict(zip(every, self.glance(every) if len(every) > 1 else [0.0], strict=True))
        best = [min((way for way in every if way[0] == p), key=lambda way: seconds[way]) for p in precisions]
        return [way for way in best if seconds[way] <= FAR_SLOWER * min(seconds.values())]

    def profile(
        self,
        slabs: Slabs,
        precision: str,
        channels_last: bool,
        split: bool,
        cases: int | None = None,
        link: Link | None = None,
    ) -> Profile:
        """What the cells cost a rank, for the smallest micro-batch.

        Args:
            slabs: how volumes are cut.
            precision, channels_last, split: as for :func:`lamp3d.plan.timing.time_cells`.
            cases: that are computed at once; the seconds are the smallest micro-batch's share.
            link: between the ranks that share a volume; None: as within a machine.
        """
        alike = replace(slabs, least=1)  # what is gathered changes nothing of what is timed
        near, whole = self.work(self.near(alike), precision, channels_last, split), self.whole(precision, channels_last)
        timing = self.timing(alike, precision, channels_last, split, cases or self.micro_batch)
        entire = None
        if slabs != alike:
            entire = self.timing(Slabs(), precision, channels_last, split, cases or self.micro_batch)
        profile = shared(profile_of(near, timing), near, whole, self.graph, slabs, link or self.links.within, entire)
        part = sum(profile.value_bytes[name] for name in self.graph.outputs) / sum(
            whole.value_bytes[name] for name in self.graph.outputs
        )
        return profile.with_loss(self.loss_cost(precision, channels_last).share(part))

    def takes(self, shape: Shape) -> bool:
        """Whether the network takes inputs of a shape, which one that tells its divisor need not be asked."""
        if hasattr(self.network, "divisor"):
            return True
        try:
            self._account(shape, "fp32", False, False)
        except Exception:
            return False
        return True

    def _refusal(self, axes: int) -> str | None:
        halves = longest_axes(self.shape, (2,) * axes)
        return refusal(self.graph, self.shape, halves.mesh, halves.dims)

    def loss_cost(self, precision: str, channels_last: bool) -> LossCost:
        """Of a micro-batch of whole volumes; nothing where the loss is not known."""
        return LossCost(0.0, 0)

    def _work(self, slabs: Slabs, precision: str, channels_last: bool, split: bool) -> Work:
        shape = slab_shape(self.shape, slabs, self.divisor)
        try:
            return self._account(shape, precision, channels_last, split)
        except Exception as error:
            if shape == self.shape:
                raise
            raise ConfigError(
                f"slabs are timed with {input_text(shape)}, and {title_of(self.network)} does not take that (if "
                f"it halves a volume more often, give it an attribute `divisor`, now {self.divisor})"
            ) from error

    def _account(self, shape: InputShape, precision: str, channels_last: bool, split: bool) -> Work:
        return account(
            self._graph_for(shape), shape, precision=precision, channels_last=channels_last, split=split,
            own_kernels=self.kind == "cpu",
        )  # fmt: skip

    def whole(self, precision: str, channels_last: bool) -> Work:
        """What the cells do with whole volumes."""
        return self.work(Slabs(), precision, channels_last, False)

    def _graph_for(self, shape: InputShape) -> CellGraph:
        """The graph, for such inputs: another one where the network's code looks at their shape."""
        return trace(self.network, shape) if self.graph.reads_shape else self.graph


class ModelMeter(Meter):
    """Profiles for devices that are only described.

    Args:
        hardware: the devices.
        loss: what the loss costs; None: it does not count.
    """

    def __init__(
        self,
        network: nn.Module,
        input_shape: InputShape,
        micro_batch: int,
        hardware: Hardware,
        links: Links,
        graph: CellGraph | None = None,
        loss: LossCost | None = None,
    ):
        super().__init__(network, input_shape, micro_batch, links, hardware.device_type, graph)
        self.hardware, self.loss = hardware, loss
        self._modelled: dict[tuple[object, ...], Timing] = {}

    def on(self, hardware: Hardware, links: Links) -> ModelMeter:
        """The same cells on other devices; what they do need not be found again."""
        other = copy.copy(self)
        other.hardware, other.links, other.kind, other._modelled = hardware, links, hardware.device_type, {}
        return other

    @property
    def memory(self) -> int:
        return self.hardware.usable_bytes

    @property
    def precisions(self) -> tuple[Precision, ...]:
        return self.hardware.precisions

    def near(self, slabs: Slabs) -> Slabs:
        return Slabs()  # of which a slab has a part

    def timing(self, slabs: Slabs, precision: str, channels_last: bool, split: bool, cases: int) -> Timing:
        times = cases / self.micro_batch / slabs.count  # the host issues as many operations for a part as for all
        asked = precision, channels_last, split, times
        if asked not in self._modelled:
            work = self.work(Slabs(), precision, channels_last, split)
            self._modelled[asked] = model_cells(work, self.hardware, precision, times).share(1 / times)
        return self._modelled[asked]

    def timed_cases(self, slabs: Slabs, precision: str, channels_last: bool, split: bool, cases: int) -> int:
        return cases

    def layouts(self, precision: str) -> tuple[bool, ...]:
        return (precision == "bf16",)  # what cuDNN's kernels for tensor cores want; the model does not tell them apart

    def glance(self, ways: Sequence[Way]) -> Sequence[float]:
        return [self.timing(Slabs(), *way, False, self.micro_batch).seconds for way in ways]

    def loss_cost(self, precision: str, channels_last: bool) -> LossCost:
        return self.loss or super().loss_cost(precision, channels_last)


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
