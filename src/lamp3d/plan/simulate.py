"""A schedule on paper: when every action runs, and what every rank holds, before a step is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamp3d.plan.schedule import Action, StageTimes, needs


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

    def chrome_trace(self) -> dict[str, Any]:
        """The time line in the Trace Event Format, which chrome://tracing and Perfetto show; times in microseconds."""
        return {
            "traceEvents": [
                {
                    "name": f"{action.kind} {action.micro_batch}",
                    "cat": action.kind,
                    "ph": "X",
                    "pid": 0,
                    "tid": rank,
                    "ts": begin * 1e6,
                    "dur": (end - begin) * 1e6,
                    "args": {"stage": action.stage, "micro_batch": action.micro_batch},
                }
                for rank, actions in enumerate(self.actions)
                for action, begin, end in actions
            ]
        }


def simulate(schedule: Sequence[Sequence[Action]], stages: Sequence[StageTimes]) -> TimeLine:
    """Run a schedule on paper: every rank does its actions in order, each as soon as what it needs is there.

    Args:
        schedule: the actions of every rank.
        stages: the expected seconds of each stage.

    Raises:
        ValueError: the schedule dead-locks; the message names the actions that wait for ever.
    """
    last = len(stages) - 1
    done: dict[Action, float] = {}
    lines: list[list[tuple[Action, float, float]]] = [[] for _ in schedule]
    free = [0.0] * len(schedule)
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(schedule):
            while len(lines[rank]) < len(actions):
                action = actions[len(lines[rank])]
                needed = needs(action, last)
                if not all(need in done for need in needed):
                    break
                begin = max([free[rank], *(done[need] for need in needed)])
                free[rank] = done[action] = begin + stages[action.stage].seconds(action.kind)
                lines[rank].append((action, begin, done[action]))
                progress = True
    waiting = [actions[len(line)] for actions, line in zip(schedule, lines, strict=True) if len(line) < len(actions)]
    if waiting:
        raise ValueError(f"the schedule dead-locks; these actions wait for ever: {waiting}")
    return TimeLine(tuple(tuple(line) for line in lines))


@dataclass(frozen=True)
class DeviceMemory:
    """What a rank holds at its fullest moment.

    Attributes:
        saved_bytes: for backward passes to come.
        peak_bytes: with parameters, gradients, optimizer state and the loss.
    """

    saved_bytes: int
    peak_bytes: int


class _Held:
    """What one rank holds: how often under each name."""

    def __init__(self) -> None:
        self._count: dict[tuple[str, int], int] = {}

    def change(self, values: Mapping[str, int], micro_batch: int, by: int) -> int:
        """Hold something once more (1) or once less (-1); returns by how many bytes the memory changes."""
        size = 0
        for name, n_bytes in values.items():
            before = self._count.get((name, micro_batch), 0)
            self._count[name, micro_batch] = before + by
            size += n_bytes * (bool(before + by) - bool(before))
        return size


def memory_use(
    schedule: Sequence[Sequence[Action]],
    held: Sequence[Mapping[str, int]],
    deferred: Sequence[Mapping[str, int]],
    static: Sequence[int],
    again: Sequence[int],
) -> list[DeviceMemory]:
    """Play a schedule through and count what every rank holds.

    Args:
        schedule: the actions of every rank.
        held: by stage, the bytes that a micro-batch holds between forward and backward, by name; what two stages of a
            rank hold under one name is held once.
        deferred: the same between the two parts of a split backward.
        static: by stage, bytes whatever is in flight.
        again: by stage, bytes that a backward brings back for as long as it runs.
    """
    found = []
    for actions in schedule:
        held_here = _Held()
        now = saved = peak = 0
        for action in actions:
            stage, m = action.stage, action.micro_batch
            if action.kind == "forward":
                now += held_here.change(held[stage], m, 1)
            elif action.kind == "backward_weight":
                now += held_here.change(deferred[stage], m, -1)
            elif action.kind == "backward_input":
                now += held_here.change(deferred[stage], m, 1)
                peak = max(peak, now + again[stage])
                now += held_here.change(held[stage], m, -1)
            else:
                peak = max(peak, now + again[stage])
                now += held_here.change(held[stage], m, -1)
            saved = max(saved, now)
            peak = max(peak, now)
        own = sum(static[stage] for stage in {action.stage for action in actions})
        found.append(DeviceMemory(saved, own + peak))
    return found
