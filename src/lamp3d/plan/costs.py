"""Seconds and bytes of any contiguous run of cells, from the profile."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from lamp3d.graph import CellGraph
from lamp3d.plan.plan import Recompute, recomputes
from lamp3d.plan.profile import Profile

OPTIMIZER_COPIES = 2
"""Optimizer state in units of the parameters (AdamW's two moments; RMSProp has one)."""

Held = dict[str, int]
"""Bytes by name. A value has the same name wherever it is held, so that a rank that holds it twice pays once."""


@dataclass
class StageCosts:
    """Seconds and bytes of any contiguous run of cells.

    Args:
        graph: the cells.
        profile: what each of them costs for one micro-batch.
        micro_batches: M.
        recompute: "never", "always", or the names of the cells that are computed again in backward.
    """

    graph: CellGraph
    profile: Profile
    micro_batches: int
    recompute: Recompute

    def __post_init__(self) -> None:
        self._maker = {edge.value: edge.maker for edge in self.graph.edges}
        self._users = {edge.value: edge.users for edge in self.graph.edges}
        self._again = [recomputes(self.recompute, cell.name) for cell in self.graph.cells]
        self.seconds = functools.cache(self._seconds)
        self.held = functools.cache(self._held)

    def forward_seconds(self, begin: int, end: int) -> float:
        """One micro-batch's forward through the cells begin … end-1."""
        return sum(cell.forward_seconds for cell in self.profile.cells[begin:end])

    def backward_seconds(self, begin: int, end: int) -> float:
        """One micro-batch's backward, the second forward of recomputation included."""
        cells = zip(self.profile.cells[begin:end], self._again[begin:end], strict=True)
        return sum(cell.backward_seconds + (cell.forward_seconds if again else 0.0) for cell, again in cells)

    def weight_seconds(self, begin: int, end: int) -> float:
        """The part of the backward that may be computed apart."""
        return sum(cell.weight_seconds for cell in self.profile.cells[begin:end])

    def _seconds(self, begin: int, end: int) -> float:
        return self.forward_seconds(begin, end) + self.backward_seconds(begin, end)

    def received(self, begin: int, end: int) -> list[str]:
        """The values that a run of cells gets from earlier ones."""
        return [
            value
            for value, maker in self._maker.items()
            if maker < begin and any(begin <= user < end for user in self._users[value])
        ]

    def parameter_bytes(self, begin: int, end: int) -> int:
        """Bytes of the parameters alone."""
        return sum(cell.parameter_bytes for cell in self.profile.cells[begin:end])

    def static_bytes(self, begin: int, end: int) -> int:
        """What is needed whatever is in flight: parameters, gradients, optimizer state, and at the end the loss."""
        loss = self.loss_bytes() if end == len(self.profile.cells) else 0
        return self.parameter_bytes(begin, end) * (2 + OPTIMIZER_COPIES) + loss

    def loss_bytes(self) -> int:
        """What the loss holds beside the outputs: the whole mini-batch's, joined, and their gradient."""
        outputs = self.micro_batches * sum(self.profile.value_bytes[value] for value in self.graph.outputs)
        return outputs * (2 if self.micro_batches > 1 else 1)

    def _held(self, begin: int, end: int) -> Held:
        """What one micro-batch holds between its forward and its backward."""
        held: Held = {}
        for first, last, again in self._parts(begin, end):
            held |= self._values([*self.received(first, last)]) if again else self._saved(first, last)
        if end == len(self.profile.cells):
            held |= self._values(self.graph.outputs)  # until the loss has seen them
        return held | self._values(self.received(begin, end))

    def again_bytes(self, begin: int, end: int) -> int:
        """What the backward of one micro-batch brings back for as long as it runs: its largest recomputed part."""
        held = self.held(begin, end)
        return max(
            (
                sum(size for name, size in self._saved(first, last).items() if name not in held)
                for first, last, again in self._parts(begin, end)
                if again
            ),
            default=0,
        )

    def deferred(self, begin: int, end: int) -> Held:
        """What one micro-batch holds between the two parts of a split backward."""
        held: Held = {}
        for cell in self.profile.cells[begin:end]:
            held |= {f"{cell.name}, deferred": cell.deferred_bytes} | self._values(cell.deferred_values)
        return held

    def _saved(self, begin: int, end: int) -> Held:
        cells = self.profile.cells[begin:end]
        held = self._values([value for cell in cells for value in cell.saved_values])
        return held | {f"{cell.name}, saved": cell.internal_bytes for cell in cells}

    def _values(self, values: Collection[str]) -> Held:
        return {value: self.profile.value_bytes[value] for value in values}

    def _parts(self, begin: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """A run's cells in runs that are, or are not, computed again."""
        first = begin
        for cell in range(begin + 1, end + 1):
            if cell == end or self._again[cell] != self._again[first]:
                yield first, cell, self._again[first]
                first = cell

    def peak_bytes(self, begin: int, end: int, in_flight: int) -> int:
        """Peak memory of a run of cells with so many micro-batches in flight, if its rank has no other runs."""
        flight = in_flight * sum(self.held(begin, end).values()) + self.again_bytes(begin, end)
        return self.static_bytes(begin, end) + flight

    def crossing_bytes(self, cell: int) -> int:
        """Bytes of the values alive just before ``cell``: what one more cut there would send, forward only."""
        return sum(
            self.profile.value_bytes[value]
            for value, maker in self._maker.items()
            if maker < cell <= self._users[value][-1]
        )

    def exchanged_bytes(self, begin: int, end: int) -> int:
        """Bytes of the values that pass between the cells begin … end-1 and all others, forward only."""
        return sum(
            self.profile.value_bytes[value]
            for value, maker in self._maker.items()
            if len({begin <= cell < end for cell in (max(maker, 0), *self._users[value])}) == 2
        )


def runs(starts: Sequence[int], n_cells: int) -> Iterator[tuple[int, int]]:
    """The (first, last + 1) cells of the stages that begin at ``starts``."""
    return zip(starts, [*starts[1:], n_cells], strict=True)
