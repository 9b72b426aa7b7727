"""The exact contiguous partition of a sequence: dynamic programming, no heuristics and no torch.

``cost(i, j)`` is what a stage of the items i … j-1 costs, ``fits(i, j)`` whether a device can hold it. Both are asked
at most K times for every pair, so a partition of n items into K stages takes O(K n²) steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Segment = Callable[[int, int], float]


def minimise_largest(n_items: int, stages: int, cost: Segment, fits: Callable[[int, int], bool]) -> list[int] | None:
    """Cut ``range(n_items)`` into ``stages`` non-empty runs that all fit, such that the largest cost is least.

    Returns:
        the first item of every stage, or None when no such cut exists.
    """
    return _dynamic_program(n_items, stages, lambda i, j: cost(i, j) if fits(i, j) else math.inf, max)


def minimise_sum(n_items: int, stages: int, cost: Segment, fits: Callable[[int, int], bool]) -> list[int] | None:
    """The same with the least sum of costs (used to break ties, e.g. by the bytes that cross)."""
    return _dynamic_program(n_items, stages, lambda i, j: cost(i, j) if fits(i, j) else math.inf, lambda a, b: a + b)


def _dynamic_program(
    n_items: int, stages: int, cost: Segment, join: Callable[[float, float], float]
) -> list[int] | None:
    if not 1 <= stages <= n_items:
        return None
    # best[j]: the best value for the first j items in k stages; cut[k][j]: where the last of these stages begins.
    best = [math.inf] + [cost(0, j) for j in range(1, n_items + 1)]
    cuts: list[list[int]] = []
    for k in range(2, stages + 1):
        row, cut = [math.inf] * (n_items + 1), [0] * (n_items + 1)
        for j in range(k, n_items + 1):
            for i in range(j - 1, k - 2, -1):
                if best[i] < row[j] and (value := join(best[i], cost(i, j))) < row[j]:
                    row[j], cut[j] = value, i
        best = row
        cuts.append(cut)
    if math.isinf(best[n_items]):
        return None
    starts = [n_items]
    for cut in reversed(cuts):
        starts.append(cut[starts[-1]])
    return [0, *reversed(starts[1:])]
