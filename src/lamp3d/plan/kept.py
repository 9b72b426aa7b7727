"""What every run of cells keeps for its backward, of all runs at once.

A value counts once, however many cells of a run keep it: with the first of them. For each possible beginning of a run
the first keeper of every value is found; what a run keeps is then a sum over the values whose keeper it reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lamp3d.plan.partition import Matrix

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Keeping:
    """Which cells keep which values.

    Attributes:
        sizes: (V,) bytes of the values.
        maker: (V,) the cell that makes each; -1 for the network's inputs.
        reads, saves: (n, V) whether a cell gets a value from an earlier one, and saves it for its backward.
        output: (V,) whether a value is an output of the network, kept until the loss has seen it.
        internal: (n,) bytes that each cell saves beside values.
        blocks: the block that each cell is computed again with, or None.
    """

    sizes: NDArray[np.float64]
    maker: NDArray[np.int64]
    reads: Flags
    saves: Flags
    output: Flags
    internal: NDArray[np.float64]
    blocks: Sequence[int | None]

    def of_runs(self) -> tuple[Matrix, Matrix, Matrix]:
        """Bytes of every run.

        Returns:
            what a micro-batch holds between forward and backward; what its backward brings back, at most; and what it
            has brought back when its last cell's backward begins. Each (n + 1, n + 1), 0 where there is no run.
        """
        n = len(self.internal)
        again = np.array([block is not None for block in self.blocks])
        starts = [self.blocks.index(block) if block is not None else cell for cell, block in enumerate(self.blocks)]
        # A cell that is computed again keeps what its block gets from outside, all others what they save.
        inputs = self.reads & (self.maker < np.array(starts)[:, None])
        keeps = np.where(again[:, None], inputs, self.saves)
        keeps[n - 1] |= self.output
        begins = np.arange(n)[:, None]
        first = _next(keeps)
        # What comes from before the run is kept by all that read it.
        first = np.where(self.maker < begins, np.minimum(first, _next(self.reads)), first)
        held = self._sums(first, np.where(again, 0.0, self.internal))
        brought = np.zeros_like(held)
        for start in sorted({start for start, cell_again in zip(starts, again, strict=True) if cell_again}):
            end = next((c for c in range(start, n) if self.blocks[c] != self.blocks[start]), n)
            inside = np.zeros(n, dtype=bool)
            inside[start:end] = True
            saved = _next(self.saves & inside[:, None])
            of_block = self._sums(np.where(first > saved, saved, n), np.where(inside, self.internal, 0.0))
            brought[:, start + 1 : end + 1] = of_block[:, start + 1 : end + 1]
        brought = np.triu(brought, 1)
        return held, np.triu(np.maximum.accumulate(brought, axis=1), 1), brought

    def _sums(self, first: NDArray[np.int64], of_cells: NDArray[np.float64]) -> Matrix:
        """Of every run: the values whose first keeper it reaches, and what belongs to its cells."""
        n = len(of_cells)
        added = np.zeros((n + 1, n + 2))
        np.add.at(added, (np.arange(n)[:, None], first + 1), self.sizes)  # those without a keeper fall off the end
        added[:n, 1 : n + 1] += np.triu(np.broadcast_to(of_cells, (n, n)))
        return np.cumsum(added, axis=1)[:, : n + 1]


def _next(flags: Flags) -> NDArray[np.int64]:
    """Of every cell and value: the first cell from there on with the flag; n if there is none."""
    n = len(flags)
    where = np.where(flags, np.arange(n)[:, None], n)
    return np.minimum.accumulate(where[::-1], axis=0)[::-1]
