"""The partition is optimal: compared with all partitions there are."""

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamp3d.plan.partition import minimise_largest, minimise_sum

Segments = tuple[list[float], list[int], int | None]


@st.composite
def instances(draw: st.DrawFn) -> tuple[Segments, int]:
    """Costs and sizes of up to nine items, perhaps a limit on a stage's size, and a number of stages."""
    n = draw(st.integers(1, 9))
    costs = draw(st.lists(st.integers(0, 20).map(float), min_size=n, max_size=n))
    sizes = draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))
    limit = draw(st.none() | st.integers(1, 30))
    return (costs, sizes, limit), draw(st.integers(1, n + 1))


def functions(segments: Segments) -> tuple[Callable[[int, int], float], Callable[[int, int], bool]]:
    costs, sizes, limit = segments

    def cost(i: int, j: int) -> float:
        # Not additive, as a stage's seconds and bytes are not: every stage pays for its ends.
        return sum(costs[i:j]) + 3 * costs[i] * (i > 0)

    return cost, lambda i, j: limit is None or sum(sizes[i:j]) <= limit


def brute_force(segments: Segments, stages: int, join: Callable[[list[float]], float]) -> float:
    cost, fits = functions(segments)
    n = len(segments[0])
    best = math.inf
    for cuts in itertools.combinations(range(1, n), stages - 1):
        runs = list(itertools.pairwise([0, *cuts, n]))
        if all(fits(i, j) for i, j in runs):
            best = min(best, join([cost(i, j) for i, j in runs]))
    return best


@settings(max_examples=400, deadline=None)
@given(instances())
def test_no_partition_is_better(instance: tuple[Segments, int]) -> None:
    segments, stages = instance
    cost, fits = functions(segments)
    n = len(segments[0])
    for solve, join in ((minimise_largest, max), (minimise_sum, sum)):
        starts = solve(n, stages, cost, fits)
        best = brute_force(segments, stages, join)
        if starts is None:
            assert math.isinf(best)
            continue
        assert len(starts) == stages
        assert starts[0] == 0
        runs = list(itertools.pairwise([*starts, n]))
        assert all(i < j and fits(i, j) for i, j in runs)
        assert join([cost(i, j) for i, j in runs]) == best


@pytest.mark.parametrize("solve", [minimise_largest, minimise_sum])
@pytest.mark.parametrize(("items", "stages"), [(3, 4), (3, 0), (0, 1)])
def test_no_partition_into_more_stages_than_items_or_none(
    solve: Callable[..., list[int] | None], items: int, stages: int
) -> None:
    assert solve(items, stages, lambda i, j: 1.0, lambda i, j: True) is None


def test_a_large_instance_is_solved_quickly_with_each_segment_asked_once_per_stage() -> None:
    n, stages = 150, 8
    asked = 0

    def cost(i: int, j: int) -> float:
        nonlocal asked
        asked += 1
        return float(j - i)

    starts = minimise_largest(n, stages, cost, lambda i, j: True)
    assert starts is not None
    assert max(j - i for i, j in itertools.pairwise([*starts, n])) == math.ceil(n / stages)
    assert asked <= stages * n * (n + 1) / 2
