"""Profiles of one network for every micro-batch, cut and precision in question: what each kind of them has in common,
and those that are worked out for devices that are only described.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from lamp3d.errors import ConfigError
from lamp3d.graph import CellGraph, trace
from lamp3d.graph.inputs import InputShape, Shape, divisor_of, input_text, title_of, with_batch
from lamp3d.plan.hardware import DeviceType, Hardware
from lamp3d.plan.links import Link, Links
from lamp3d.plan.plan import Precision
from lamp3d.plan.profile import LossCost, Profile, Timing, model_cells, profile_of
from lamp3d.plan.slabs import Slabs, longest_axes, shared, slab_shape
from lamp3d.plan.work import Work, account
from lamp3d.space.trial import refusal

FAR_SLOWER = 1.5
"""A precision that takes so many times the fastest one's seconds is not considered."""

Way = tuple[Precision, bool]
"""A precision, and whether volumes are laid out channels-last."""


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
