"""Exact partitions of a sequence into runs: dynamic programming, no heuristics and no torch.

Two kinds. *Contiguous*: K runs, one after the other, O(K n²) steps inside numpy. *Folded*: K ranks of which the outer
ones have a run at either end and the innermost what is left; O(K n⁴) steps, all but n² of them inside numpy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
"""``m[i, j]``: something about the run of items i … j-1, for 0 <= i < j <= n."""

Mask = NDArray[np.bool_]


def minimise_largest(cost: Matrix, allowed: Sequence[Mask]) -> list[int] | None:
    """Cut n items into as many non-empty runs as there are masks, such that the largest cost is least.

    Args:
        cost: of every run, (n + 1, n + 1).
        allowed: for each run in turn, which ones it may be.

    Returns:
        the first item of every run, or None when no such cut exists.
    """
    return _dynamic_program(cost, allowed, np.maximum)


def minimise_sum(cost: Matrix, allowed: Sequence[Mask]) -> list[int] | None:
    """The same with the least sum of costs (used to break ties, e.g. by the bytes that cross)."""
    return _dynamic_program(cost, allowed, np.add)


def _dynamic_program(cost: Matrix, allowed: Sequence[Mask], join: np.ufunc) -> list[int] | None:
    n = len(cost) - 1
    if not 1 <= len(allowed) <= n:
        return None
    runs = pairs(n)
    # best[j]: the best value for the first j items; cuts: where the last of their runs begins.
    best = np.full(n + 1, math.inf)
    best[0] = -math.inf if join is np.maximum else 0.0
    cuts = []
    for mask in allowed:
        value = np.where(runs & mask, join(best[:, None], cost), math.inf)
        cuts.append(value.argmin(axis=0))
        best = value.min(axis=0)
    if math.isinf(best[n]):
        return None
    starts = [n]
    for cut in reversed(cuts):
        starts.append(int(cut[starts[-1]]))
    return starts[:0:-1]


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
    allowed = (cost <= bound) & (sizes[-1] <= limit) & pairs(n)
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


def pairs(n: int) -> NDArray[np.bool_]:
    """Where i < j."""
    return np.triu(np.ones((n + 1, n + 1), dtype=bool), 1)
