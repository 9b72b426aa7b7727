"""What is done to each voxel by itself, or along batch and channels: every rank does it to its slab."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lamp3d.space.layout import Layout
from lamp3d.space.sharded import RULES, ShardedVolume, refuse, rule

_NAMES = """
    abs neg exp exp2 expm1 log log10 log1p log2 sqrt rsqrt square reciprocal sign floor ceil round trunc frac
    sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh sigmoid logit erf erfc relu threshold
    relu6 leaky_relu elu selu celu gelu silu mish softplus softsign hardtanh hardswish hardsigmoid logsigmoid
    hardshrink softshrink tanhshrink
    add sub rsub mul div true_divide floor_divide remainder fmod pow maximum minimum atan2 hypot logaddexp copysign
    lerp addcmul addcdiv clamp clamp_min clamp_max clip where
    masked_fill nan_to_num eq ne lt le gt ge isnan isfinite isinf logical_and logical_or logical_xor logical_not
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __pow__ __rpow__ __neg__ __invert__
    __mod__ __floordiv__
    __and__ __or__ __xor__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __abs__ __iadd__ __isub__ __imul__ __itruediv__
    to float double half bfloat16 long int bool type_as detach clone contiguous zeros_like ones_like
    empty_like full_like requires_grad_
"""


_TYPES = ("to", "type_as")


def _pointwise(func: Callable[..., Any]) -> Callable[..., Any]:
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        first = _leading(args, kwargs)
        in_place = (func.__name__.endswith("_") and not func.__name__.endswith("__")) or func.__name__.startswith("__i")
        if (in_place and func.__name__ != "__invert__") or kwargs.get("inplace"):
            if not isinstance(args[0], ShardedVolume):
                raise refuse(func.__name__, "it would change a tensor that every rank has whole")
            first = args[0]
            if first.stands_for_view:
                raise refuse(func.__name__, "it would change a slice in place, whose planes other ranks hold")
            first.local = _local(func, first.placement, args, kwargs)
            return first
        made = _local(func, first.placement, args, kwargs)
        if made is NotImplemented or (func.__name__ in _TYPES and not isinstance(args[0], ShardedVolume)):
            return made  # of a comparison with something else; and an ordinary tensor brought to a volume's type
        if not isinstance(made, Tensor) or made.shape[2:] != first.local.shape[2:]:
            raise refuse(func.__name__, "what it makes is no volume")
        return ShardedVolume(made, first.placement, first.space)

    return stand_in


def _leading(args: Any, kwargs: Any) -> ShardedVolume:
    """The volume whose layout the others are brought into: one that is cut, if there is."""
    volumes = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, ShardedVolume)]
    largest = max(volumes, key=lambda volume: volume.shape.numel())
    return next((v for v in volumes if v.placement.cuts and v.shape[2:] == largest.shape[2:]), largest)


def _local(func: Callable[..., Any], layout: Layout, args: Any, kwargs: Any) -> Tensor:
    args, kwargs = pytree.tree_map(lambda leaf: _matched(leaf, layout), (args, kwargs))
    result: Tensor = func(*args, **kwargs)
    return result


def _matched(value: Any, layout: Layout) -> Any:
    """What of a value belongs to the slab: of a volume its slab, of a tensor that all have its part of it."""
    if isinstance(value, ShardedVolume):
        if value.shape[2:] == layout.extents:
            return value.relaid(layout).local
        if value.placement.cuts:
            raise refuse(
                "an operation on two volumes", f"their sizes differ: {value.placement.extents} and {layout.extents}"
            )
        value = value.local
    if isinstance(value, Tensor):
        for cut in layout.cuts:
            dim = value.dim() - (5 - cut.dim)
            if dim >= 0 and value.shape[dim] != 1:
                raise refuse("an operation on a volume and a tensor", "it has an axis that is cut in the volume")
    return value


def _declare() -> None:
    for name in _NAMES.split():
        for namespace in (torch, Tensor, F):
            for spelling in (name, f"{name}_"):
                func = getattr(namespace, spelling, None)
                if callable(func) and func not in RULES and not isinstance(func, type):
                    RULES[func] = _pointwise(func)


_declare()


@rule(F.prelu, torch.prelu)
def prelu(input: ShardedVolume, weight: Tensor) -> ShardedVolume:
    """``torch.nn.functional.prelu``: its weight belongs to the channels."""
    return ShardedVolume(F.prelu(input.local, weight), input.placement, input.space)


@rule(torch.softmax, F.softmax, Tensor.softmax)
def softmax(input: ShardedVolume, dim: int, *args: Any, **kwargs: Any) -> ShardedVolume:
    """``torch.softmax`` over the channels."""
    return _over_channels("softmax", torch.softmax, input, dim, args, kwargs)


@rule(torch.log_softmax, F.log_softmax, Tensor.log_softmax)
def log_softmax(input: ShardedVolume, dim: int, *args: Any, **kwargs: Any) -> ShardedVolume:
    """``torch.log_softmax`` over the channels."""
    return _over_channels("log_softmax", torch.log_softmax, input, dim, args, kwargs)


def _over_channels(
    what: str, func: Any, input: ShardedVolume, dim: int, args: Sequence[Any], kwargs: dict[str, Any]
) -> ShardedVolume:
    given = [value for value in (*args, kwargs.get("dtype")) if isinstance(value, torch.dtype)]  # or F's stack level
    dtype = given[0] if given else None
    _refuse_space(what, dim)
    return ShardedVolume(func(input.local, dim, dtype=dtype), input.placement, input.space)


@rule(torch.argmax, Tensor.argmax)
def argmax(input: ShardedVolume, dim: int | None = None, keepdim: bool = False) -> Any:
    """``torch.argmax`` over the channels, keeping their dimension."""
    if dim is None or dim % 5 not in (0, 1) or not keepdim:
        raise refuse("argmax", "it is known along the channels, with keepdim=True, only")
    return ShardedVolume(input.local.argmax(dim, keepdim=True), input.placement, input.space)


@rule(F.normalize)
def normalize(input: ShardedVolume, p: float = 2.0, dim: int = 1, eps: float = 1e-12, **_: Any) -> ShardedVolume:
    """``torch.nn.functional.normalize`` over the channels."""
    _refuse_space("normalize", dim)
    return ShardedVolume(F.normalize(input.local, p, dim, eps), input.placement, input.space)


@rule(F.glu)
def glu(input: ShardedVolume, dim: int = -1) -> ShardedVolume:
    """``torch.nn.functional.glu``: one half of the channels gates the other."""
    _refuse_space("glu", dim)
    return ShardedVolume(F.glu(input.local, dim), input.placement, input.space)


@rule(F.channel_shuffle, torch.channel_shuffle)
def channel_shuffle(input: ShardedVolume, groups: int) -> ShardedVolume:
    """``torch.nn.functional.channel_shuffle``."""
    return ShardedVolume(F.channel_shuffle(input.local, groups), input.placement, input.space)


def _refuse_space(what: str, dim: int) -> None:
    if dim % 5 not in (0, 1):
        raise refuse(what, "it goes along an axis of space")


@rule(torch.cat, torch.concat)
def cat(tensors: Any, dim: int = 0, **named: Any) -> ShardedVolume:
    """``torch.cat`` along the batch or the channels."""
    _refuse_space("cat", named.get("axis", dim))
    first = _leading(tensors, {})
    if not all(isinstance(tensor, ShardedVolume) for tensor in tensors):
        raise refuse("cat", "one of its tensors is no volume that is shared")
    local = torch.cat([_matched(tensor, first.placement) for tensor in tensors], named.get("axis", dim))
    return ShardedVolume(local, first.placement, first.space)


@rule(torch.chunk, Tensor.chunk)
def chunk(input: ShardedVolume, chunks: int, dim: int = 0) -> tuple[ShardedVolume, ...]:
    """``torch.chunk`` along the batch or the channels."""
    return _parts("chunk", input, dim, input.local.chunk(chunks, dim))


@rule(torch.split, Tensor.split)
def split(input: ShardedVolume, split_size_or_sections: Any, dim: int = 0) -> tuple[ShardedVolume, ...]:
    """``torch.split`` along the batch or the channels."""
    return _parts("split", input, dim, torch.split(input.local, split_size_or_sections, dim))


def _parts(what: str, input: ShardedVolume, dim: int, parts: Any) -> tuple[ShardedVolume, ...]:
    _refuse_space(what, dim)
    return tuple(ShardedVolume(part, input.placement, input.space) for part in parts)


@rule(Tensor.repeat)
def repeat(input: ShardedVolume, *sizes: Any) -> ShardedVolume:
    """``Tensor.repeat`` along the batch or the channels."""
    counts = _sizes(sizes)
    if len(counts) != 5 or set(counts[2:]) != {1}:
        raise refuse("repeat", "it goes along an axis of space")
    return ShardedVolume(input.local.repeat(*counts), input.placement, input.space)


@rule(Tensor.expand)
def expand(input: ShardedVolume, *sizes: Any) -> ShardedVolume:
    """``Tensor.expand`` along the batch or the channels."""
    wanted = _sizes(sizes)
    if len(wanted) != 5 or any(size not in (-1, own) for size, own in zip(wanted[2:], input.shape[2:], strict=True)):
        raise refuse("expand", "it goes along an axis of space")
    return ShardedVolume(input.local.expand(*wanted[:2], -1, -1, -1), input.placement, input.space)


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """As many arguments, or one with all."""
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes


@rule(Tensor.expand_as)
def expand_as(input: Tensor, other: Tensor) -> ShardedVolume:
    """``Tensor.expand_as`` a volume."""
    if not isinstance(other, ShardedVolume):
        raise refuse("expand_as", "what it is made like is no volume that is shared")
    local = _matched(input, other.placement)
    return ShardedVolume(local.expand_as(other.local), other.placement, other.space)


@rule(F.dropout3d, torch.feature_dropout)
def dropout3d(input: ShardedVolume, p: float = 0.5, training: bool = True, inplace: bool = False) -> ShardedVolume:
    """``torch.nn.functional.dropout3d``: which channels are dropped all ranks draw alike, as one device would."""
    if not training or p == 0:
        return input
    ones = torch.ones(*input.shape[:2], 1, 1, 1, dtype=input.dtype, device=input.device)
    kept = F.dropout3d(ones, p, True)
    if inplace:
        input.local.mul_(kept)
        return input
    return ShardedVolume(input.local * kept, input.placement, input.space)


@rule(F.dropout, torch.dropout, F.alpha_dropout, torch.dropout_)
def dropout(input: ShardedVolume, p: float = 0.5, training: bool = True, inplace: bool = False) -> ShardedVolume:
    """``torch.nn.functional.dropout``, where it does nothing."""
    if training and p > 0:
        raise refuse("dropout", "one device would draw for every voxel; use Dropout3d, which draws for every channel")
    return input
