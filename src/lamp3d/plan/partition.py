"""Exact partitions of a sequence into runs: dynamic programming, no heuristics and no torch.

Two kinds. *Contiguous*: K runs, one after the other, O(K n²) steps inside numpy. *Folded*: K ranks of which the outer
ones have a run at either end and the innermost what is left; O(K n⁴) steps, all but n² of them inside numpy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
"""``m[i, j]``: something about the run of items i … j-1, for 0 <= i < j <= n."""

Mask = NDArray[np.bool_]

GUESS = 1.25
"""Of the least largest cost, over an even share; where it was too low, it grows by the same factor."""


def minimise_largest(cost: Matrix | Sequence[Matrix], allowed: Sequence[Mask]) -> list[int] | None:
    """Cut n items into as many non-empty runs as there are masks, such that the largest cost is least.

    Args:
        cost: of every run, (n + 1, n + 1); it may be another one for each run in turn.
        allowed: for each run in turn, which ones it may be.

    Returns:
        the first item of every run, or None when no such cut exists.
    """
    return _dynamic_program(cost, allowed, np.maximum)


def minimise_sum(cost: Matrix | Sequence[Matrix], allowed: Sequence[Mask]) -> list[int] | None:
    """The same with the least sum of costs."""
    return _dynamic_program(cost, allowed, np.add)


def _dynamic_program(cost: Matrix | Sequence[Matrix], allowed: Sequence[Mask], join: np.ufunc) -> list[int] | None:
    if not allowed or len(allowed) > (n := len(allowed[0]) - 1):
        return None
    costs = [cost] * len(allowed) if isinstance(cost, np.ndarray) else cost
    runs = pairs(n)
    # best[j]: the best value for the first j items; cuts: where the last of their runs begins.
    best = np.full(n + 1, math.inf)
    best[0] = -math.inf if join is np.maximum else 0.0
    cuts = []
    for mask, of_run in zip(allowed, costs, strict=True):
        value = np.where(runs & mask, join(best[:, None], of_run), math.inf)
        cuts.append(value.argmin(axis=0))
        best = value.min(axis=0)
    if math.isinf(best[n]):
        return None
    starts = [n]
    for cut in reversed(cuts):
        starts.append(int(cut[starts[-1]]))
    return starts[:0:-1]


def fold_largest(cost: Matrix, sizes: Sequence[Matrix], limit: float) -> list[int] | None:
    """Cut n items into 2 K - 1 non-empty runs of which rank k has number k and number 2 K - 2 - k.

    Args:
        cost: ``cost[i, j]`` of the run i … j-1, the sum of its items' costs, (n + 1, n + 1).
        sizes: the same for the memory of each rank's runs, which need not be sums.
        limit: of a rank's memory.

    Returns:
        the first item of every run, such that the largest cost of a rank is least, or None when no cut fits.
    """
    n, ranks = len(cost) - 1, len(sizes)
    by_run = [*sizes[:-1], *sizes[::-1]]
    small = minimise_sum(by_run, [size <= limit for size in by_run])
    if (
        small is None
        or sum(m[run] for m, run in zip(by_run, itertools.pairwise([*small, n]), strict=True)) > ranks * limit
    ):
        return None  # however its runs are paired
    # A low bound leaves few runs to look at; where there is a cut within it, the best one is among them.
    bound = GUESS * float(cost[0, n]) / ranks
    while bound < cost[0, n]:
        if (found := _fold(cost, sizes, limit, bound, None)) is not None:
            return found
        bound *= GUESS
    return _fold(cost, sizes, limit, math.inf, None)


def fold_sum(cost: Matrix, sizes: Sequence[Matrix], limit: float, crossing: Matrix, bound: float) -> list[int] | None:
    """The same cut with the least sum of what crosses, among those with no rank's cost above a bound.

    Args:
        crossing: ``crossing[i, j]``: what passes between the run i … j-1 and the items outside it.
    """
    return _fold(cost, sizes, limit, bound, crossing)


def _fold(
    cost: Matrix, sizes: Sequence[Matrix], limit: float, bound: float, crossing: Matrix | None
) -> list[int] | None:
    """The nested cut with the least largest cost, or with the least sum of ``crossing`` if that is given."""
    n, ranks = len(cost) - 1, len(sizes)
    if n < 2 * ranks - 1:
        return None
    # best[i, j]: the best value for the items i … j-1 on the ranks from k on; inner[k][i, j]: what rank k leaves.
    best = np.full((n + 1, n + 1), math.inf)
    allowed = (cost <= bound) & (sizes[-1] <= limit) & pairs(n)
    best[allowed] = cost[allowed] if crossing is None else 0.0
    inner: list[NDArray[np.int64]] = []
    for rank in range(ranks - 2, -1, -1):
        outer, left = np.full((n + 1, n + 1), math.inf), np.zeros((n + 1, n + 1, 2), dtype=np.int64)
        for i, j in _outer_runs(cost, rank, ranks, bound):
            a, b = slice(i + 1, j - 1), slice(i + 2, j)  # the inner run's ends
            own = cost[i, a, None] + cost[None, b, j]
            held = sizes[rank][i, a, None] + sizes[rank][None, b, j]
            value = np.maximum(own, best[a, b]) if crossing is None else crossing[a, b] + best[a, b]
            value = np.where((own <= bound) & (held <= limit), value, math.inf)
            where = int(value.argmin())
            row, column = divmod(where, value.shape[1])
            if value[row, column] < math.inf:
                outer[i, j], left[i, j] = value[row, column], (i + 1 + row, i + 2 + column)
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


def _outer_runs(cost: Matrix, rank: int, ranks: int, bound: float) -> Iterator[tuple[int, int]]:
    """What the ranks from ``rank`` on may have: not too much for them, nor so little that the others have too much."""
    n = len(cost) - 1
    if rank == 0:
        if n >= 3:
            yield 0, n
        return
    slack = 1e-9 * cost[0, n]  # sums in another order
    possible = (cost <= (ranks - rank) * bound + slack) & (cost >= cost[0, n] - rank * bound - slack)
    for i, j in np.argwhere(np.triu(possible, 3)):
        yield int(i), int(j)


def joined(cost: Matrix, most: int) -> NDArray[np.int64]:
    """Where to cut at all if there are more items than may be: those before which the most cost would be joined.

    Args:
        cost: of every run, the sum of its items' costs, (n + 1, n + 1).
        most: items that are left.

    Returns:
        the first items of what is left, and n.
    """
    bounds = list(range(len(cost)))
    while len(bounds) - 1 > most:
        together = [cost[a, b] for a, b in zip(bounds, bounds[2:], strict=False)]
        del bounds[1 + int(np.argmin(together))]
    return np.array(bounds)


def pairs(n: int) -> NDArray[np.bool_]:
    """Where i < j."""
    return np.triu(np.ones((n + 1, n + 1), dtype=bool), 1)
