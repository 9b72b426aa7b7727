"""The best cut of a network for a schedule: where its stages begin, under a memory limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lamp3d.plan.costs import StageCosts, runs
from lamp3d.plan.memory import DeviceMemory, StageBytes, memory_use
from lamp3d.plan.partition import Matrix, fold, minimise_largest, minimise_sum
from lamp3d.plan.routes import Routes
from lamp3d.plan.schedule import PLACEMENTS, SCHEDULES, Actions, StageTimes, folded_placement, most_in_flight
from lamp3d.plan.simulate import TimeLine, simulate

TOLERANCES = (1.0, 1.02, 1.05, 1.1, 1.2, 1.4, 1.7)
"""How much slower than the least possible the slowest rank may be, for the sake of fewer bytes sent: all are tried."""


@dataclass(frozen=True)
class Cut:
    """A network cut for a schedule, and what a mini-batch comes to, played through on paper.

    Args:
        costs: of the network's cells.
        schedule: its name.
        devices: K.
        starts: the first cell of every stage.
    """

    costs: StageCosts
    schedule: str
    devices: int
    starts: list[int]

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """The (first, last + 1) cells of every stage."""
        return list(runs(self.starts, len(self.costs.profile.cells)))

    @cached_property
    def ranks(self) -> list[int]:
        """The rank of every stage."""
        return PLACEMENTS[self.schedule](self.devices)

    @cached_property
    def line(self) -> TimeLine:
        """The time line of a step."""
        return simulate(self._actions, self._times)

    @cached_property
    def memory(self) -> list[DeviceMemory]:
        """What every rank holds."""
        costs = self.costs
        edges = costs.graph.stage_edges(self.starts)
        values = set(costs.profile.value_bytes) - set(costs.graph.inputs)
        return memory_use(
            self.line,
            Routes(edges, self.ranks, self._actions, [values] * costs.micro_batches),
            edges,
            self.ranks,
            costs.profile.value_bytes,
            [
                StageBytes(costs.held(*run), costs.deferred(*run), costs.static_bytes(*run), costs.again_bytes(*run))
                for run in self.bounds
            ],
        )

    @property
    def peak_bytes(self) -> int:
        """Peak memory of the fullest rank."""
        return max(device.peak_bytes for device in self.memory)

    @cached_property
    def sent_bytes(self) -> list[int]:
        """Bytes of values and gradients that leave each stage for other ranks in one mini-batch."""
        sent = [0] * len(self.starts)
        for edge in self.costs.graph.stage_edges(self.starts):
            size = self.costs.profile.value_bytes.get(edge.value, 0) * self.costs.micro_batches
            for rank in {self.ranks[user] for user in edge.users} - {self.ranks[edge.maker]}:
                sent[edge.maker] += size
                if edge.value not in self.costs.graph.inputs:  # the gradient goes back once, with the rank's last user
                    sent[min(user for user in edge.users if self.ranks[user] == rank)] += size
        return sent

    @cached_property
    def _times(self) -> list[StageTimes]:
        costs = self.costs
        return [
            StageTimes(rank, costs.forward_seconds(*run), costs.backward_seconds(*run), costs.weight_seconds(*run))
            for rank, run in zip(self.ranks, self.bounds, strict=True)
        ]

    @cached_property
    def _actions(self) -> Actions:
        return SCHEDULES[self.schedule](self._times, self.costs.micro_batches)


def best_cut(costs: StageCosts, schedule: str, devices: int, limit: int | None, link: float) -> Cut | None:
    """The cut with the fastest step; None if no cut fits.

    For each tolerance there is the cut with the fewest bytes sent among those whose slowest rank is within it of the
    least possible. All of them are played through with the schedule. What they send counts as if nothing were done
    meanwhile: on a CPU sending is work for the cores that compute, and elsewhere it decides between equals.

    Args:
        costs: of the network's cells.
        schedule: its name.
        devices: K.
        limit: of every rank's memory, in bytes.
        link: bytes per second between two devices.
    """
    cuts = []
    for tolerance in TOLERANCES:
        cut = fitting_cut(costs, schedule, devices, limit, tolerance)
        if cut is None:
            break  # a larger tolerance changes nothing about what fits
        cuts.append(cut)
    return min(cuts, key=lambda cut: cut.line.seconds + sum(cut.sent_bytes) / link, default=None)


def fitting_cut(
    costs: StageCosts, schedule: str, devices: int, limit: int | None, tolerance: float = 1.0
) -> Cut | None:
    """A cut that fits; its slowest rank is within a factor ``tolerance`` of the least possible; None if none fits.

    The search bounds a rank's memory from above; what it finds is then played through.
    """
    bound = math.inf if limit is None else float(limit)
    for _ in range(4):
        starts = _search(costs, schedule, devices, bound, tolerance)
        if starts is None:
            return None
        cut = Cut(costs, schedule, devices, starts)
        if limit is None or cut.peak_bytes <= limit:
            return cut
        bound *= 0.98 * limit / cut.peak_bytes  # unequal stages: more in flight than the search supposed
    return None


def least_memory(costs: StageCosts, schedule: str, devices: int) -> int | None:
    """The smallest limit, to a thousandth, under which a cut is found; None if there are too few cells."""
    cut = fitting_cut(costs, schedule, devices, None)
    if cut is None:
        return None
    low, high = 0, cut.peak_bytes
    while high - low > high // 1000:
        middle = (low + high) // 2
        found = fitting_cut(costs, schedule, devices, middle)
        if found is None:
            low = middle
        else:
            high = found.peak_bytes
    return high


def _search(costs: StageCosts, schedule: str, devices: int, bound: float, tolerance: float) -> list[int] | None:
    n, ranks = len(costs.profile.cells), PLACEMENTS[schedule](devices)
    if len(ranks) > n:
        return None
    flights = most_in_flight(SCHEDULES[schedule]([StageTimes(rank) for rank in ranks], costs.micro_batches))
    if len(ranks) > devices and ranks == folded_placement(devices):
        # A rank's two runs may hold the same skips, so that its memory is at most the sum of theirs.
        sizes = [_matrix(n, lambda i, j, m=flights[rank]: costs.peak_bytes(i, j, m)) for rank in range(devices)]  # type: ignore[misc]
        return fold(_matrix(n, costs.seconds), sizes, bound, _matrix(n, costs.exchanged_bytes), tolerance)
    share = bound * devices / len(ranks)  # a rank with several runs: equal parts, enough though not all that could be

    def fits(i: int, j: int, stage: int) -> bool:
        return costs.peak_bytes(i, j, flights[stage]) <= share

    fastest = minimise_largest(n, len(ranks), costs.seconds, fits)
    if fastest is None:
        return None
    slowest = tolerance * max(costs.seconds(i, j) for i, j in runs(fastest, n))
    return minimise_sum(
        n,
        len(ranks),
        lambda i, _: costs.crossing_bytes(i),
        lambda i, j, stage: fits(i, j, stage) and costs.seconds(i, j) <= slowest,
    )


def _matrix(n: int, of: Callable[[int, int], float]) -> Matrix:
    matrix = np.zeros((n + 1, n + 1))
    for i in range(n):
        for j in range(i + 1, n + 1):
            matrix[i, j] = of(i, j)
    return matrix
