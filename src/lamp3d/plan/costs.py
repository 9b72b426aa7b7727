"""Seconds and bytes of any contiguous run of cells, from the profile, and the best cut by them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lamp3d.graph import CellGraph
from lamp3d.plan.partition import minimise_largest, minimise_sum
from lamp3d.plan.plan import Recompute
from lamp3d.plan.profile import Profile

OPTIMIZER_COPIES = 2
"""Optimizer state in units of the parameters (AdamW's two moments; RMSProp has one)."""

TOLERANCE = 1.02
"""Cuts whose slowest stage is within this factor of the best count as equally fast; the fewest bytes sent decide."""


@dataclass
class StageCosts:
    """Seconds and bytes of any contiguous run of cells, and the best cut by them."""

    graph: CellGraph
    profile: Profile
    micro_batches: int
    recompute: Recompute

    def __post_init__(self) -> None:
        self._maker = {edge.value: edge.maker for edge in self.graph.edges}
        self._users = {edge.value: edge.users for edge in self.graph.edges}
        self.peak_bytes = functools.cache(self._peak_bytes)
        self.seconds = functools.cache(self._seconds)

    def forward_seconds(self, begin: int, end: int) -> float:
        """One micro-batch's forward through the cells begin … end-1."""
        return sum(cell.forward_seconds for cell in self.profile.cells[begin:end])

    def backward_seconds(self, begin: int, end: int) -> float:
        """One micro-batch's backward, the second forward of recomputation included."""
        again = self.forward_seconds(begin, end) if self.recompute == "always" else 0.0
        return again + sum(cell.backward_seconds for cell in self.profile.cells[begin:end])

    def _seconds(self, begin: int, end: int) -> float:
        return self.forward_seconds(begin, end) + self.backward_seconds(begin, end)

    def received(self, begin: int, end: int) -> list[str]:
        """The values that a stage of these cells gets from earlier ones."""
        return [
            value
            for value, maker in self._maker.items()
            if maker < begin and any(begin <= user < end for user in self._users[value])
        ]

    def parameter_bytes(self, begin: int, end: int) -> int:
        """Bytes of the parameters alone."""
        return sum(cell.parameter_bytes for cell in self.profile.cells[begin:end])

    def _peak_bytes(self, begin: int, end: int) -> int:
        cells = self.profile.cells[begin:end]
        size = self.profile.value_bytes
        received = set(self.received(begin, end))
        saved = set().union(*(cell.saved_values for cell in cells)) | received
        one = sum(cell.internal_bytes for cell in cells) + sum(size[value] for value in saved)
        kept = sum(size[value] for value in received)
        in_flight = self.micro_batches * one if self.recompute == "never" else self.micro_batches * kept + one
        return self.parameter_bytes(begin, end) * (2 + OPTIMIZER_COPIES) + in_flight

    def crossing_bytes(self, cell: int) -> int:
        """Bytes of the values alive just before ``cell``: what one more cut there would send, forward only."""
        return sum(
            self.profile.value_bytes[value]
            for value, maker in self._maker.items()
            if maker < cell <= self._users[value][-1]
        )

    def best_cut(self, stages: int, limit: int | None) -> list[int] | None:
        """First cells of the stages: least slowest stage, then (within TOLERANCE) fewest bytes; None if none fits."""
        n = len(self.profile.cells)

        def fits(i: int, j: int) -> bool:
            return limit is None or self.peak_bytes(i, j) <= limit

        fastest = minimise_largest(n, stages, self.seconds, fits)
        if fastest is None:
            return None
        bound = TOLERANCE * max(self.seconds(i, j) for i, j in runs(fastest, n))
        return minimise_sum(
            n, stages, lambda i, _: self.crossing_bytes(i), lambda i, j: fits(i, j) and self.seconds(i, j) <= bound
        )

    def fits(self, stages: int, limit: int) -> bool:
        """Whether any cut into ``stages`` keeps every device within the limit."""
        memory = self.least_memory(stages)
        return memory is not None and memory <= limit

    def least_memory(self, stages: int) -> int | None:
        """The smallest limit that ``stages`` devices could do with."""
        n = len(self.profile.cells)
        starts = minimise_largest(n, stages, self.peak_bytes, lambda i, j: True)
        return None if starts is None else max(self.peak_bytes(i, j) for i, j in runs(starts, n))


def runs(starts: Sequence[int], n_cells: int) -> Iterator[tuple[int, int]]:
    """The (first, last + 1) cells of the stages that begin at ``starts``."""
    return zip(starts, [*starts[1:], n_cells], strict=True)
