"""Schedules: pure functions from (stages, micro-batches) to the order of actions of every rank.

A schedule only orders; the engine executes it and the simulator predicts it. It is valid when every rank can run its
list front to back: a forward needs the forward of the stage before, a backward needs its own forward and the backward
of the stage behind. All but the interleaved one are made by one list scheduler (:func:`_in_order_of_readiness`): it
plays the mini-batch through with the stages' expected seconds and writes down what each rank did, so an order that
dead-locks cannot come out of it. A schedule is then a placement, a limit on micro-batches in flight, and a priority.

The backward of a stage may be split in two: ``backward_input`` gives the gradients that the stage before waits for,
``backward_weight`` those of the convolutions' weights, for which no one waits and which fill the bubbles.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lamp3d.errors import PlanError

Kind = Literal["forward", "backward", "backward_input", "backward_weight"]


class Action(NamedTuple):
    """One pass of one micro-batch through one stage."""

    kind: Kind
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class StageTimes:
    """What a schedule knows of a stage: the rank that runs it, and the expected seconds of one micro-batch.

    ``backward`` is all of it; ``weight`` is the part of it that the convolutions' weight gradients take.
    """

    rank: int
    forward: float = 1.0
    backward: float = 2.0
    weight: float = 1.0

    def seconds(self, kind: Kind) -> float:
        """How long an action of this stage takes."""
        seconds = {
            "forward": self.forward,
            "backward": self.backward,
            "backward_input": self.backward - self.weight,
            "backward_weight": self.weight,
        }
        return seconds[kind]


Actions = list[list[Action]]
Schedule = Callable[[Sequence[StageTimes], int], Actions]
Placement = Callable[[int], list[int]]


def straight(devices: int) -> list[int]:
    """One stage a rank, in order: rank k runs stage k."""
    return list(range(devices))


def looped(devices: int) -> list[int]:
    """Two stages a rank: 0 1 … K-1 0 1 … K-1. More, shorter stages fill the pipeline faster."""
    return [*range(devices), *range(devices)]


def folded_placement(devices: int) -> list[int]:
    """Down and up again: 0 1 … K-1 … 1 0. A U-Net's encoder level and its decoder level meet on one rank."""
    return [*range(devices), *range(devices - 2, -1, -1)]


def gpipe(stages: Sequence[StageTimes], micro_batches: int) -> Actions:
    """All forwards, then all backwards, last micro-batch first (paper §2.1, Fig. 2c; GPipe).

    ::

        rank 2             F0 F1 F2 F3 B3 B2 B1 B0
        rank 1          F0 F1 F2 F3       B3 B2 B1 B0
        rank 0       F0 F1 F2 F3             B3 B2 B1 B0
                     ------------------------------------> time

    Between the last forward and the first backward the last stage holds the outputs of the whole mini-batch, so the
    loss may be any function of them. The share of time that a stage is idle is (K - 1) / (M + K - 1), and a stage holds
    the activations of all M micro-batches at once.

    Args:
        stages: rank and expected seconds of each stage, in the network's order.
        micro_batches: M.

    Returns:
        the actions of each rank, in order.
    """
    return _in_order_of_readiness(stages, micro_batches, [micro_batches] * len(stages), loss_at_end=True).order


def one_f_one_b(stages: Sequence[StageTimes], micro_batches: int) -> Actions:
    """A backward as soon as one can run, otherwise a forward (PipeDream-flush, "1F1B").

    ::

        rank 2             F0 B0 F1 B1 F2 B2 F3 B3
        rank 1          F0 F1    B0 F2 B1 F3 B2    B3
        rank 0       F0 F1 F2       B0 F3 B1    B2    B3
                     ------------------------------------> time

    The bubble is GPipe's, but stage k of K holds the activations of at most K - k micro-batches. The loss is
    computed a micro-batch at a time, so it must be a mean over cases (see ``mean_over_cases``).

    Args:
        stages: rank and expected seconds of each stage, in the network's order.
        micro_batches: M.

    Returns:
        the actions of each rank, in order.
    """
    return _in_order_of_readiness(stages, micro_batches, _round_trips(stages)).order


def interleaved(stages: Sequence[StageTimes], micro_batches: int) -> Actions:
    """1F1B with two stages a rank, K apart (Megatron-LM's interleaved 1F1B), for any M.

    ::

        rank 1        a0 a1 b0 b1 B0 a2 A0 …     a: stage 1, b: stage 3; capitals: their backwards
        rank 0     a0 a1 b0 b1    …              a: stage 0, b: stage 2
                   ------------------------------------> time

    Stages are half as long, so the pipeline fills in half the time: the bubble is about half of 1F1B's. Every value
    crosses twice as many cuts. Micro-batches go through each stage in groups of K; the last group is filled up with
    micro-batches that are then left out, which leaves a valid order valid.

    Args:
        stages: rank and expected seconds of each stage, in the network's order; the placement is :func:`looped`.
        micro_batches: M.

    Returns:
        the actions of each rank, in order.
    """
    ranks = _ranks(stages)
    if [stage.rank for stage in stages] != looped(ranks):
        raise PlanError("the interleaved schedule needs its stages on ranks 0 1 … K-1 0 1 … K-1.")
    chunks = len(stages) // ranks
    filled = -(-micro_batches // ranks) * ranks
    passes = [(chunk, first + i) for first in range(0, filled, ranks) for chunk in range(chunks) for i in range(ranks)]
    order: Actions = []
    for rank in range(ranks):
        forwards = [Action("forward", chunk * ranks + rank, m) for chunk, m in passes]
        backwards = [Action("backward", (chunks - 1 - chunk) * ranks + rank, m) for chunk, m in passes]
        ahead = min(len(passes), 2 * (ranks - rank - 1) + (chunks - 1) * ranks)
        steady = [action for pair in zip(forwards[ahead:], backwards, strict=False) for action in pair]
        actions = forwards[:ahead] + steady + backwards[len(passes) - ahead :]
        order.append([action for action in actions if action.micro_batch < micro_batches])
    return order


def folded(stages: Sequence[StageTimes], micro_batches: int) -> Actions:
    """1F1B on a folded network: a rank holds an encoder level and its decoder level, whose skips stay with it.

    ::

        rank 1          m0    m1 M0    m2 M1              m: the deep levels, there and back
        rank 0       e0 e1 d0 D0 e2 …  E0 d1 D1 …         e, d: the upper levels of encoder and decoder
                     ------------------------------------> time

    Only the small tensors between levels travel. The rank of the uppermost level works at both ends of a micro-batch.

    Args:
        stages: rank and expected seconds of each stage, in the network's order.
        micro_batches: M.

    Returns:
        the actions of each rank, in order.
    """
    return _fastest(stages, micro_batches, split=False)


def zero_bubble_v(stages: Sequence[StageTimes], micro_batches: int) -> Actions:
    """The folded placement with the backward split; weight gradients wait until a rank would idle ("zero bubble V").

    ::

        rank 1          m0 m1 b0 m2 b1 w0 …              b: gradients of inputs, on which the other rank waits
        rank 0       e0 e1 e2 d0 b0 d1 w0 b1 …           w: gradients of weights, for which no one waits
                     ------------------------------------> time

    Args:
        stages: rank and expected seconds of each stage, in the network's order.
        micro_batches: M.

    Returns:
        the actions of each rank, in order.
    """
    return _fastest(stages, micro_batches, split=True)


SCHEDULES: dict[str, Schedule] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "folded": folded,
    "zero_bubble_v": zero_bubble_v,
}
"""The schedules by name, as a plan names them."""

PLACEMENTS: dict[str, Placement] = {
    "gpipe": straight,
    "1f1b": straight,
    "interleaved": looped,
    "folded": folded_placement,
    "zero_bubble_v": folded_placement,
}
"""Where a schedule wants its stages: the rank of each, for K devices."""


@functools.cache
def splits_backward(schedule: str) -> bool:
    """Whether a schedule computes weight gradients apart."""
    stages = [StageTimes(rank) for rank in PLACEMENTS[schedule](1)]
    return any(action.kind == "backward_weight" for of_rank in SCHEDULES[schedule](stages, 1) for action in of_rank)


def _ranks(stages: Sequence[StageTimes]) -> int:
    return 1 + max(stage.rank for stage in stages)


def _round_trips(stages: Sequence[StageTimes]) -> list[int]:
    """How many micro-batches each stage must hold to be busy while one is on its way to the last stage and back."""
    return [len(stages) - stage for stage in range(len(stages))]


def _fastest(stages: Sequence[StageTimes], micro_batches: int, *, split: bool) -> Actions:
    """The fastest order over several limits of micro-batches in flight; among those within 1 %, the least in flight.

    Ranks with several stages of unequal length leave no formula for the right limit; playing a few takes milliseconds.
    """
    ranks = _ranks(stages)
    plays = [
        _in_order_of_readiness(stages, micro_batches, [trip + more for trip in _round_trips(stages)], split=split)
        for more in range(-(ranks // 2), ranks + 2)
    ]
    best = min(play.seconds for play in plays)
    return min((play for play in plays if play.seconds <= 1.01 * best), key=lambda play: play.most_in_flight).order


class _Play:
    """A mini-batch under way on paper: what is done and until when, and which action each rank may take next."""

    def __init__(
        self, stages: Sequence[StageTimes], micro_batches: int, windows: Sequence[int], split: bool, loss_at_end: bool
    ):
        self.stages, self.micro_batches, self.windows = stages, micro_batches, windows
        self.loss_at_end, self.split = loss_at_end, split
        self.backward: Kind = "backward_input" if split else "backward"
        self.end: dict[Action, float] = {}
        self.free = [0.0] * _ranks(stages)
        self.order: Actions = [[] for _ in self.free]
        self.forwards, self.backwards, self.weights = ([0] * len(stages) for _ in range(3))
        self.most_in_flight = 0
        self._stages_of = [
            [s for s, stage in enumerate(stages) if stage.rank == rank] for rank in range(len(self.free))
        ]
        self._known: list[list[tuple[float, Action]] | None] = [None] * len(self.free)

    @property
    def seconds(self) -> float:
        """The end of the last action."""
        return max(self.end.values())

    def candidates(self, rank: int) -> list[tuple[float, Action]]:
        """The rank's possible next actions, in order of preference, and when each could begin at the earliest."""
        if (known := self._known[rank]) is None:
            known = self._known[rank] = self._candidates(rank)
        return known

    def _candidates(self, rank: int) -> list[tuple[float, Action]]:
        mine, last = self._stages_of[rank], len(self.stages) - 1
        found = []
        for make in (self._next_backward, self._next_forward, self._next_weight):
            # Deep stages first: a micro-batch that is nearly through frees what it holds soonest. GPipe has no
            # backward to hurry for; shallow stages first keep the other ranks fed.
            order = mine if self.loss_at_end and make == self._next_forward else reversed(mine)
            for stage in order:
                if (action := make(stage)) is None:
                    continue
                ends = [self.end.get(need, math.inf) for need in needs(action, last)]
                if (ready := max([self.free[rank], *ends])) < math.inf:
                    found.append((ready, action))
        return found

    def take(self, begin: float, action: Action) -> None:
        """An action is done from ``begin`` on."""
        stage = self.stages[action.stage]
        self.free[stage.rank] = self.end[action] = begin + stage.seconds(action.kind)
        done = {"forward": self.forwards, "backward_weight": self.weights}.get(action.kind, self.backwards)
        done[action.stage] += 1
        self.order[stage.rank].append(action)
        let_go = self.weights if self.split else self.backwards
        held = sum(self.forwards[s] - let_go[s] for s in self._stages_of[stage.rank])
        self.most_in_flight = max(self.most_in_flight, held)
        for other in range(max(0, action.stage - 1), min(len(self.stages), action.stage + 2)):
            self._known[self.stages[other].rank] = None  # something that it waits for may be there

    def _next_forward(self, stage: int) -> Action | None:
        micro_batch = self.forwards[stage]
        let_go = (self.weights if self.split else self.backwards)[stage]
        if micro_batch == self.micro_batches or micro_batch - let_go >= max(1, self.windows[stage]):
            return None
        return Action("forward", stage, micro_batch)

    def _next_backward(self, stage: int) -> Action | None:
        count = self.backwards[stage]
        if count == self.micro_batches or (self.loss_at_end and self.forwards[-1] < self.micro_batches):
            return None
        return Action(self.backward, stage, self.micro_batches - 1 - count if self.loss_at_end else count)

    def _next_weight(self, stage: int) -> Action | None:
        micro_batch = self.weights[stage]
        return (
            Action("backward_weight", stage, micro_batch) if micro_batch < self.backwards[stage] * self.split else None
        )


def _in_order_of_readiness(
    stages: Sequence[StageTimes],
    micro_batches: int,
    windows: Sequence[int],
    *,
    split: bool = False,
    loss_at_end: bool = False,
) -> _Play:
    """Play the mini-batch through: the rank that can begin something first takes what it prefers of what is ready.

    Args:
        stages: rank and expected seconds of each stage.
        micro_batches: M.
        windows: how many micro-batches a stage may hold at once (at least 1); it takes no new forward before one is
            let go. The oldest micro-batch is never held up, so that there is always something that can be done.
        split: whether weight gradients are actions of their own; they come last in preference.
        loss_at_end: whether the first backward waits for all forwards; backwards then run last micro-batch first.
    """
    play = _Play(stages, micro_batches, windows, split, loss_at_end)
    for _ in range(len(stages) * micro_batches * (3 if split else 2)):
        possible = [found for rank in range(len(play.order)) if (found := play.candidates(rank))]
        candidates = min(possible, key=lambda found: min(begin for begin, _ in found))
        first = min(begin for begin, _ in candidates)
        play.take(*next(candidate for candidate in candidates if candidate[0] == first))
    return play


def most_in_flight(actions: Actions) -> list[int]:
    """How many micro-batches each stage holds at most."""
    stages = 1 + max(action.stage for of_rank in actions for action in of_rank)
    held, most = [0] * stages, [0] * stages
    split = any(action.kind == "backward_weight" for of_rank in actions for action in of_rank)
    for action in (action for of_rank in actions for action in of_rank):
        held[action.stage] += action.kind == "forward"
        held[action.stage] -= action.kind == ("backward_weight" if split else "backward")
        most[action.stage] = max(most[action.stage], held[action.stage])
    return most


def needs(action: Action, last: int) -> list[Action]:
    """What must be done before an action can run, beside the actions before it on its own rank.

    Args:
        action: of any rank.
        last: the last stage.
    """
    stage, micro_batch = action.stage, action.micro_batch
    if action.kind == "forward":
        return [Action("forward", stage - 1, micro_batch)] if stage else []
    if action.kind == "backward_weight":
        return [Action("backward_input", stage, micro_batch)]
    behind = [] if stage == last else [Action(action.kind, stage + 1, micro_batch)]
    return [Action("forward", stage, micro_batch), *behind]
