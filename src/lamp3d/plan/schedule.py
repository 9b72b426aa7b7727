"""Schedules: pure functions from (stages, micro-batches) to the order of actions of every stage.

A schedule only orders; the engine executes it and the simulator predicts it. A schedule is valid when every rank can
run its list front to back: a forward needs the forwards of the stages that feed it, a backward needs its own forward
and the backwards of the stages that it feeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "backward"]


@dataclass(frozen=True)
class Action:
    """One pass of one micro-batch through one stage."""

    kind: Kind
    stage: int
    micro_batch: int


def gpipe(stages: int, micro_batches: int) -> list[list[Action]]:
    """All forwards, then all backwards, last micro-batch first (paper §2.1, Fig. 2c; GPipe).

    ::

        stage 2             F0 F1 F2 F3 B3 B2 B1 B0
        stage 1          F0 F1 F2 F3       B3 B2 B1 B0
        stage 0       F0 F1 F2 F3             B3 B2 B1 B0
                      ------------------------------------> time

    Between the last forward and the first backward the last stage holds the outputs of the whole mini-batch, so the
    loss may be any function of them. The share of time that a stage is idle is (K - 1) / (M + K - 1).

    Args:
        stages: K, the number of stages.
        micro_batches: M.

    Returns:
        the actions of each stage, in order.
    """
    return [
        [Action("forward", stage, micro_batch) for micro_batch in range(micro_batches)]
        + [Action("backward", stage, micro_batch) for micro_batch in reversed(range(micro_batches))]
        for stage in range(stages)
    ]


SCHEDULES: dict[str, Callable[[int, int], list[list[Action]]]] = {"gpipe": gpipe}
"""The schedules by name, as a plan names them."""
