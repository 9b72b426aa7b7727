"""The loss of a mini-batch: of all of it at once, or a micro-batch at a time where it is a mean over cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lamp3d.errors import PlanError
from lamp3d.parallel.shares import check_batch

LossFunction = Callable[[Any, Any], Tensor]
Loss = TypeVar("Loss", bound=Callable[..., Tensor])


class MiniBatchLoss:
    """How the loss of a mini-batch comes from its micro-batches' outputs.

    Args:
        loss_fn: ``loss_fn(output, targets)`` -> 0-dim.
        targets: for the whole mini-batch, or a list with one entry for each of a list of images; None elsewhere.
        sizes: cases in each micro-batch.
        replicas: over how many equal mini-batches the loss is the mean.
        sharers: how many ranks compute the same loss, of a volume that they share.
        listed: whether the images came as a list; the loss is then the mean over its elements.
        at_end: whether all forwards precede the first backward.

    Raises:
        PlanError: the schedule needs a micro-batch's loss before the others' outputs are there, and ``loss_fn`` has
            not been declared to be a mean over cases.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        targets: Any,
        sizes: Sequence[int],
        *,
        listed: bool,
        at_end: bool,
        replicas: int = 1,
        sharers: int = 1,
    ):
        by_case = getattr(loss_fn, "mean_over_cases", False)
        if replicas > 1 and not (listed or by_case):
            raise PlanError(
                "every replica sees its share of the mini-batch, which is only right for a loss that is a mean over "
                "cases. If yours is, say so: lamp3d.mean_over_cases(loss_fn); if not, take data=1."
            )
        self.whole = not listed and (len(sizes) == 1 or not by_case)
        if self.whole and len(sizes) > 1 and not at_end:
            raise PlanError(
                "this schedule needs the loss of each micro-batch before the others' outputs are there, which is only "
                "right for a loss that is a mean over cases. If yours is, say so: lamp3d.mean_over_cases(loss_fn); "
                "if not, take schedule='gpipe'."
            )
        self._loss_fn = loss_fn
        self._share = replicas * sharers
        self._sizes = sizes
        self._targets = targets if listed or self.whole or targets is None else _cut(targets, sizes)
        self._weights = [(1 / len(sizes) if listed else size / sum(sizes)) / self._share for size in sizes]

    def backward(self, micro_batches: Sequence[int], outputs: Sequence[Any]) -> Tensor:
        """The loss of some micro-batches, and its gradients in the outputs' ``grad``; 0-dim float64 on the CPU."""
        with torch.enable_grad():
            if self.whole:
                loss = self._loss_fn(concatenate(outputs), self._targets) / self._share
            else:
                (micro_batch,) = micro_batches
                targets = None if self._targets is None else self._targets[micro_batch]
                loss = self._loss_fn(outputs[0], targets) * self._weights[micro_batch]
            if not loss.requires_grad:
                raise PlanError(
                    "the loss has no gradient in any parameter: all are frozen, or the loss function takes the output "
                    "out of autograd (detach, argmax, a comparison). Train something, or use engine.forward."
                )
            torch.autograd.backward(loss)
        return loss.detach().double().cpu()


def mean_over_cases(loss_fn: Loss) -> Loss:
    """Declare that a loss is the mean over its cases: ``loss(batch) == mean(loss(case) for case in batch)``.

    Only then may a schedule such as 1F1B compute it a micro-batch at a time. Nothing checks it; ``lamp3d verify`` does.
    """
    loss_fn.mean_over_cases = True  # type: ignore[attr-defined]
    return loss_fn


def concatenate(outputs: Sequence[Any]) -> Any:
    """Micro-batches' outputs (tensors, or tuples, lists, dicts of them) joined along the batch.

    Raises:
        PlanError: one of them is a single number, for which there is no batch.
    """
    if len(outputs) == 1:
        return outputs[0]
    return pytree.tree_map(_joined, outputs[0], *outputs[1:])


def _joined(*pieces: Any) -> Any:
    if not isinstance(pieces[0], Tensor):
        return pieces[0]
    if pieces[0].dim() == 0:
        raise PlanError(
            f"the network gives a single number for {len(pieces)} micro-batches, which cannot be joined; make a plan "
            "with micro_batches=1 and data=1, or let the network give one number a case."
        )
    return torch.cat(pieces)


def _cut(targets: Any, sizes: Sequence[int]) -> list[Any]:
    """A mini-batch's targets (tensors, or tuples, lists, dicts of them), a piece for each micro-batch."""
    leaves, structure = pytree.tree_flatten(targets)
    check_batch(leaves, sum(sizes), "cut into micro-batches (all but by schedule='gpipe')")
    pieces = zip(*(leaf.split(list(sizes)) for leaf in leaves), strict=True)
    return [pytree.tree_unflatten(piece, structure) for piece in pieces]
