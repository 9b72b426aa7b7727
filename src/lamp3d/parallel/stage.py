"""One stage at work: forward and backward of a micro-batch, with or without recomputation.

Every micro-batch has its own autograd graph per stage. What a stage receives becomes a leaf of it; what it sends is
remembered only as a gradient edge, so that the tensor itself is free as soon as no one needs its content.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lamp3d.graph import Stage, autocast, preserved_buffers


@dataclass
class _Saved:
    """What one micro-batch leaves behind for its backward."""

    leaves: dict[str, Tensor]
    roots: dict[str, GradientEdge] | None  # None: to be recomputed
    random_state: tuple[Tensor, Tensor | None] | None = None


class StageRunner:
    """Runs a :class:`Stage` for many micro-batches at once.

    Args:
        stage: the cells.
        device: where they run.
        precision: ``"fp32"`` or ``"bf16"``.
        recompute: whether backward runs forward again instead of keeping activations; random numbers are replayed.
    """

    def __init__(self, stage: Stage, device: torch.device, precision: str, recompute: bool):
        self.stage = stage
        self.device = device
        self.precision = precision
        self.recompute = recompute
        self._saved: dict[int, _Saved] = {}

    def infer(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Forward without autograd: the stage's outputs by name."""
        with torch.no_grad():
            return self._run(values)

    def forward(self, micro_batch: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Forward of one micro-batch: the outputs by name, detached from autograd but for their ``requires_grad``."""
        leaves = {name: values[name] for name in self.stage.inputs}
        if self.recompute:
            saved = _Saved(leaves, None, _random_state(self.device))
            outputs = self.infer(leaves)
        else:
            with torch.enable_grad():
                outputs = self._run(leaves)
            saved = _Saved(leaves, _edges(outputs))
        self._saved[micro_batch] = saved
        return {name: output.detach() for name, output in outputs.items()}

    def backward(self, micro_batch: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Backward of one micro-batch, adding to the parameters' gradients.

        Args:
            micro_batch: one that forward has run.
            gradients: with respect to the outputs, by name; outputs without one do not influence the loss.

        Returns:
            the gradients with respect to those inputs that have one.
        """
        saved = self._saved.pop(micro_batch)
        roots = saved.roots
        if roots is None:
            assert saved.random_state is not None
            with preserved_buffers(self.stage), _replayed(saved.random_state, self.device), torch.enable_grad():
                roots = _edges(self._run(saved.leaves))
        used = [name for name in gradients if name in roots]
        if used:
            torch.autograd.backward([roots[name] for name in used], [gradients[name] for name in used])
        return {name: leaf.grad for name, leaf in saved.leaves.items() if leaf.grad is not None}

    def discard(self) -> None:
        """Forget all micro-batches (after an error in mid-step)."""
        self._saved.clear()

    def _run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with autocast(self.device, self.precision):
            outputs = self.stage(*(values[name] for name in self.stage.inputs))
        return dict(zip(self.stage.outputs, outputs, strict=True))


def _edges(outputs: Mapping[str, Tensor]) -> dict[str, GradientEdge]:
    return {name: get_gradient_edge(output) for name, output in outputs.items() if output.requires_grad}


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _replayed(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Random numbers as they were at ``state``; afterwards as they would have been without the replay."""
    cpu, cuda = state
    with torch.random.fork_rng([device] if cuda is not None else []):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        yield
