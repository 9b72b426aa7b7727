"""The best cut of a network for a schedule: where its stages begin, under a memory limit."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from lamp3d.plan.costs import StageCosts, runs
from lamp3d.plan.partition import Matrix, fold, minimise_largest, minimise_sum
from lamp3d.plan.schedule import PLACEMENTS, SCHEDULES, Actions, StageTimes, folded_placement, most_in_flight
from lamp3d.plan.simulate import DeviceMemory, memory_use

TOLERANCE = 1.02
"""Cuts whose slowest rank is within this factor of the best count as equally fast; the fewest bytes sent decide."""


def best_cut(costs: StageCosts, schedule: str, devices: int, limit: int | None) -> list[int] | None:
    """First cells of the stages: least slowest rank, then (within TOLERANCE) fewest bytes; None if none fits.

    The search bounds a rank's memory from above; the cut that it finds is then played through with the schedule.
    """
    bound = math.inf if limit is None else float(limit)
    for _ in range(4):
        starts = _search(costs, schedule, devices, bound)
        if starts is None or limit is None:
            return starts
        peak = _peak(costs, schedule, devices, starts)
        if peak <= limit:
            return starts
        bound *= 0.98 * limit / peak  # the schedule holds more of stages of unequal length than the search supposed
    return None


def least_memory(costs: StageCosts, schedule: str, devices: int) -> int | None:
    """The smallest limit, to a thousandth, under which a cut is found; None if there are too few cells."""
    starts = best_cut(costs, schedule, devices, None)
    if starts is None:
        return None
    low, high = 0, _peak(costs, schedule, devices, starts)
    while high - low > high // 1000:
        middle = (low + high) // 2
        found = best_cut(costs, schedule, devices, middle)
        if found is None:
            low = middle
        else:
            high = _peak(costs, schedule, devices, found)
    return high


def _peak(costs: StageCosts, schedule: str, devices: int, starts: list[int]) -> int:
    return max(use.peak_bytes for use in memory_of(costs, schedule, devices, starts))


def actions_of(costs: StageCosts, schedule: str, devices: int, starts: list[int]) -> Actions:
    """Every rank's actions for a cut, by the stages' measured seconds."""
    stages = [
        StageTimes(rank, costs.forward_seconds(*run), costs.backward_seconds(*run), costs.weight_seconds(*run))
        for rank, run in zip(PLACEMENTS[schedule](devices), runs(starts, len(costs.profile.cells)), strict=True)
    ]
    return SCHEDULES[schedule](stages, costs.micro_batches)


def memory_of(costs: StageCosts, schedule: str, devices: int, starts: list[int]) -> list[DeviceMemory]:
    """Memory of every rank, the mini-batch played through."""
    bounds = list(runs(starts, len(costs.profile.cells)))
    return memory_use(
        actions_of(costs, schedule, devices, starts),
        held=[costs.held(*run) for run in bounds],
        deferred=[costs.deferred(*run) for run in bounds],
        static=[costs.static_bytes(*run) for run in bounds],
        again=[costs.again_bytes(*run) for run in bounds],
    )


def _search(costs: StageCosts, schedule: str, devices: int, bound: float) -> list[int] | None:
    n, ranks = len(costs.profile.cells), PLACEMENTS[schedule](devices)
    if len(ranks) > n:
        return None
    flights = most_in_flight(SCHEDULES[schedule]([StageTimes(rank) for rank in ranks], costs.micro_batches))
    if len(ranks) > devices and ranks == folded_placement(devices):
        # A rank's two runs may hold the same skips, so that its memory is at most the sum of theirs.
        sizes = [_matrix(n, lambda i, j, m=flights[rank]: costs.peak_bytes(i, j, m)) for rank in range(devices)]  # type: ignore[misc]
        return fold(_matrix(n, costs.seconds), sizes, bound, _matrix(n, costs.exchanged_bytes), TOLERANCE)
    share = bound * devices / len(ranks)  # a rank with several runs: equal parts, enough though not all that could be

    def fits(i: int, j: int, stage: int) -> bool:
        return costs.peak_bytes(i, j, flights[stage]) <= share

    fastest = minimise_largest(n, len(ranks), costs.seconds, fits)
    if fastest is None:
        return None
    slowest = TOLERANCE * max(costs.seconds(i, j) for i, j in runs(fastest, n))
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
