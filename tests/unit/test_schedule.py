"""Schedules can be executed, and the simulator predicts them."""

import itertools

import pytest

from lamp3d.plan.schedule import SCHEDULES, Action, gpipe
from lamp3d.plan.simulate import simulate


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8])
def test_every_pass_is_done_once_on_its_own_stage_and_nothing_dead_locks(
    name: str, stages: int, micro_batches: int
) -> None:
    schedule = SCHEDULES[name](stages, micro_batches)
    expected = {Action(kind, s, m) for kind in ("forward", "backward") for s in range(stages)
                for m in range(micro_batches)}  # fmt: skip
    done = [action for actions in schedule for action in actions]
    assert len(done) == len(expected)
    assert set(done) == expected
    assert all(action.stage == rank for rank, actions in enumerate(schedule) for action in actions)
    line = simulate(schedule, [1.0] * stages, [2.0] * stages)
    assert line.seconds >= 3 * micro_batches


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 4, 8])
def test_gpipe_takes_the_time_and_has_the_bubble_of_the_formula(stages: int, micro_batches: int) -> None:
    line = simulate(gpipe(stages, micro_batches), [1.0] * stages, [2.0] * stages)
    assert line.seconds == pytest.approx(3 * (micro_batches + stages - 1))
    assert line.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))


def test_gpipe_is_bound_by_the_slowest_stage() -> None:
    line = simulate(gpipe(3, 4), [1.0, 5.0, 1.0], [2.0, 7.0, 2.0])
    # In: 1; the slow stage's forwards: 20; the last stage's forward and backward: 1 + 2; its backwards: 28; out: 2.
    assert line.seconds == pytest.approx(1 + 4 * 5 + 1 + 2 + 4 * 7 + 2)
    assert [action.kind for action, _, _ in line.actions[1]] == ["forward"] * 4 + ["backward"] * 4


def test_the_backward_of_the_last_stage_waits_for_the_loss_of_the_whole_mini_batch() -> None:
    line = simulate(gpipe(1, 3), [1.0], [1.0])
    first_backward = next(begin for action, begin, _ in line.actions[0] if action.kind == "backward")
    assert first_backward == 3.0


def test_actions_of_a_rank_follow_one_another_and_their_needs() -> None:
    line = simulate(gpipe(3, 3), [1.0, 2.0, 1.5], [2.0, 1.0, 3.0])
    ends = {action: end for actions in line.actions for action, _, end in actions}
    for actions in line.actions:
        assert all(end <= begin for (_, _, end), (_, begin, _) in itertools.pairwise(actions))
        for action, begin, _ in actions:
            if action.kind == "forward" and action.stage:
                assert ends[Action("forward", action.stage - 1, action.micro_batch)] <= begin
            if action.kind == "backward" and action.stage < 2:
                assert ends[Action("backward", action.stage + 1, action.micro_batch)] <= begin


def test_a_dead_lock_is_named() -> None:
    backward_first = [[Action("backward", 0, 0), Action("forward", 0, 0)]]
    with pytest.raises(ValueError, match=r"dead-locks.*'backward', stage=0, micro_batch=0"):
        simulate(backward_first, [1.0], [1.0])
