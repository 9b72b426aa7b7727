"""How a mini-batch is shared among replicas and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from lamp3d.errors import PlanError


def own_share(of_all: Any, replica: int, replicas: int, *, listed: bool, batch: int | None = None) -> Any:
    """One replica's part of a mini-batch's images or targets, of the same size as every other's.

    Args:
        of_all: tensors, or tuples, lists or dicts of them, whose first axis is the batch; or a sequence with an entry
            for each micro-batch.
        replica: which one's.
        replicas: how many there are.
        listed: whether it is such a sequence.
        batch: of the mini-batch, where it is known; else the first tensor's.

    Raises:
        PlanError: they cannot be shared evenly, or a tensor's first axis is not the batch.
    """
    if replicas == 1 or of_all is None:
        return of_all
    if listed:
        return _part(of_all, len(of_all), replica, replicas)
    leaves, structure = pytree.tree_flatten(of_all)
    check_batch(leaves, leaves[0].shape[0] if batch is None else batch, "shared among replicas")
    return pytree.tree_unflatten([_part(leaf, leaf.shape[0], replica, replicas) for leaf in leaves], structure)


def check_batch(leaves: Sequence[Any], batch: int, how: str) -> None:
    """Whether images or targets are tensors along whose first axis the cases lie.

    Raises:
        PlanError: one is not.
    """
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != batch:
            shown = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise PlanError(
                f"a mini-batch is {how} along the first axis of its images and targets, which must be the batch of "
                f"{batch}; one of them is {shown}."
            )


def micro_batch_sizes(batch: int, micro_batches: int) -> list[int]:
    """Sizes of the micro-batches: as even as can be, the larger ones first."""
    count = min(batch, micro_batches)
    return [batch // count + (index < batch % count) for index in range(count)]


def _part(entries: Any, count: int, replica: int, replicas: int) -> Any:
    if count % replicas:
        raise PlanError(
            f"a mini-batch of {count} cannot be shared evenly among {replicas} replicas; take a multiple of {replicas}."
        )
    size = count // replicas
    return entries[replica * size : (replica + 1) * size]
