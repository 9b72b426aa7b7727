"""Between the engine, which moves ordinary tensors, and networks and losses, which see volumes that ranks share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from lamp3d.graph import ValueSpec, laid_out, spec_of
from lamp3d.space import pointwise, resize, statistics, windows  # noqa: F401 (they declare the operations)
from lamp3d.space.ranks import Space
from lamp3d.space.sharded import ShardedVolume, even_cut, shard


def placed(local: Tensor, spec: ValueSpec, space: Space) -> Tensor:
    """A value as networks and losses want it: a slab as the volume that it is a part of."""
    return local if spec.placement is None else ShardedVolume(local, spec.placement, space)


def described(value: Tensor) -> ValueSpec:
    """What a value looks like on this rank."""
    if not isinstance(value, ShardedVolume):
        return spec_of(value)
    return replace(spec_of(value.local), placement=value.placement)


def shard_input(tensor: Tensor, space: Space) -> Tensor:
    """An input of the network: a volume cut evenly, anything else as it is."""
    if tensor.dim() != 5:
        return tensor
    volume = shard(tensor, space)
    return ShardedVolume(own_slab(tensor, space), volume.placement, space)


def own_slab(volume: Tensor, space: Space) -> Tensor:
    """Of a volume that is cut evenly, this rank's slab, in memory of its own; other tensors as they are."""
    if isinstance(volume, ShardedVolume):  # the caller has read no more
        return volume.relaid(even_cut(volume.placement.extents, space)).local
    if volume.dim() != 5:
        return volume
    slab = shard(volume, space).local
    return laid_out(slab.clone(), volume.stride(1) == 1 and volume.shape[1] > 1)


def slab_of(local: Tensor, extents: tuple[int, int, int], space: Space) -> ShardedVolume:
    """This rank's slab of a volume that is cut evenly, as a part of it."""
    return ShardedVolume(local, even_cut(extents, space), space)


def own_targets(targets: Any, extents: tuple[int, ...], space: Space) -> Any:
    """Targets with every volume of an input's size shared as the input is."""

    def share(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, ShardedVolume):
            return leaf
        return shard(leaf, space) if leaf.dim() == 5 and tuple(leaf.shape[2:]) == extents else leaf

    return pytree.tree_map(share, targets)
