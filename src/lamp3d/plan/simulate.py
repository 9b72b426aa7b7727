"""A schedule and the stages' seconds -> a time line: what a step will take before it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lamp3d.plan.schedule import Action


@dataclass(frozen=True)
class TimeLine:
    """When every action begins and ends (seconds), by rank, and what follows from it."""

    actions: tuple[tuple[tuple[Action, float, float], ...], ...]

    @property
    def seconds(self) -> float:
        """The end of the last action."""
        return max(end for rank in self.actions for _, _, end in rank)

    @property
    def bubble(self) -> float:
        """The share of the devices' time in which they wait."""
        busy = sum(end - begin for rank in self.actions for _, begin, end in rank)
        return 1 - busy / (self.seconds * len(self.actions))


def simulate(
    schedule: Sequence[Sequence[Action]], forward_seconds: Sequence[float], backward_seconds: Sequence[float]
) -> TimeLine:
    """Run a schedule on paper: every rank does its actions in order, each as soon as what it needs is there.

    Args:
        schedule: the actions of every rank.
        forward_seconds: seconds of one micro-batch's forward, by stage.
        backward_seconds: seconds of one micro-batch's backward, by stage.

    Raises:
        ValueError: the schedule dead-locks; the message names the actions that wait for ever.
    """
    last = len(forward_seconds) - 1
    micro_batches = {action.micro_batch for rank in schedule for action in rank}
    done: dict[Action, float] = {}
    lines: list[list[tuple[Action, float, float]]] = [[] for _ in schedule]
    free = [0.0] * len(schedule)
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(schedule):
            while len(lines[rank]) < len(actions):
                action = actions[len(lines[rank])]
                needs = _needs(action, last, micro_batches)
                if not all(need in done for need in needs):
                    break
                begin = max([free[rank], *(done[need] for need in needs)])
                seconds = (forward_seconds if action.kind == "forward" else backward_seconds)[action.stage]
                free[rank] = done[action] = begin + seconds
                lines[rank].append((action, begin, begin + seconds))
                progress = True
    waiting = [actions[len(line)] for actions, line in zip(schedule, lines, strict=True) if len(line) < len(actions)]
    if waiting:
        raise ValueError(f"the schedule dead-locks; these actions wait for ever: {waiting}")
    return TimeLine(tuple(tuple(line) for line in lines))


def _needs(action: Action, last: int, micro_batches: set[int]) -> list[Action]:
    """What must be done before an action; the last stage's loss needs the forwards of the whole mini-batch."""
    if action.kind == "forward":
        return [Action("forward", action.stage - 1, action.micro_batch)] if action.stage else []
    if action.stage == last:
        return [Action("forward", last, micro_batch) for micro_batch in micro_batches]
    return [
        Action("forward", action.stage, action.micro_batch),
        Action("backward", action.stage + 1, action.micro_batch),
    ]
