"""An integer program (HiGHS) for placements that no dynamic program of ours fits: ranks whose runs lie anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from lamp3d.plan.partition import Matrix, pairs

SECONDS = 1.0
"""After which the best cut found so far is taken; what it may be away from the best is known."""


@dataclass(frozen=True)
class IntegerCut:
    """A cut, and how far its largest rank may be from the least possible, relative (0: it is the least)."""

    starts: list[int]
    gap: float


def minimise_largest_rank(
    cost: Matrix, ranks: Sequence[int], sizes: Sequence[Matrix], limit: float, seconds: float = SECONDS
) -> IntegerCut | None:
    """Cut n items into runs, one for each entry of ``ranks``, such that the largest rank's cost is least.

    There is a 0-1 variable for every stage and run; consecutive stages' runs must meet, which makes them a path.

    Args:
        cost: of every run, (n + 1, n + 1); a rank's is the sum of its runs'.
        ranks: the rank of every stage.
        sizes: for each stage, the memory of every run; a rank's is the sum of its runs'.
        limit: of a rank's memory.
        seconds: to search for.

    Returns:
        None where no cut fits, or none was found in time.
    """
    n, stages, devices = len(cost) - 1, len(ranks), 1 + max(ranks)
    if n < stages:
        return None
    every = [
        (stage, i, j)
        for stage in range(stages)
        for i, j in np.argwhere(pairs(n)).tolist()
        # Room for the stages before and behind.
        if (i == 0) == (stage == 0) and (j == n) == (stage == stages - 1) and i >= stage and n - j >= stages - 1 - stage
    ]
    largest = len(every)  # the last variable: the largest rank's cost
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    low: list[float] = []
    high: list[float] = []

    def constrain(terms: Sequence[tuple[int, float]], least: float, most: float) -> None:
        rows.extend([len(low)] * len(terms))
        columns.extend(column for column, _ in terms)
        values.extend(value for _, value in terms)
        low.append(least)
        high.append(most)

    constrain([(index, 1.0) for index, (stage, *_) in enumerate(every) if stage == 0], 1, 1)
    ends: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for index, (stage, i, j) in enumerate(every):
        ends.setdefault((stage, j), []).append((index, 1.0))
        ends.setdefault((stage - 1, i), []).append((index, -1.0))
    for (stage, place), terms in ends.items():
        if 0 <= stage < stages - 1 and 0 < place < n:
            constrain(terms, 0, 0)
    for rank in range(devices):
        own = [(index, stage, i, j) for index, (stage, i, j) in enumerate(every) if ranks[stage] == rank]
        constrain([*((index, cost[i, j]) for index, _, i, j in own), (largest, -1.0)], -math.inf, 0)
        if math.isfinite(limit):
            constrain([(index, sizes[stage][i, j] / limit) for index, stage, i, j in own], -math.inf, 1)
    found = milp(
        c=[0.0] * largest + [1.0],
        constraints=LinearConstraint(
            coo_array((values, (rows, columns)), shape=(len(low), largest + 1)).tocsr(), low, high
        ),
        bounds=Bounds(0, [1.0] * largest + [math.inf]),
        integrality=[1] * largest + [0],
        options={"time_limit": seconds, "mip_rel_gap": 1e-6},
    )
    if found.x is None:
        return None
    chosen = sorted(every[index] for index in np.flatnonzero(found.x[:-1] > 0.5))
    return IntegerCut([i for _, i, _ in chosen], float(found.mip_gap or 0.0))
