"""A schedule on paper: when every action runs, before a step is run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamp3d.plan.links import LinkTable
from lamp3d.plan.routes import Message, Routes
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
        return 1 - busy / (self.seconds * len(self.actions)) if self.seconds else 0.0

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


class Transfers:
    """What a time line knows of messages: which action sends what, and how long it is on its way.

    Messages from one rank to another follow each other. Where the cores do the sending, half of a message's time is the
    sender's and half the receiver's.

    Args:
        routes: the messages of every action.
        value_bytes: of one micro-batch's values, and of their gradients.
        links: between the ranks.
    """

    def __init__(self, routes: Routes, value_bytes: Mapping[str, int], links: LinkTable):
        self._routes, self._bytes, self._links = routes, value_bytes, links
        self._arrives: dict[Message, float] = {}
        self._free: dict[tuple[int, int], float] = defaultdict(float)

    def work_before(self, action: Action) -> float:
        """What receiving takes of the rank's own time."""
        return self._own(self._routes.needed.get(action, ()))

    def work_after(self, action: Action) -> float:
        """What sending takes of the rank's own time."""
        return self._own(self._routes.sent.get(action, ()))

    def send(self, action: Action, when: float) -> None:
        """The action is done: what it sends is on its way."""
        for message in self._routes.sent.get(action, ()):
            way = message.origin, message.to
            link = self._links[message.origin][message.to]
            begin = max(when, self._free[way])
            arrives = begin + (link.seconds if link.by_cores else link.of(self._size(message)))
            self._arrives[message] = arrives
            self._free[way] = arrives - link.seconds

    def ready(self, action: Action) -> float | None:
        """When all that an action needs has arrived; None if something is not yet sent."""
        needed = self._routes.needed.get(action, ())
        if any(message not in self._arrives for message in needed):
            return None
        return max((self._arrives[message] for message in needed), default=0.0)

    def _own(self, messages: Sequence[Message]) -> float:
        ways = ((self._links[message.origin][message.to], self._size(message)) for message in messages)
        return sum(size / (link.gbs * 1e9) / 2 for link, size in ways if link.by_cores)

    def _size(self, message: Message) -> int:
        return self._bytes.get(message.value, 0)


def simulate(
    schedule: Sequence[Sequence[Action]], stages: Sequence[StageTimes], transfers: Transfers | None = None
) -> TimeLine:
    """Run a schedule on paper: every rank does its actions in order, each as soon as what it needs is there.

    Args:
        schedule: the actions of every rank.
        stages: the expected seconds of each stage.
        transfers: what passes between ranks; None: at once.

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
                arrived = 0.0 if transfers is None else transfers.ready(action)
                if arrived is None or not all(need in done for need in needed):
                    break
                begin = max([free[rank], arrived, *(done[need] for need in needed)])
                end = begin + stages[action.stage].seconds(action.kind)
                if transfers is not None:
                    end += transfers.work_before(action) + transfers.work_after(action)
                    transfers.send(action, end)
                free[rank] = done[action] = end
                lines[rank].append((action, begin, end))
                progress = True
    waiting = [actions[len(line)] for actions, line in zip(schedule, lines, strict=True) if len(line) < len(actions)]
    if waiting:
        raise ValueError(f"the schedule dead-locks; these actions wait for ever: {waiting}")
    return TimeLine(tuple(tuple(line) for line in lines))
