"""Exact partitions of a sequence into runs: dynamic programming, no heuristics and no torch.

Two kinds. *Contiguous*: K runs, one after the other. ``cost(i, j)`` is what a stage of the items i … j-1 costs,
``fits(i, j, k)`` whether device k can hold it; both are asked at most K times for every pair, so a partition of n items
takes O(K n²) steps. *Folded*: K ranks of which the outer ones have a run at either end and the innermost what is left;
O(K n⁴) steps, all but n² of them inside numpy.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Segment = Callable[[int, int], float]
Fits = Callable[[int, int, int], bool]
Matrix = NDArray[np.float64]


def minimise_largest(n_items: int, stages: int, cost: Segment, fits: Fits) -> list[int] | None:
    """Cut ``range(n_items)`` into ``stages`` non-empty runs that all fit, such that the largest cost is least.

    Returns:
        the first item of every stage, or None when no such cut exists.
    """
    return _dynamic_program(n_items, stages, lambda i, j, k: cost(i, j) if fits(i, j, k) else math.inf, max)


def minimise_sum(n_items: int, stages: int, cost: Segment, fits: Fits) -> list[int] | None:
    """The same with the least sum of costs (used to break ties, e.g. by the bytes that cross)."""
    return _dynamic_program(n_items, stages, lambda i, j, k: cost(i, j) if fits(i, j, k) else math.inf, operator.add)


def _dynamic_program(
    n_items: int, stages: int, cost: Callable[[int, int, int], float], join: Callable[[float, float], float]
) -> list[int] | None:
    if not 1 <= stages <= n_items:
        return None
    # best[j]: the best value for the first j items in k stages; cut[k][j]: where the last of these stages begins.
    best = [math.inf] + [cost(0, j, 0) for j in range(1, n_items + 1)]
    cuts: list[list[int]] = []
    for k in range(2, stages + 1):
        row, cut = [math.inf] * (n_items + 1), [0] * (n_items + 1)
        for j in range(k, n_items + 1):
            for i in range(j - 1, k - 2, -1):
                if best[i] < row[j] and (value := join(best[i], cost(i, j, k - 1))) < row[j]:
                    row[j], cut[j] = value, i
        best = row
        cuts.append(cut)
    if math.isinf(best[n_items]):
        return None
    starts = [n_items]
    for cut in reversed(cuts):
        starts.append(cut[starts[-1]])
    return [0, *reversed(starts[1:])]


def fold(cost: Matrix, sizes: Sequence[Matrix], limit: float, crossing: Matrix, tolerance: float) -> list[int] | None:
    """Cut n items into 2 K - 1 non-empty runs of which rank k has number k and number 2 K - 2 - k.

    Among the cuts whose largest rank's cost is within ``tolerance`` (a factor) of the least, the one with the least
    crossing.

    Args:
        cost: ``cost[i, j]`` of the run i … j-1, (n + 1, n + 1); a rank's is the sum of its runs'.
        sizes: the same for the memory of each rank's runs.
        limit: of a rank's memory.
        crossing: ``crossing[i, j]``: what passes between the run i … j-1 and the items outside it.
        tolerance: at least 1.

    Returns:
        the first item of every run, or None when no cut fits.
    """
    n, ranks = len(cost) - 1, len(sizes)
    if n < 2 * ranks - 1:
        return None
    fastest = _fold(n, ranks, cost, sizes, limit, math.inf, None)
    if fastest is None:
        return None
    bounds = [*fastest, n]
    runs = [cost[a, b] for a, b in itertools.pairwise(bounds)]
    largest = max(runs[rank] + (runs[-1 - rank] if rank < ranks - 1 else 0.0) for rank in range(ranks))
    return _fold(n, ranks, cost, sizes, limit, largest * tolerance, crossing)


def _fold(
    n: int, ranks: int, cost: Matrix, sizes: Sequence[Matrix], limit: float, bound: float, crossing: Matrix | None
) -> list[int] | None:
    """The nested cut with the least largest cost, or with the least sum of ``crossing`` if that is given."""
    # best[i, j]: the best value for the items i … j-1 on the ranks from k on; inner[k][i, j]: what rank k leaves.
    best = np.full((n + 1, n + 1), math.inf)
    allowed = (cost <= bound) & (sizes[-1] <= limit) & _pairs(n)
    best[allowed] = cost[allowed] if crossing is None else 0.0
    inner: list[NDArray[np.int64]] = []
    for rank in range(ranks - 2, -1, -1):
        outer, left = np.full((n + 1, n + 1), math.inf), np.zeros((n + 1, n + 1, 2), dtype=np.int64)
        for i in range(n):
            for j in range(i + 3, n + 1) if rank else (n,):
                a, b = slice(i + 1, j - 1), slice(i + 2, j)  # the inner run's ends
                own = cost[i, a, None] + cost[None, b, j]
                held = sizes[rank][i, a, None] + sizes[rank][None, b, j]
                value = np.maximum(own, best[a, b]) if crossing is None else crossing[a, b] + best[a, b]
                value = np.where((own <= bound) & (held <= limit), value, math.inf)
                where = int(value.argmin())
                row, column = divmod(where, value.shape[1])
                if value[row, column] < math.inf:
                    outer[i, j], left[i, j] = value[row, column], (i + 1 + row, i + 2 + column)
            if not rank:
                break  # the outermost rank begins at the first item
        best = outer
        inner.insert(0, left)
    if math.isinf(best[0, n]):
        return None
    i, j = 0, n
    front: list[int] = [0]
    back: list[int] = []
    for left in inner:
        i, j = (int(end) for end in left[i, j])
        front.append(i)
        back.insert(0, j)
    return front + back


def _pairs(n: int) -> NDArray[np.bool_]:
    """Where i < j."""
    return np.triu(np.ones((n + 1, n + 1), dtype=bool), 1)
