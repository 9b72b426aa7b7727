"""What every rank holds while a schedule runs, before a step is run.

Everything that is alive between two actions is counted, under the name of the value that it is, so that what a rank
holds for several reasons is counted once:

* what a micro-batch saves for its backward, and what a split backward leaves for later;
* values and gradients that wait on their rank for another stage of it;
* what is being received, some actions ahead, and what has been sent and not yet asked for by the receiver;
* outputs that the loss has yet to see;
* when the activations are gone, the sum of the gradients over replicas and slabs, or what the optimizer's step needs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lamp3d.graph import Edge
from lamp3d.plan.costs import Held
from lamp3d.plan.routes import AHEAD, Routes
from lamp3d.plan.schedule import Action
from lamp3d.plan.simulate import TimeLine


@dataclass(frozen=True)
class DeviceMemory:
    """What a rank holds at its fullest moment.

    Attributes:
        saved_bytes: between actions: for backward passes to come, outputs for the loss, what is on its way.
        peak_bytes: with parameters, gradients, optimizer state and the loss.
    """

    saved_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class StageBytes:
    """What a stage holds.

    Attributes:
        held: by a micro-batch between forward and backward.
        deferred: the same between the two parts of a split backward.
        static: whatever is in flight.
        backward: what a micro-batch's backward needs beside, at its fullest moment.
        parameters: alone; a step ends with as much again, where gradients are summed or an optimizer updates them.
    """

    held: Held
    deferred: Held
    static: int
    backward: int
    parameters: int


def memory_use(
    line: TimeLine,
    routes: Routes,
    edges: Sequence[Edge],
    ranks: Sequence[int],
    value_bytes: Mapping[str, int],
    stages: Sequence[StageBytes],
) -> list[DeviceMemory]:
    """Play a time line through and count what every rank holds.

    Args:
        line: when every action runs, on every rank.
        routes: the messages of these actions.
        edges: the values that pass between stages.
        ranks: the rank of every stage.
        value_bytes: of one micro-batch's values, and of their gradients.
        stages: what each holds.
    """
    ledgers = [_Ledger() for _ in line.actions]
    ended = {action: end for actions in line.actions for action, _, end in actions}
    for ledger, actions in zip(ledgers, line.actions, strict=True):
        for action, _, end in actions:
            stage, m = stages[action.stage], action.micro_batch
            if action.kind == "forward":
                ledger.change(end, stage.held, m, 1)
            elif action.kind == "backward_weight":
                ledger.change(end, stage.deferred, m, -1)
            else:
                ledger.change(end, stage.held, m, -1)
                if action.kind == "backward_input":
                    ledger.change(end, stage.deferred, m, 1)
    _count_messages(ledgers, line, routes, ended, value_bytes)
    _count_handed_over(ledgers, edges, ranks, ended, value_bytes)
    found = []
    for ledger, actions in zip(ledgers, line.actions, strict=True):
        after = ledger.at([end for _, _, end in actions])
        during = [
            before + stages[action.stage].backward
            for before, (action, _, _) in zip([0, *after], actions, strict=False)
            if action.kind in ("backward", "backward_input")
        ]
        own = [stages[stage] for stage in {action.stage for action, _, _ in actions}]
        at_end = sum(stage.parameters for stage in own)
        found.append(DeviceMemory(max(after), sum(stage.static for stage in own) + max([*after, *during, at_end])))
    return found


class _Ledger:
    """What one rank begins and ceases to hold, and when."""

    def __init__(self) -> None:
        self._changes: list[tuple[float, Held, int, int]] = []

    def change(self, when: float, what: Held, micro_batch: int, by: int) -> None:
        """Hold something once more (1) or once less (-1)."""
        self._changes.append((when, what, micro_batch, by))

    def hold(self, begin: float, end: float, what: Held, micro_batch: int) -> None:
        """Hold something for a while."""
        if end > begin:
            self.change(begin, what, micro_batch, 1)
            self.change(end, what, micro_batch, -1)

    def at(self, times: Iterable[float]) -> list[int]:
        """Bytes held just after each of these times, which must be in order."""
        changes = sorted(self._changes, key=lambda change: change[0])
        count: dict[tuple[str, int], int] = defaultdict(int)
        now, done = 0, 0
        found = []
        for time in times:
            while done < len(changes) and changes[done][0] <= time:
                _, what, micro_batch, by = changes[done]
                for name, size in what.items():
                    before = count[name, micro_batch]
                    count[name, micro_batch] += by
                    now += size * ((before + by > 0) - (before > 0))
                done += 1
            found.append(now)
        return found


def _count_messages(
    ledgers: Sequence[_Ledger],
    line: TimeLine,
    routes: Routes,
    ended: Mapping[Action, float],
    value_bytes: Mapping[str, int],
) -> None:
    """Receivers hold what they have asked for until they use it, senders what no one has asked for."""
    posted = {}
    for rank, actions in enumerate(line.actions):
        for index, (action, _, end) in enumerate(actions):
            asked = actions[index - AHEAD - 1][2] if index > AHEAD else 0.0  # when the rank comes to that action
            for message in routes.needed[action]:
                posted[message] = asked
                ledgers[rank].hold(
                    asked, end, _named(message.value, message.backward, value_bytes), message.micro_batch
                )
    for action, messages in routes.sent.items():
        for message in messages:
            what = _named(message.value, message.backward, value_bytes)
            ledgers[message.origin].hold(ended[action], posted[message], what, message.micro_batch)


def _count_handed_over(
    ledgers: Sequence[_Ledger],
    edges: Sequence[Edge],
    ranks: Sequence[int],
    ended: Mapping[Action, float],
    value_bytes: Mapping[str, int],
) -> None:
    """Values wait for the last of their rank's stages that use them, gradients for all of them."""
    forward = {(a.stage, a.micro_batch): end for a, end in ended.items() if a.kind == "forward"}
    backward = {(a.stage, a.micro_batch): end for a, end in ended.items() if a.kind in ("backward", "backward_input")}
    for edge in edges:
        for rank in {ranks[user] for user in edge.users}:
            users = [user for user in edge.users if ranks[user] == rank]
            here = [edge.maker, *users] if ranks[edge.maker] == rank else users
            for m in {m for _, m in forward}:
                there = sorted(forward[stage, m] for stage in here)
                ledgers[rank].hold(there[0], there[-1], _named(edge.value, False, value_bytes), m)
                back = sorted(backward[stage, m] for stage in here)
                ledgers[rank].hold(back[0], back[-1], _named(edge.value, True, value_bytes), m)


def _named(value: str, backward: bool, value_bytes: Mapping[str, int]) -> Held:
    return {f"gradient of {value}" if backward else value: value_bytes.get(value, 0)}
