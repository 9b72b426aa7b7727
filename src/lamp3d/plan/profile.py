"""What every cell costs one micro-batch: seconds, measured or worked out, and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lamp3d.plan.hardware import Hardware
from lamp3d.plan.work import CellWork, Operation, Work


@dataclass(frozen=True)
class CellSeconds:
    """How long a cell takes; ``backward`` is all of it, ``weight`` the part of it that may be done apart."""

    forward: float
    backward: float
    weight: float = 0.0


@dataclass(frozen=True)
class Timing:
    """The seconds of all cells.

    Attributes:
        cells: in order.
        uncertainty: of their sum, relative: half of what lies between the fastest and the slowest pass.
    """

    cells: tuple[CellSeconds, ...]
    uncertainty: float = 0.0

    @property
    def seconds(self) -> float:
        """Forward and backward through all cells."""
        return sum(cell.forward + cell.backward for cell in self.cells)

    def share(self, part: float) -> Timing:
        """So large a part of it."""
        cells = (CellSeconds(part * cell.forward, part * cell.backward, part * cell.weight) for cell in self.cells)
        return replace(self, cells=tuple(cells))


@dataclass(frozen=True)
class LossCost:
    """What a loss costs for one micro-batch.

    Attributes:
        seconds: forward and backward.
        extra_bytes: alive at its fullest moment, beside the outputs and their gradient.
    """

    seconds: float
    extra_bytes: int

    def share(self, part: float) -> LossCost:
        """So large a part of it."""
        return LossCost(part * self.seconds, round(part * self.extra_bytes))


class CellProfile(NamedTuple):
    """The cost of one cell for one micro-batch.

    Attributes:
        name: the cell's name.
        forward_seconds, backward_seconds: with what a cut volume has to exchange.
        weight_seconds: the part of the backward that may be done apart (0 unless it was measured apart).
        internal_bytes: saved for backward, values of other cells and parameters not counted.
        saved_values: the values (edges of the graph) among what the cell saves for backward.
        parameter_bytes: the cell's parameters.
        deferred_bytes, deferred_values: what is held between the two parts of the backward, counted alike.
        workspace_bytes: the most that is alive within its forward or backward beside what is saved.
        exchanged_bytes: that a rank sends to those with which it shares a volume, forward and backward.
    """

    name: str
    forward_seconds: float
    backward_seconds: float
    internal_bytes: int
    saved_values: frozenset[str]
    parameter_bytes: int
    weight_seconds: float = 0.0
    deferred_bytes: int = 0
    deferred_values: frozenset[str] = frozenset()
    workspace_bytes: int = 0
    exchanged_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True)
class Profile:
    """What a micro-batch costs.

    Attributes:
        cells: each of them; with the loss in the last one's backward, if it is known.
        value_bytes: of every value that passes between cells.
        uncertainty: of the seconds, relative.
        loss_bytes: what the loss has alive at its fullest moment, beside the outputs and their gradient.
    """

    cells: tuple[CellProfile, ...]
    value_bytes: dict[str, int]
    uncertainty: float = 0.0
    loss_bytes: int = 0

    @property
    def seconds(self) -> float:
        """One micro-batch's forward and backward through all cells."""
        return sum(cell.seconds for cell in self.cells)

    def times(self, factor: int) -> Profile:
        """Of a micro-batch with so many times the cases."""
        if factor == 1:
            return self
        cells = [
            cell._replace(
                forward_seconds=cell.forward_seconds * factor,
                backward_seconds=cell.backward_seconds * factor,
                weight_seconds=cell.weight_seconds * factor,
                internal_bytes=cell.internal_bytes * factor,
                deferred_bytes=cell.deferred_bytes * factor,
                workspace_bytes=cell.workspace_bytes * factor,
                exchanged_bytes=cell.exchanged_bytes * factor,
            )
            for cell in self.cells
        ]
        value_bytes = {name: size * factor for name, size in self.value_bytes.items()}
        return replace(self, cells=tuple(cells), value_bytes=value_bytes, loss_bytes=self.loss_bytes * factor)

    def with_loss(self, cost: LossCost) -> Profile:
        """With a loss: its seconds are the last cell's, before whose backward it is computed."""
        *cells, last = self.cells
        last = last._replace(backward_seconds=last.backward_seconds + cost.seconds)
        return replace(self, cells=(*cells, last), loss_bytes=cost.extra_bytes)


def profile_of(work: Work, timing: Timing) -> Profile:
    """What is known of the cells' bytes and of their seconds, together."""
    cells = [
        CellProfile(
            name=cell.name,
            forward_seconds=seconds.forward,
            backward_seconds=seconds.backward,
            weight_seconds=seconds.weight,
            internal_bytes=cell.internal_bytes,
            saved_values=cell.saved_values,
            parameter_bytes=cell.parameter_bytes,
            deferred_bytes=cell.deferred_bytes,
            deferred_values=cell.deferred_values,
            workspace_bytes=cell.workspace_bytes,
        )
        for cell, seconds in zip(work.cells, timing.cells, strict=True)
    ]
    return Profile(tuple(cells), work.value_bytes, timing.uncertainty)


def model_cells(work: Work, hardware: Hardware, precision: str, times: float = 1.0) -> Timing:
    """The seconds of cells on a device that is only described: operation by operation, arithmetic or memory.

    The host issues operations ahead of the device, which waits for it where it is the faster one.

    Args:
        work: what the cells do.
        hardware: the device.
        precision: ``"fp32"`` or ``"bf16"``.
        times: as many cases at once as the cells are known for.
    """

    def total(operations: Sequence[Operation]) -> float:
        device = sum(hardware.seconds(times * op.flops, times * op.moved, precision, op.channels) for op in operations)
        return max(device, len(operations) * hardware.host_seconds)

    return Timing(tuple(CellSeconds(total(c.forward), total(c.backward), total(c.weight)) for c in work.cells))


def scale_timing(timings: Sequence[tuple[Timing, Work]], wanted: Work) -> Timing:
    """The seconds of smaller volumes' cells, brought to what the wanted volume's cells have to do.

    Convolutions count by their arithmetic, all other cells by the bytes that they read and write. From two volumes, the
    line through both; from one, in proportion.

    Args:
        timings: of one volume or two, the smaller one first, and what their cells do.
        wanted: what the wanted volume's cells do.
    """
    timing, work = timings[-1]
    cells = []
    for index, (seconds, large) in enumerate(zip(timing.cells, wanted.cells, strict=True)):
        by_flops = any(operation.flops for operation in large.forward)
        amount, wanted_amount = (_amount(cell, by_flops) for cell in (work.cells[index], large))
        factor = wanted_amount / amount if amount else 1.0
        if len(timings) > 1:
            before, less = timings[0][0].cells[index], _amount(timings[0][1].cells[index], by_flops)
            if amount > less and (now := seconds.forward + seconds.backward) > 0:
                slope = max(0.0, now - before.forward - before.backward) / (amount - less)
                factor = min(factor, (now + slope * (wanted_amount - amount)) / now)
        cells.append(CellSeconds(seconds.forward * factor, seconds.backward * factor, seconds.weight * factor))
    return Timing(tuple(cells), timing.uncertainty)


def _amount(cell: CellWork, by_flops: bool) -> int:
    return sum(op.flops if by_flops else op.moved for op in (*cell.forward, *cell.backward))
