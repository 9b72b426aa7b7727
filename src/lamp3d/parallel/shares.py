"""How a mini-batch is shared among replicas and cut into micro-batches."""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree

from lamp3d.errors import PlanError


def own_share(of_all: Any, replica: int, replicas: int) -> Any:
    """One replica's part of a mini-batch's images or targets, of the same size as every other's.

    Args:
        of_all: tensors, or tuples or dicts of them, whose first axis is the batch; or a list with an entry for each
            micro-batch.

    Raises:
        PlanError: they cannot be shared evenly.
    """
    if replicas == 1 or of_all is None:
        return of_all
    if isinstance(of_all, list):
        return _part(of_all, len(of_all), replica, replicas)
    return pytree.tree_map(lambda leaf: _part(leaf, leaf.shape[0], replica, replicas), of_all)


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
