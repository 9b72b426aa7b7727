"""One stage at work: forward and backward of a micro-batch, with or without recomputation, whole or split.

Every micro-batch has its own autograd graph per stage. What a stage receives becomes a leaf of it; what it sends is
remembered only as a gradient edge, so that the tensor itself is free as soon as no one needs its content.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import checkpoint

from lamp3d.graph import DeferredWeights, Stage, ValueSpec, arithmetic, preserved_buffers
from lamp3d.space.ranks import Space
from lamp3d.space.saved import recomputed
from lamp3d.space.sharded import local_of
from lamp3d.space.slabs import placed

Specs = Mapping[str, ValueSpec]
"""What every value looks like, by name."""


@dataclass(frozen=True)
class StageCells:
    """A stage's cells as modules: all of them, and in runs that are, or are not, computed again in backward."""

    whole: Stage
    parts: Sequence[tuple[Stage, bool]]


@dataclass
class _Saved:
    """What one micro-batch leaves behind for its backward."""

    leaves: dict[str, Tensor]
    roots: dict[str, GradientEdge]
    deferred: DeferredWeights


class StageRunner:
    """Runs a stage for many micro-batches at once.

    Args:
        device: where it runs.
        precision: ``"fp32"`` or ``"bf16"``.
        split: whether weight gradients are computed apart, by :meth:`backward_weight`.
        space: the ranks with which this one shares its volumes.
    """

    def __init__(self, device: torch.device, precision: str, split: bool, space: Space | None = None):
        self.device = device
        self.precision = precision
        self.split = split
        self.space = space
        self._saved: dict[int, _Saved] = {}
        self._deferred: dict[int, DeferredWeights] = {}

    def infer(self, cells: StageCells, values: Mapping[str, Tensor], specs: Specs) -> dict[str, Tensor]:
        """Forward without autograd: the stage's outputs by name."""
        with torch.no_grad(), arithmetic(self.device, self.precision):
            return self._outputs(cells.whole, values, specs)

    def forward(
        self, micro_batch: int, cells: StageCells, values: Mapping[str, Tensor], specs: Specs
    ) -> dict[str, Tensor]:
        """Forward of one micro-batch: the outputs by name, detached from autograd but for their ``requires_grad``.

        Where cells are computed again in backward, random numbers are replayed, and buffers change only once.

        Args:
            micro_batch: its number, until its backward is done.
            cells: the stage, for inputs of the micro-batch's shape.
            values: the stage's inputs by name, as leaves of this micro-batch's graph (of a volume that is shared,
                this rank's slab).
            specs: what every value looks like.
        """
        leaves = {name: values[name] for name in cells.whole.inputs}
        deferred = DeferredWeights()
        made = dict(leaves)
        with torch.enable_grad(), self._arithmetic(deferred):
            for part, recompute in cells.parts:
                made |= self._recomputed(part, made, specs, deferred) if recompute else self._outputs(part, made, specs)
        outputs = {name: made[name] for name in cells.whole.outputs}
        self._saved[micro_batch] = _Saved(leaves, _edges(outputs), deferred)
        return {name: output.detach() for name, output in outputs.items()}

    def backward(self, micro_batch: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Backward of one micro-batch, adding to the parameters' gradients (where split: not the convolutions').

        Args:
            micro_batch: one that forward has run.
            gradients: with respect to the outputs, by name; outputs without one do not influence the loss.

        Returns:
            the gradients with respect to those inputs that have one.
        """
        saved = self._saved.pop(micro_batch)
        used = [name for name in gradients if name in saved.roots]
        if used:
            torch.autograd.backward([saved.roots[name] for name in used], [gradients[name] for name in used])
        if self.split:
            self._deferred[micro_batch] = saved.deferred
        return {name: leaf.grad for name, leaf in saved.leaves.items() if leaf.grad is not None}

    def backward_weight(self, micro_batch: int) -> None:
        """The part of a split backward that no other stage waits for."""
        self._deferred.pop(micro_batch).compute()

    def discard(self) -> None:
        """Forget all micro-batches (after an error in mid-step)."""
        self._saved.clear()
        self._deferred.clear()

    def _arithmetic(self, deferred: DeferredWeights) -> AbstractContextManager[None]:
        return arithmetic(self.device, self.precision, deferred if self.split else None)

    def _recomputed(
        self, part: Stage, values: Mapping[str, Tensor], specs: Specs, deferred: DeferredWeights
    ) -> dict[str, Tensor]:
        before = [(buffer, buffer.detach().clone()) for buffer in part.buffers()]

        def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
            return nullcontext(), self._again(part, deferred, before)

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            with recomputed():
                return tuple(self._outputs(part, dict(zip(part.inputs, tensors, strict=True)), specs).values())

        outputs = checkpoint(run, *(values[name] for name in part.inputs), use_reentrant=False, context_fn=contexts)
        return dict(zip(part.outputs, outputs, strict=True))

    def _outputs(self, stage: Stage, values: Mapping[str, Tensor], specs: Specs) -> dict[str, Tensor]:
        """What a stage makes of its inputs; of volumes that are shared, the slabs of both."""
        if self.space is None:
            return dict(zip(stage.outputs, stage(*(values[name] for name in stage.inputs)), strict=True))
        inputs = [placed(values[name], specs[name], self.space) for name in stage.inputs]
        return {name: local_of(made) for name, made in zip(stage.outputs, stage(*inputs), strict=True)}

    @contextmanager
    def _again(self, part: Stage, deferred: DeferredWeights, before: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """What a second forward runs in: it finds the buffers as the first one did, and leaves them as that one did."""
        with preserved_buffers(part), self._arithmetic(deferred):
            for buffer, content in before:
                buffer.data.copy_(content)  # as in `preserved_buffers`
            yield


def _edges(outputs: Mapping[str, Tensor]) -> dict[str, GradientEdge]:
    return {name: get_gradient_edge(output) for name, output in outputs.items() if output.requires_grad}
