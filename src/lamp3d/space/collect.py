"""Moving planes between the ranks that share a volume, with gradients: the transpose of every movement goes back.

What is computed on all ranks alike (a global mean, a gathered level) has on each of them a *part* of its gradient: the
true one is the sum over the ranks. So is a parameter's. With this convention every function here is the exact
derivative of the whole, and nothing need be known of who uses what.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lamp3d.space.layout import AxisCut, Range, pieces
from lamp3d.space.ranks import Space


def collect(local: Tensor, space: Space, cut: AxisCut, wanted: list[Range]) -> Tensor:
    """The planes that a rank wants along one axis, from whoever has them.

    Args:
        local: this rank's slab.
        space: the ranks.
        cut: how the axis is cut now.
        wanted: by the place on the cut's axis of the mesh, what each rank wants.
    """
    if wanted == cut.slabs:
        return local
    if all(own[0] <= want[0] < want[1] <= own[1] for own, want in zip(cut.slabs, wanted, strict=True)):
        begin, end = wanted[space.coordinate[cut.axis]]  # nothing need travel
        return _planes(local, cut.dim, (begin, end), cut.slabs[space.coordinate[cut.axis]][0])
    found: Tensor = _Collect.apply(local, space, cut, wanted)  # type: ignore[no-untyped-call]
    return found


def all_sum(tensor: Tensor, space: Space) -> Tensor:
    """The sum over the ranks, on every rank."""
    found: Tensor = _AllSum.apply(tensor, space)  # type: ignore[no-untyped-call]
    return found


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, space: Space, cut: AxisCut, wanted: list[Range]) -> Tensor:
        ctx.space, ctx.cut, ctx.wanted, ctx.shape = space, cut, wanted, local.shape
        me, dim = space.coordinate[cut.axis], cut.dim
        found = pieces(cut.slabs, wanted)
        start = cut.bounds[me]
        sends = {
            space.along(cut.axis, to): _planes(local, dim, piece, start)
            for to, of_it in enumerate(found)
            if to != me and (piece := of_it[me]) is not None
        }
        parts: dict[int, Tensor] = {}
        for origin, piece in enumerate(found[me]):
            if piece is not None:
                own = origin == me
                parts[origin] = (
                    _planes(local, dim, piece, start) if own else empty(local, {dim: piece[1] - piece[0]}, space)
                )
        receives = {space.along(cut.axis, origin): part for origin, part in parts.items() if origin != me}
        space.exchange(sends, receives).wait()
        # Nothing is wanted where all that a rank makes comes from padding.
        return torch.cat(list(parts.values()), dim) if parts else empty(local, {dim: 0}, space)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        space, cut, dim = ctx.space, ctx.cut, ctx.cut.dim
        me = space.coordinate[cut.axis]
        found = pieces(cut.slabs, ctx.wanted)
        start = ctx.wanted[me][0]
        sends = {
            space.along(cut.axis, origin): _planes(gradient, dim, piece, start)
            for origin, piece in enumerate(found[me])
            if origin != me and piece is not None
        }
        receives = {
            to: empty(gradient, {dim: piece[1] - piece[0]}, space)
            for to, of_it in enumerate(found)
            if to != me and (piece := of_it[me]) is not None
        }
        exchange = space.exchange(sends, {space.along(cut.axis, to): room for to, room in receives.items()})
        of_local = gradient.new_zeros(ctx.shape)
        if (own := found[me][me]) is not None:
            _planes(of_local, dim, own, cut.bounds[me]).copy_(_planes(gradient, dim, own, start))
        exchange.wait()
        for to, received in receives.items():
            piece = found[to][me]
            assert piece is not None
            _planes(of_local, dim, piece, cut.bounds[me]).add_(received)
        return of_local, None, None, None


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, space: Space) -> Tensor:
        ctx.space = space
        return space.sum(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.space.sum(gradients[0]), None


def _planes(tensor: Tensor, dim: int, piece: Range, start: int) -> Tensor:
    """A view of some planes of a tensor whose first plane is number ``start``."""
    return tensor.narrow(dim, piece[0] - start, piece[1] - piece[0])


def empty(like: Tensor, planes: Mapping[int, int], space: Space) -> Tensor:
    """Room for so many planes along some axes of a volume, laid out as they travel."""
    shape = [planes.get(dim, extent) for dim, extent in enumerate(like.shape)]
    layout = torch.channels_last_3d if space.channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)
