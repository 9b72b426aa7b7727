"""Micro-batches without gradients: at every tick each stage does the one that the stage before did at the last tick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lamp3d.graph import Edge
from lamp3d.parallel.programs import Program
from lamp3d.parallel.step import Rank
from lamp3d.parallel.transfer import Receipt

UNDER_WAY = 32
"""Sends to one destination, at most; bounds the memory of a rank that runs ahead of the next one."""


class Conveyor:
    """One rank's part of a stream of micro-batches, as many as there are, of any shapes.

    ::

        tick       0   1   2   3   4   5          stage s does micro-batch t - s at tick t: a rank with several
        stage 2            0   1   2   3          stages does the deepest first, and none waits for what another
        stage 1        0   1   2   3              rank does at the same tick
        stage 0    0   1   2   3

    Args:
        rank: what the rank works with.
    """

    def __init__(self, rank: Rank):
        self._rank = rank
        self._programs: list[Program] = []
        self._inputs: dict[int, Mapping[str, Tensor]] = {}
        self._values: dict[tuple[str, int], tuple[Tensor | Receipt, int]] = {}
        # Messages of one tick, in the order in which their makers' ranks send them.
        self._edges = sorted(rank.edges, key=lambda edge: -edge.maker)
        self._tick = 0

    def put(self, program: Program, inputs: Mapping[str, Tensor] | None) -> None:
        """One more micro-batch; a rank that does not read the input may learn of it one tick later than it begins."""
        if inputs is not None:
            self._inputs[len(self._programs)] = inputs
        self._programs.append(program)

    @property
    def unfinished(self) -> bool:
        """Whether a micro-batch has yet to leave the last stage."""
        return self._tick - self._rank.last < len(self._programs)

    def advance(self) -> tuple[bool, Any]:
        """One tick.

        Returns:
            whether a micro-batch has left the last stage (known to all ranks), and its output on the rank of that
            stage.
        """
        rank, tick = self._rank, self._tick
        for edge in self._edges:
            if rank.ranks[edge.maker] != rank.index and rank.users_here(edge):
                self._receive(edge, tick - 1 - edge.maker)
        output = None
        for stage in sorted(rank.runners, reverse=True):
            if 0 <= tick - stage < len(self._programs):
                values = self._forward(stage, tick - stage)
                if stage == rank.last:
                    output = self._programs[tick - stage].output(values, rank.space)
        # Not in a step, where the schedule bounds it, and who is waited for may be waiting for this rank.
        rank.transfer.hold_back(UNDER_WAY)
        self._tick += 1
        return 0 <= tick - rank.last < len(self._programs), output

    def _receive(self, edge: Edge, micro_batch: int) -> None:
        if 0 <= micro_batch < len(self._programs):
            origin, spec = self._rank.ranks[edge.maker], self._programs[micro_batch].specs[edge.value]
            receipt = self._rank.transfer.receive(spec, origin, self._rank.tag(edge.value, micro_batch, False))
            self._values[edge.value, micro_batch] = receipt, self._rank.users_here(edge)

    def _forward(self, stage: int, micro_batch: int) -> dict[str, Tensor]:
        rank, program = self._rank, self._programs[micro_batch]
        values: dict[str, Tensor] = {}
        if stage == 0:
            values |= self._inputs.pop(micro_batch)
        for edge in rank.incoming(stage):
            values[edge.value] = self._take(edge.value, micro_batch)
        values |= rank.runners[stage].infer(program.stages[stage], values, program.specs)
        for edge in rank.outgoing(stage):
            spec = program.specs[edge.value]
            for to in rank.user_ranks(edge):
                if to == rank.index:
                    self._values[edge.value, micro_batch] = values[edge.value], rank.users_here(edge)
                else:
                    rank.transfer.send(values[edge.value], spec, to, rank.tag(edge.value, micro_batch, False))
        return values

    def _take(self, value: str, micro_batch: int) -> Tensor:
        held, users = self._values.pop((value, micro_batch))
        tensor = held.wait() if isinstance(held, Receipt) else held
        if users > 1:
            self._values[value, micro_batch] = tensor, users - 1
        return tensor
