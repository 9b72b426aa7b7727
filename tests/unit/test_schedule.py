"""Schedules can be executed, and the simulator predicts them."""

import itertools
import random
from collections.abc import Mapping, Sequence

import pytest

from lamp3d.errors import PlanError
from lamp3d.graph import Edge
from lamp3d.plan.memory import StageBytes, memory_use
from lamp3d.plan.routes import Routes
from lamp3d.plan.schedule import PLACEMENTS, SCHEDULES, Actions, StageTimes, interleaved, most_in_flight, needs
from lamp3d.plan.simulate import simulate

EVEN = 1.0, 2.0, 1.0


def stages(schedule: str, devices: int, uneven: int | None = None) -> list[StageTimes]:
    """The schedule's stages: together as long as one of 3 seconds a device, or (``uneven``: a seed) of any length."""
    ranks = PLACEMENTS[schedule](devices)
    if uneven is None:
        shares = [1 / ranks.count(rank) for rank in ranks]
    else:
        shares = [random.Random(uneven + i).uniform(0.1, 3.0) for i in range(len(ranks))]
    return [StageTimes(rank, *(share * part for part in EVEN)) for rank, share in zip(ranks, shares, strict=True)]


def make(schedule: str, devices: int, micro_batches: int, uneven: int | None = None) -> Actions:
    return SCHEDULES[schedule](stages(schedule, devices, uneven), micro_batches)


def seconds(schedule: str, devices: int, micro_batches: int) -> float:
    return simulate(make(schedule, devices, micro_batches), stages(schedule, devices)).seconds


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("devices", range(1, 9))
def test_every_pass_is_done_once_on_its_own_rank_after_what_it_needs(name: str, devices: int) -> None:
    for micro_batches in range(1, 17):
        for uneven in (None, micro_batches) if micro_batches in (1, 2, 5, 8) else (None,):
            times = stages(name, devices, uneven)
            schedule = make(name, devices, micro_batches, uneven)
            done = [action for actions in schedule for action in actions]
            assert len(done) == len(set(done))
            for stage, micro_batch in itertools.product(range(len(times)), range(micro_batches)):
                kinds = {action.kind for action in done if (action.stage, action.micro_batch) == (stage, micro_batch)}
                assert kinds in ({"forward", "backward"}, {"forward", "backward_input", "backward_weight"})
            assert all(times[action.stage].rank == rank for rank, of_rank in enumerate(schedule) for action in of_rank)
            line = simulate(schedule, times)  # raises where it dead-locks
            ends = {action: end for of_rank in line.actions for action, _, end in of_rank}
            for of_rank in line.actions:
                assert all(end <= begin for (_, _, end), (_, begin, _) in itertools.pairwise(of_rank))
                for action, begin, _ in of_rank:
                    assert all(ends[need] <= begin for need in needs(action, len(times) - 1))


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 4, 8])
def test_gpipe_and_1f1b_take_the_time_and_have_the_bubble_of_the_formula(
    name: str, devices: int, micro_batches: int
) -> None:
    line = simulate(make(name, devices, micro_batches), stages(name, devices))
    assert line.seconds == pytest.approx(3 * (micro_batches + devices - 1))
    assert line.bubble == pytest.approx((devices - 1) / (micro_batches + devices - 1))


def test_gpipe_is_bound_by_the_slowest_stage() -> None:
    times = [StageTimes(0, 1.0, 2.0), StageTimes(1, 5.0, 7.0), StageTimes(2, 1.0, 2.0)]
    line = simulate(SCHEDULES["gpipe"](times, 4), times)
    # In: 1; the slow stage's forwards: 20; the last stage's forward and backward: 1 + 2; its backwards: 28; out: 2.
    assert line.seconds == pytest.approx(1 + 4 * 5 + 1 + 2 + 4 * 7 + 2)
    assert [action.kind for action, _, _ in line.actions[1]] == ["forward"] * 4 + ["backward"] * 4


def test_gpipes_first_backward_waits_for_the_loss_of_the_whole_mini_batch() -> None:
    for devices in (1, 2, 5):
        kinds = [action.kind for action in make("gpipe", devices, 3)[-1]]
        assert kinds == ["forward"] * 3 + ["backward"] * 3


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_1f1b_holds_no_more_micro_batches_than_there_are_stages_behind(devices: int) -> None:
    assert most_in_flight(make("1f1b", devices, 16)) == [devices - stage for stage in range(devices)]
    assert most_in_flight(make("gpipe", devices, 16)) == [16] * devices


@pytest.mark.parametrize(("devices", "micro_batches"), [(2, 4), (2, 8), (4, 8), (4, 16), (8, 16)])
def test_shorter_stages_and_split_backwards_shrink_the_bubble(devices: int, micro_batches: int) -> None:
    straight, looped, folded, zero = (
        seconds(name, devices, micro_batches) for name in ("1f1b", "interleaved", "folded", "zero_bubble_v")
    )
    ideal = 3 * micro_batches
    assert looped == pytest.approx(ideal + (straight - ideal) / 2)  # half the bubble
    assert folded <= straight
    assert zero - ideal <= (straight - ideal) / 3
    assert max(most_in_flight(make("zero_bubble_v", devices, micro_batches))) <= 2 * devices + 1


def test_the_interleaved_schedule_wants_its_own_placement() -> None:
    with pytest.raises(PlanError, match="0 1 … K-1 0 1 … K-1"):
        interleaved([StageTimes(0), StageTimes(0), StageTimes(1), StageTimes(1)], 2)


def test_a_dead_lock_is_named() -> None:
    schedule = [list(reversed(make("gpipe", 1, 1)[0]))]
    with pytest.raises(ValueError, match=r"dead-locks.*kind='backward', stage=0, micro_batch=0"):
        simulate(schedule, [StageTimes(0)])


def memory(
    schedule: str,
    devices: int,
    held: Sequence[dict[str, int]],
    deferred: dict[str, int],
    edges: Sequence[Edge] = (),
    value_bytes: Mapping[str, int] | None = None,
) -> list[int]:
    times, actions = stages(schedule, devices), make(schedule, devices, 4)
    ranks, sizes = [stage.rank for stage in times], value_bytes or {}
    routes = Routes(edges, ranks, actions, [sizes.keys()] * 4)
    line = simulate(actions, times)
    found = memory_use(line, routes, edges, ranks, sizes, [StageBytes(one, deferred, 0, 0, 0) for one in held])
    return [device.saved_bytes for device in found]


def test_memory_counts_what_is_in_flight_and_what_two_stages_hold_once() -> None:
    assert memory("gpipe", 2, [{"a": 10}, {"b": 1}], {}) == [40, 4]
    assert memory("1f1b", 2, [{"a": 10}, {"b": 1}], {}) == [20, 1]
    # A folded rank holds a skip in its first and in its last stage, but it is the same tensor.
    apart = memory("folded", 2, [{"skip": 10}, {}, {"other": 10}], {})
    together = memory("folded", 2, [{"skip": 10}, {}, {"skip": 10}], {})
    assert together[0] < apart[0]
    assert memory("zero_bubble_v", 2, [{}, {}, {}], {"gradients": 3})[1] >= 3


def test_memory_counts_the_sum_of_the_gradients_where_activations_are_small() -> None:
    line = simulate(make("1f1b", 1, 2), stages("1f1b", 1))
    routes = Routes([], [0], make("1f1b", 1, 2), [()] * 2)
    for held, peak in ((5, 40 + 10), (50, 40 + 50)):
        (found,) = memory_use(line, routes, [], [0], {}, [StageBytes({"a": held}, {}, 40, 0, 10)])
        assert found.peak_bytes == peak


def test_memory_counts_what_is_on_its_way() -> None:
    edge, sizes = Edge("x", 0, (1,)), {"x": 100}
    # GPipe: the receiver keeps pace, so no value waits to be asked for; both ask two actions ahead.
    assert memory("gpipe", 2, [{}, {}], {}, [edge], sizes) == [300, 300]
    # The user keeps what it has received until its backward, and is asked for no more of it.
    assert memory("gpipe", 2, [{}, {"x": 100}], {}, [edge], sizes)[1] == 400
    # A skip that stays on its rank waits there for its user, under the same name as what its maker saves of it.
    skip = Edge("x", 0, (2,))
    apart = memory("folded", 2, [{"y": 100}, {}, {}], {}, [skip], sizes)
    assert memory("folded", 2, [{"x": 100}, {}, {}], {}, [skip], sizes)[0] < apart[0]
