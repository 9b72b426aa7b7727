"""The dynamic program behind a cut: what a schedule asks of the stages, as a partition of the network's cells."""

from __future__ import annotations

import functools
from functools import cached_property

import numpy as np

from lamp3d.plan.costs import StageCosts, runs
from lamp3d.plan.partition import Mask, Matrix, fold_largest, fold_sum, joined, minimise_largest, minimise_sum, pairs
from lamp3d.plan.schedule import PLACEMENTS, SCHEDULES, StageTimes, folded_placement, most_in_flight

MOST_FOLDED_CELLS = 64
"""A longer network's cells are joined, the shortest first, before it is folded; what is found is then improved."""


@functools.cache
def _flights(schedule: str, devices: int, micro_batches: int) -> list[int]:
    """How many micro-batches each stage holds at most, if all take equally long."""
    stages = [StageTimes(rank) for rank in PLACEMENTS[schedule](devices)]
    return most_in_flight(SCHEDULES[schedule](stages, micro_batches))


class CutProgram:
    """The dynamic program that cuts a network for a schedule.

    Args:
        costs: of the network's cells.
        schedule: its name.
        devices: K.

    Attributes:
        is_exact: whether it is ranks that it looks at, and not stages of which a rank has several.
    """

    def __init__(self, costs: StageCosts, schedule: str, devices: int):
        self.devices = devices
        self._ranks = PLACEMENTS[schedule](devices)
        self._folded = len(self._ranks) > devices and self._ranks == folded_placement(devices)
        self.is_exact = self._folded or len(self._ranks) == devices
        flights = _flights(schedule, devices, costs.micro_batches)
        # Where stages may begin: where the network is folded, not before every cell of a long one.
        n = len(costs.seconds)
        self._joints = joined(costs.seconds, MOST_FOLDED_CELLS) if self._folded else np.arange(n)
        self._seconds = self._at_joints(costs.seconds)
        # Of a run: what it exchanges with all others, or what crosses where it begins.
        self._crossing = self._at_joints(
            costs.exchanged if self._folded else np.repeat(costs.crossing[:, None], n, axis=1)
        )
        # A rank's two runs may hold the same skips, so that its memory is at most the sum of theirs.
        sizes = [costs.peak(flight) for flight in (flights[:devices] if self._folded else flights)]
        self._sizes = [self._at_joints(size) for size in sizes]
        self._slowest = functools.cache(self._find_slowest)

    def cut(self, bound: float, tolerance: float) -> list[int] | None:
        """The fewest bytes sent, with the slowest rank within a factor ``tolerance`` of the least possible.

        Args:
            bound: of a rank's memory.
            tolerance: at least 1.
        """
        if (slowest := self._slowest(bound)) is None:
            return None
        most = slowest * tolerance * (1 + 1e-12)
        if self._folded:
            starts = fold_sum(self._seconds, self._sizes, bound, self._crossing, most)
        else:
            starts = minimise_sum(self._crossing, [mask & (self._seconds <= most) for mask in self._fits(bound)])
        return None if starts is None else [int(self._joints[start]) for start in starts]

    @cached_property
    def smallest(self) -> list[int] | None:
        """The cut under the least bound of memory, whatever its seconds."""
        sizes = [*self._sizes, *self._sizes[-2::-1]] if self._folded else self._sizes
        starts = minimise_largest(sizes, [pairs(len(self._joints) - 1)] * len(sizes))
        return None if starts is None else [int(self._joints[start]) for start in starts]

    def _find_slowest(self, bound: float) -> float | None:
        if self._folded:
            starts = fold_largest(self._seconds, self._sizes, bound)
        else:
            starts = minimise_largest(self._seconds, self._fits(bound))
        if starts is None:
            return None
        of_rank = [0.0] * self.devices
        for rank, run in zip(self._ranks, runs(starts, len(self._seconds) - 1), strict=True):
            together = of_rank[rank] + self._seconds[run]
            of_rank[rank] = together if self._folded else max(of_rank[rank], self._seconds[run])
        return max(of_rank)

    def _at_joints(self, matrix: Matrix) -> Matrix:
        return matrix[np.ix_(self._joints, self._joints)]

    def _fits(self, bound: float) -> list[Mask]:
        # A rank with several runs: equal parts, enough though not all that could be.
        share = bound * self.devices / len(self._ranks)
        return [size <= share for size in self._sizes]
