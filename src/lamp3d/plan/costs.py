"""Seconds and bytes of any contiguous run of cells, from the profile."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lamp3d.graph import CellGraph
from lamp3d.plan.kept import Keeping
from lamp3d.plan.options import ADAMW_COPIES
from lamp3d.plan.partition import Matrix
from lamp3d.plan.plan import Recompute, blocks_of
from lamp3d.plan.profile import Profile

Held = dict[str, int]
"""Bytes by name. A value has the same name wherever it is held, so that a rank that holds it twice pays once."""


@dataclass(frozen=True)
class StageCosts:
    """Seconds and bytes of any contiguous run of cells.

    Args:
        graph: the cells.
        profile: what each of them costs for one micro-batch.
        micro_batches: M.
        recompute: "never", "always", or the blocks of cells that are computed again in backward.
        loss_at_once: whether the loss sees all micro-batches' outputs together, or each by itself.
        optimizer_copies: the optimizer's state, in units of the parameters.
    """

    graph: CellGraph
    profile: Profile
    micro_batches: int
    recompute: Recompute
    loss_at_once: bool = True
    optimizer_copies: int = ADAMW_COPIES

    @cached_property
    def _maker(self) -> dict[str, int]:
        return {edge.value: edge.maker for edge in self.graph.edges}

    @cached_property
    def _users(self) -> dict[str, tuple[int, ...]]:
        return {edge.value: edge.users for edge in self.graph.edges}

    @cached_property
    def blocks(self) -> list[int | None]:
        """The block that each cell is computed again with."""
        return blocks_of(self.recompute, [cell.name for cell in self.graph.cells])

    @cached_property
    def seconds(self) -> Matrix:
        """Of every run."""
        return _runs(np.cumsum([0.0, *self._cell_seconds]))

    @cached_property
    def _memory(self) -> tuple[Matrix, Matrix, Matrix]:
        """Of every run: what a micro-batch holds between forward and backward, and what its backward brings back.

        The latter at most, and when its last cell's backward begins.
        """
        names = {name: index for index, name in enumerate(self.profile.value_bytes)}
        reads, saves = (np.zeros((len(self.profile.cells), len(names)), dtype=bool) for _ in range(2))
        maker = np.full(len(names), len(self.profile.cells))  # no edge: no other cell gets it
        for edge in self.graph.edges:
            maker[names[edge.value]] = edge.maker
            reads[list(edge.users), names[edge.value]] = True
        for index, cell in enumerate(self.profile.cells):
            saves[index, [names[value] for value in cell.saved_values]] = True
        output = np.zeros(len(names), dtype=bool)
        output[[names[value] for value in self.graph.outputs]] = True
        return Keeping(
            sizes=np.array(list(self.profile.value_bytes.values()), dtype=float),
            maker=maker,
            reads=reads,
            saves=saves,
            output=output,
            internal=np.array([cell.internal_bytes for cell in self.profile.cells], dtype=float),
            blocks=self.blocks,
        ).of_runs()

    @property
    def held_bytes(self) -> Matrix:
        """Of every run: what a micro-batch holds between its forward and its backward."""
        return self._memory[0]

    @cached_property
    def static(self) -> Matrix:
        """Of every run: what is needed whatever is in flight."""
        parameters = _runs(np.cumsum([0.0, *(cell.parameter_bytes for cell in self.profile.cells)]))
        needed = parameters * (2 + self.optimizer_copies)
        needed[:-1, -1] += self.loss_bytes()
        return needed

    @cached_property
    def crossing(self) -> NDArray[np.float64]:
        """Before each cell: bytes of the values alive there, what one more cut would send, forward only."""
        alive = np.zeros(len(self.graph.cells) + 1)
        for value, maker in self._maker.items():
            alive[maker + 1 : self._users[value][-1] + 1] += self.profile.value_bytes[value]
        return alive

    @cached_property
    def exchanged(self) -> Matrix:
        """Of every run: bytes of the values that pass between it and all others, forward only."""
        inside = np.zeros((len(self.graph.cells) + 1, len(self.graph.cells) + 1))
        concerned = {value: sorted({max(maker, 0), *self._users[value]}) for value, maker in self._maker.items()}
        for value, cells in concerned.items():
            inside[: cells[0] + 1, cells[-1] + 1 :] += self.profile.value_bytes[value]
        return self._touched((-1, cells, value) for value, cells in concerned.items()) - inside

    @cached_property
    def received_bytes(self) -> Matrix:
        """Of every run: bytes of the values that it receives."""
        return self._touched((maker, self._users[value], value) for value, maker in self._maker.items())

    def _touched(self, values: Iterable[tuple[int, Sequence[int], str]]) -> Matrix:
        """Of every run: bytes of values, of which each counts where the run begins after a cell and has one of others.

        Args:
            values: that cell, those that come after it, in order, and the value.
        """
        steps = np.zeros((len(self.graph.cells) + 1, len(self.graph.cells) + 1))  # from runs that end a cell earlier
        for after, cells, value in values:
            for before, cell in itertools.pairwise((after, *cells)):
                steps[before + 1 : cell + 1, cell + 1] += self.profile.value_bytes[value]
        return np.triu(np.cumsum(steps, axis=1), 1)

    def peak(self, in_flight: int) -> Matrix:
        """Of every run: peak memory with so many micro-batches in flight, if its rank has no other runs."""
        held, again, _ = self._memory
        beside = again + self.workspace_bytes
        beside[:-1, -1] = np.maximum(beside[:-1, -1], self._loss_workspace)
        return self.static + in_flight * held + beside

    @cached_property
    def workspace_bytes(self) -> Matrix:
        """Of every run: the most that is alive beside it while one of its cells is at work."""
        n = len(self.graph.cells)
        sizes = np.zeros((n + 1, n + 1))
        sizes[:-1, 1:] = np.triu(np.broadcast_to([float(cell.workspace_bytes) for cell in self.profile.cells], (n, n)))
        return np.maximum.accumulate(sizes, axis=1)

    @property
    def _cell_seconds(self) -> list[float]:
        return [
            cell.forward_seconds + cell.backward_seconds + (0.0 if block is None else cell.forward_seconds)
            for cell, block in zip(self.profile.cells, self.blocks, strict=True)
        ]

    def forward_seconds(self, begin: int, end: int) -> float:
        """One micro-batch's forward through the cells begin … end-1."""
        return sum(cell.forward_seconds for cell in self.profile.cells[begin:end])

    def backward_seconds(self, begin: int, end: int) -> float:
        """One micro-batch's backward, the second forward of recomputation included."""
        cells = zip(self.profile.cells[begin:end], self.blocks[begin:end], strict=True)
        return sum(cell.backward_seconds + (0.0 if block is None else cell.forward_seconds) for cell, block in cells)

    def weight_seconds(self, begin: int, end: int) -> float:
        """The part of the backward that may be computed apart."""
        return sum(cell.weight_seconds for cell in self.profile.cells[begin:end])

    def received(self, begin: int, end: int) -> list[str]:
        """The values that a run of cells gets from earlier ones."""
        return [
            value
            for value, maker in self._maker.items()
            if maker < begin and any(begin <= user < end for user in self._users[value])
        ]

    def parameter_bytes(self, begin: int, end: int) -> int:
        """Bytes of the parameters alone."""
        return sum(cell.parameter_bytes for cell in self.profile.cells[begin:end])

    def static_bytes(self, begin: int, end: int) -> int:
        """What is needed whatever is in flight: parameters, gradients, optimizer state, and at the end the loss."""
        loss = self.loss_bytes() if end == len(self.profile.cells) else 0
        return self.parameter_bytes(begin, end) * (2 + self.optimizer_copies) + loss

    def loss_bytes(self) -> int:
        """What the loss leaves beside the outputs: their gradient, and if it sees all at once, what joined them."""
        outputs = sum(self.profile.value_bytes[value] for value in self.graph.outputs)
        return outputs * (2 * self.micro_batches if self._joins else 1)

    @property
    def _joins(self) -> bool:
        return self.loss_at_once and self.micro_batches > 1

    @property
    def _loss_workspace(self) -> int:
        """What the loss has alive for a moment beside that."""
        return self.profile.loss_bytes * (self.micro_batches if self._joins else 1)

    def held(self, begin: int, end: int) -> Held:
        """What one micro-batch holds between its forward and its backward."""
        held: Held = {}
        for first, last, again in self._parts(begin, end):
            held |= self._values([*self.received(first, last)]) if again else self._saved(first, last)
        if end == len(self.profile.cells):
            held |= self._values(self.graph.outputs)  # until the loss has seen them
        return held | self._values(self.received(begin, end))

    def backward_bytes(self, begin: int, end: int) -> int:
        """What the backward of one micro-batch needs at most beside what was held before it.

        When a cell's backward runs, what later cells held is free again; what the run has received is not.
        """
        held, _, brought = self._memory
        ends = np.arange(begin + 1, end + 1)
        received = self.received_bytes[begin, end] - self.received_bytes[begin, ends]
        at_work = np.array([cell.workspace_bytes for cell in self.profile.cells[begin:end]])
        most = int((held[begin, ends] - held[begin, end] + received + brought[begin, ends] + at_work).max())
        return max(most, self._loss_workspace) if end == len(self.profile.cells) else most

    def deferred(self, begin: int, end: int) -> Held:
        """What one micro-batch holds between the two parts of a split backward."""
        held: Held = {}
        for cell in self.profile.cells[begin:end]:
            held |= {f"{cell.name}, deferred": cell.deferred_bytes} | self._values(cell.deferred_values)
        return held

    def _saved(self, begin: int, end: int) -> Held:
        cells = self.profile.cells[begin:end]
        held = self._values([value for cell in cells for value in cell.saved_values])
        return held | {f"{cell.name}, saved": cell.internal_bytes for cell in cells}

    def _values(self, values: Collection[str]) -> Held:
        return {value: self.profile.value_bytes[value] for value in values}

    def _parts(self, begin: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """A run's cells in parts that are, or are not, computed again."""
        first = begin
        for cell in range(begin + 1, end + 1):
            if cell == end or self.blocks[cell] != self.blocks[first]:
                yield first, cell, self.blocks[first] is not None
                first = cell


def runs(starts: Sequence[int], n_cells: int) -> Iterator[tuple[int, int]]:
    """The (first, last + 1) cells of the stages that begin at ``starts``."""
    return zip(starts, [*starts[1:], n_cells], strict=True)


def _runs(sums: NDArray[np.float64]) -> Matrix:
    return np.triu(sums[None, :] - sums[:, None])
