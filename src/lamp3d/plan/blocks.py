"""Which cells to compute again in backward: blocks that bring back much memory for little time.

A block is computed again as a whole: until then only what it receives is held. Small blocks hold more of that, large
ones bring back more at once. For several sizes, the network is cut into blocks that receive as little as possible; of
these, those are computed again first whose second forward costs the least for the memory that it saves.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from lamp3d.plan.costs import StageCosts
from lamp3d.plan.partition import Matrix, pairs

PARTS = (2, 3, 4, 6, 8, 12, 16)
"""A block brings back at most such a part of what the whole network saves."""

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the blocks, the most profitable first."""


@dataclass(frozen=True)
class Block:
    """The cells begin … end-1: bytes that their recomputation saves, and the seconds that it takes."""

    begin: int
    end: int
    saves: float
    seconds: float


class Blocks:
    """The ways to recompute in blocks.

    Args:
        costs: of the network's cells, nothing computed again.
    """

    def __init__(self, costs: StageCosts):
        self._costs = costs
        saved, received = costs.held_bytes, costs.received_bytes
        everything = float(saved[0, -1])
        names = [cell.name for cell in costs.graph.cells]
        self._choices: dict[tuple[tuple[str, ...], ...], tuple[float, float]] = {}
        for part in PARTS:
            blocks = self._cut(saved, received, everything / part)
            ranked = sorted(
                (block for block in blocks if block.saves > 0), key=lambda block: block.seconds / block.saves
            )
            for share in SHARES:
                chosen = sorted(ranked[: round(share * len(ranked))], key=lambda block: block.begin)
                if chosen:
                    key = tuple(tuple(names[block.begin : block.end]) for block in chosen)
                    # One of them at a time is there again.
                    held = everything - sum(block.saves for block in chosen) + max(block.saves for block in chosen)
                    self._choices[key] = sum(block.seconds for block in chosen), held

    def choices(self) -> list[tuple[tuple[str, ...], ...]]:
        """Blocks of cells by name, those first whose recomputation takes the least time."""
        return sorted(self._choices, key=lambda blocks: self._choices[blocks][0])

    def frugal(self, count: int) -> list[tuple[tuple[str, ...], ...]]:
        """So many of them, those first that leave the fewest bytes held (beside what single cells need)."""
        return sorted(self._choices, key=lambda blocks: self._choices[blocks][1])[:count]

    def _cut(self, saved: Matrix, received: Matrix, most: float) -> list[Block]:
        """The network in blocks that save at most so much, or are one cell, and receive as little as possible."""
        n = len(self._costs.graph.cells)
        begins, ends = np.indices((n + 1, n + 1))
        allowed = pairs(n) & ((saved <= most) | (ends == begins + 1))
        value = np.full(n + 1, np.inf)
        value[0], cut = 0.0, np.zeros(n + 1, dtype=int)
        for end in range(1, n + 1):
            of = np.where(allowed[:end, end], value[:end] + received[:end, end], np.inf)
            cut[end] = of.argmin()
            value[end] = of[cut[end]]
        bounds = [n]
        while bounds[-1]:
            bounds.append(int(cut[bounds[-1]]))
        bounds.reverse()
        return [
            Block(i, j, saved[i, j] - received[i, j], self._costs.forward_seconds(i, j))
            for i, j in itertools.pairwise(bounds)
        ]
