"""A schedule on paper: when every action runs, before a step is run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
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

    @classmethod
    def from_chrome_trace(cls, trace: dict[str, Any]) -> TimeLine:
        """What :meth:`chrome_trace` made of a time line."""
        ranks: dict[int, list[tuple[Action, float, float]]] = defaultdict(list)
        for event in trace["traceEvents"]:
            action = Action(event["cat"], event["args"]["stage"], event["args"]["micro_batch"])
            begin = event["ts"] / 1e6
            ranks[event["tid"]].append((action, begin, begin + event["dur"] / 1e6))
        return cls(tuple(tuple(ranks[rank]) for rank in sorted(ranks)))


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
