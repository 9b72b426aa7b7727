"""What an operation keeps of a slab extended by its neighbours' planes: those planes, not a copy of the slab."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lamp3d.errors import PlanError
from lamp3d.space.layout import Range


class Own(NamedTuple):
    """Along one axis, which planes of an extended slab are the slab's own.

    Attributes:
        dim: the axis, of a (B, C, D, H, W) tensor.
        at: the first of them in the extended slab.
        start: the same plane in the slab.
        planes: how many.
    """

    dim: int
    at: int
    start: int
    planes: int

    @classmethod
    def of(cls, dim: int, slab: Range, read: Range, before: int) -> Own:
        """Where planes ``read`` of the whole volume, ``before`` others ahead of them, extend those of a slab."""
        first, end = max(read[0], slab[0]), min(read[1], slab[1])
        return cls(dim, first - read[0] + before, first - slab[0], end - first)


_recomputed: ContextVar[bool] = ContextVar("recomputed", default=False)


@contextmanager
def recomputed() -> Iterator[None]:
    """What runs within it is run again in the backward pass and keeps nothing: `kept_apart` would, since only the
    innermost of autograd's hooks sees what is saved."""
    token = _recomputed.set(True)
    try:
        yield
    finally:
        _recomputed.reset(token)


@contextmanager
def kept_apart(extended: Tensor, slab: Tensor, own: Sequence[Own]) -> Iterator[None]:
    """Within it, what is saved of ``extended`` for a backward pass is only what ``slab`` does not hold.

    Args:
        extended: the slab, or a part of it, with other planes around it.
        slab: what it was made of; not to be changed in place before the backward pass.
        own: along each axis on which they differ.
    """
    shared = all(planes > 0 for *_, planes in own) and not _recomputed.get()
    if isinstance(slab, FakeTensor) or not shared or extended.data_ptr() == slab.data_ptr():
        yield
        return
    shape, strides, address = extended.shape, extended.stride(), extended.data_ptr()
    slab = slab.detach()
    version = slab._version

    def pack(tensor: Tensor) -> Tensor | list[tuple[Tensor, Tensor]]:
        if tensor.data_ptr() != address or tensor.shape != shape or tensor.stride() != strides:
            return tensor
        around = []
        for dim, at, _, planes in own:
            end = at + planes
            beyond = tensor.narrow(dim, end, tensor.shape[dim] - end)
            around.append((tensor.narrow(dim, 0, at).clone(), beyond.clone()))
            tensor = tensor.narrow(dim, at, planes)
        return around

    def unpack(kept: Tensor | list[tuple[Tensor, Tensor]]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if slab._version != version:
            raise PlanError("a volume was changed in place after an operation had saved it for the backward pass.")
        whole = torch.empty_strided(shape, strides, dtype=slab.dtype, device=slab.device)
        part, middle = slab, whole
        for (dim, at, start, planes), (before, after) in zip(own, kept, strict=True):
            middle.narrow(dim, 0, at).copy_(before)
            middle.narrow(dim, at + planes, after.shape[dim]).copy_(after)
            middle, part = middle.narrow(dim, at, planes), part.narrow(dim, start, planes)
        middle.copy_(part)
        return whole

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
