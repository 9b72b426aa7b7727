"""The partition is optimal: compared with all partitions there are."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lamp3d.plan.partition import Mask, Matrix, fold_largest, fold_sum, minimise_largest, minimise_sum

Segments = tuple[list[float], list[int], int | None]


@st.composite
def instances(draw: st.DrawFn) -> tuple[Segments, int]:
    """Costs and sizes of up to nine items, perhaps a limit on a stage's size, and a number of stages."""
    n = draw(st.integers(1, 9))
    costs = draw(st.lists(st.integers(0, 20).map(float), min_size=n, max_size=n))
    sizes = draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))
    limit = draw(st.none() | st.integers(1, 30))
    return (costs, sizes, limit), draw(st.integers(1, n + 1))


def functions(segments: Segments) -> tuple[Callable[[int, int], float], Callable[[int, int, int], bool]]:
    costs, sizes, limit = segments

    def cost(i: int, j: int) -> float:
        # Not additive, as a stage's seconds and bytes are not: every stage pays for its ends.
        return sum(costs[i:j]) + 3 * costs[i] * (i > 0)

    # Later stages hold fewer micro-batches, as under 1F1B.
    return cost, lambda i, j, stage: limit is None or sum(sizes[i:j]) * (3 if stage == 0 else 2) <= 2 * limit


def matrices(segments: Segments, stages: int) -> tuple[Matrix, list[Mask]]:
    cost, fits = functions(segments)
    n = len(segments[0])
    costs, allowed = np.zeros((n + 1, n + 1)), [np.zeros((n + 1, n + 1), dtype=bool) for _ in range(stages)]
    for i, j in itertools.combinations(range(n + 1), 2):
        costs[i, j] = cost(i, j)
        for stage, mask in enumerate(allowed):
            mask[i, j] = fits(i, j, stage)
    return costs, allowed


def brute_force(segments: Segments, stages: int, join: Callable[[list[float]], float]) -> float:
    cost, fits = functions(segments)
    n = len(segments[0])
    best = math.inf
    for cuts in itertools.combinations(range(1, n), stages - 1):
        runs = list(itertools.pairwise([0, *cuts, n]))
        if all(fits(i, j, stage) for stage, (i, j) in enumerate(runs)):
            best = min(best, join([cost(i, j) for i, j in runs]))
    return best


@settings(max_examples=400, deadline=None)
@given(instances())
def test_no_partition_is_better(instance: tuple[Segments, int]) -> None:
    segments, stages = instance
    cost, fits = functions(segments)
    n = len(segments[0])
    for solve, join in ((minimise_largest, max), (minimise_sum, sum)):
        starts = solve(*matrices(segments, stages))
        best = brute_force(segments, stages, join)
        if starts is None:
            assert math.isinf(best)
            continue
        assert len(starts) == stages
        assert starts[0] == 0
        runs = list(itertools.pairwise([*starts, n]))
        assert all(i < j and fits(i, j, stage) for stage, (i, j) in enumerate(runs))
        assert join([cost(i, j) for i, j in runs]) == best


@pytest.mark.parametrize("solve", [minimise_largest, minimise_sum])
@pytest.mark.parametrize(("items", "stages"), [(3, 4), (3, 0), (0, 1)])
def test_no_partition_into_more_stages_than_items_or_none(
    solve: Callable[..., list[int] | None], items: int, stages: int
) -> None:
    shape = (items + 1, items + 1)
    assert solve(np.ones(shape), [np.ones(shape, dtype=bool)] * stages) is None


def test_a_large_instance_is_solved() -> None:
    n, stages = 150, 64
    begins, ends = np.indices((n + 1, n + 1))
    starts = minimise_largest((ends - begins).astype(float), [np.ones((n + 1, n + 1), dtype=bool)] * stages)
    assert starts is not None
    assert max(j - i for i, j in itertools.pairwise([*starts, n])) == math.ceil(n / stages)


@st.composite
def folds(draw: st.DrawFn) -> tuple[int, NDArray[np.float64], NDArray[np.float64], float, NDArray[np.float64]]:
    """Ranks, costs and sizes of every run of up to eight items, a limit, and what every run exchanges with the rest."""
    n, ranks = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    costs, sizes = (draw(st.lists(st.integers(0, 20), min_size=n, max_size=n)) for _ in range(2))
    exchanged = draw(st.lists(st.integers(0, 9), min_size=(n + 1) ** 2, max_size=(n + 1) ** 2))

    def runs_of(items: list[int]) -> NDArray[np.float64]:
        return np.array([[float(sum(items[i:j])) for j in range(n + 1)] for i in range(n + 1)])

    limit = draw(st.sampled_from([math.inf, 40.0, 20.0]))
    return ranks, runs_of(costs), runs_of(sizes), limit, np.array(exchanged, dtype=float).reshape(n + 1, n + 1)


@settings(max_examples=300, deadline=None)
@given(folds())
def test_no_fold_is_better(
    instance: tuple[int, NDArray[np.float64], NDArray[np.float64], float, NDArray[np.float64]],
) -> None:
    ranks, cost, size, limit, exchanged = instance
    n = len(cost) - 1
    sizes = [size * (rank + 1) for rank in range(ranks)]

    def largest(bounds: list[int]) -> float:
        return max(sum(cost[run] for run in runs_of(bounds, rank)) for rank in range(ranks))

    def runs_of(bounds: list[int], rank: int) -> set[tuple[int, int]]:
        pairs = list(itertools.pairwise(bounds))
        return {pairs[rank], pairs[-1 - rank]}

    def sent(bounds: list[int]) -> float:
        return float(sum(exchanged[bounds[rank + 1], bounds[-2 - rank]] for rank in range(ranks - 1)))

    every = [[0, *cuts, n] for cuts in itertools.combinations(range(1, n), 2 * ranks - 2)]
    possible = [
        bounds
        for bounds in every
        if all(sum(sizes[rank][run] for run in runs_of(bounds, rank)) <= limit for rank in range(ranks))
    ]
    fastest = fold_largest(cost, sizes, limit)
    if not possible:
        assert fastest is None
        return
    assert fastest is not None
    assert [*fastest, n] in possible
    least = min(map(largest, possible))
    assert largest([*fastest, n]) == least
    bound = 1.1 * least
    found = fold_sum(cost, sizes, limit, exchanged, bound)
    assert found is not None
    assert [*found, n] in possible
    assert largest([*found, n]) <= bound
    assert sent([*found, n]) == min(sent(bounds) for bounds in possible if largest(bounds) <= bound)
