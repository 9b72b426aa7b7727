"""Norms and reductions over space: every rank's share of the statistics, combined.

A norm needs the mean and the variance of the whole volume. Each rank computes those of its slab, all learn of all in
one small message, and they are combined as Chan, Golub and LeVeque (1983) do, which loses no digits where the mean is
large beside the deviation. Backward needs two sums, in one message as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lamp3d.graph.normalisation import Pool, normalised
from lamp3d.space.collect import all_sum
from lamp3d.space.ranks import Space
from lamp3d.space.sharded import ShardedVolume, refuse, rule

SPATIAL = {2, 3, 4}


@rule(F.instance_norm)
def instance_norm(
    input: ShardedVolume, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5,
) -> ShardedVolume:  # fmt: skip
    """``torch.nn.functional.instance_norm``."""
    if running_mean is not None or not use_input_stats:
        raise refuse("instance_norm", "it keeps running statistics")
    return _normalised(input, weight, bias, input.shape[1], False, eps)[0]


@rule(F.group_norm)
def group_norm(
    input: ShardedVolume, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> ShardedVolume:
    """``torch.nn.functional.group_norm``."""
    return _normalised(input, weight, bias, num_groups, False, eps)[0]


@rule(F.batch_norm)
def batch_norm(
    input: ShardedVolume, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float | None = 0.1, eps: float = 1e-5,
) -> ShardedVolume:  # fmt: skip
    """``torch.nn.functional.batch_norm``."""
    if not training:
        made = F.batch_norm(input.local, running_mean, running_var, weight, bias, False, momentum or 0.0, eps)
        return ShardedVolume(made, input.placement, input.space)
    made_volume, mean, var = _normalised(input, weight, bias, input.shape[1], True, eps)
    if running_mean is not None and running_var is not None:
        count = input.shape[0] * math.prod(input.shape[2:])
        with torch.no_grad():
            share = momentum or 0.0
            running_mean.lerp_(mean[0].to(running_mean.dtype), share)
            running_var.lerp_((var[0] * (count / max(count - 1, 1))).to(running_var.dtype), share)
    return made_volume


@rule(F.adaptive_avg_pool3d)
def adaptive_average_pool(input: ShardedVolume, output_size: Any) -> Tensor:
    """``torch.nn.functional.adaptive_avg_pool3d`` to a single voxel."""
    sizes = [output_size] * 3 if isinstance(output_size, int) else list(output_size)
    if sizes != [1, 1, 1]:
        raise refuse("adaptive_avg_pool3d", f"its windows, for {sizes}, are of unequal sizes; only 1 is supported")
    found: Tensor = mean(input, (2, 3, 4), True)
    return found


@rule(torch.mean, Tensor.mean)
def mean(
    input: ShardedVolume, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None, axis: Any = None
) -> Any:
    """``torch.mean``."""
    dims = _dims(dim if axis is None else axis)
    wide = torch.promote_types(dtype or input.dtype, torch.float32)
    total = _reduced(input, dims, keepdim, lambda x: x.sum(dims, keepdim, dtype=wide), all_sum, "mean")
    return (total / math.prod(input.shape[d] for d in dims)).to(dtype or input.dtype)


@rule(torch.sum, Tensor.sum)
def sum_(
    input: ShardedVolume, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None, axis: Any = None
) -> Any:
    """``torch.sum``."""
    dims = _dims(dim if axis is None else axis)
    return _reduced(input, dims, keepdim, lambda x: x.sum(dims, keepdim, dtype=dtype), all_sum, "sum")


@rule(torch.amax, Tensor.amax)
def amax(input: ShardedVolume, dim: Any = (), keepdim: bool = False) -> Any:
    """``torch.amax``: equal largest values share the gradient."""
    dims = _dims(None if dim == () else dim)
    if not _crosses(input, dims, "amax"):
        return _reduced(input, dims, keepdim, lambda x: x.amax(dims, keepdim), all_sum, "amax")
    found: Tensor = _Largest.apply(input.local, input.space, dims, keepdim)  # type: ignore[no-untyped-call]
    return found


@rule(torch.amin, Tensor.amin)
def amin(input: ShardedVolume, dim: Any = (), keepdim: bool = False) -> Any:
    """``torch.amin``: equal smallest values share the gradient."""
    return -amax(-input, dim, keepdim)


@rule(torch.max, Tensor.max)
def max_(input: ShardedVolume, *args: Any, **kwargs: Any) -> Any:
    """``torch.max``: of all values, of two volumes, or over the channels, with their indices."""
    if not args and not kwargs:
        return amax(input)
    return _with_indices("max", torch.maximum, input, *args, **kwargs)


@rule(torch.min, Tensor.min)
def min_(input: ShardedVolume, *args: Any, **kwargs: Any) -> Any:
    """``torch.min``: of all values, of two volumes, or over the channels, with their indices."""
    if not args and not kwargs:
        return amin(input)
    return _with_indices("min", torch.minimum, input, *args, **kwargs)


def _with_indices(what: str, of_two: Callable[..., Any], input: Any, *args: Any, **kwargs: Any) -> Any:
    given = dict(zip(("dim", "keepdim"), args, strict=False)) | kwargs
    if "other" in given or isinstance(given["dim"], Tensor):
        return of_two(input, *args, **kwargs)
    dim, keepdim = given["dim"], given.get("keepdim", False)
    if dim % 5 not in (0, 1) or not keepdim:
        raise refuse(what, f"it is known along the channels, with keepdim=True, only; or take a{what}")
    found = getattr(input.local, what)(dim, keepdim=True)
    return type(found)([ShardedVolume(values, input.placement, input.space) for values in found])


def _dims(dim: Any) -> tuple[int, ...]:
    given: Sequence[int] = range(5) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    return tuple(sorted(d % 5 for d in given)) or tuple(range(5))


def _crosses(input: ShardedVolume, dims: Sequence[int], what: str) -> bool:
    """Whether a reduction goes over the cut axes (all of them, or it is refused)."""
    cut = {c.dim for c in input.placement.cuts}
    if cut & set(dims) and not cut <= set(dims):
        raise refuse(what, "it goes over one of two axes that are cut")
    return bool(cut & set(dims))


def _reduced(
    input: ShardedVolume,
    dims: tuple[int, ...],
    keepdim: bool,
    local: Callable[[Tensor], Tensor],
    across: Callable[[Tensor, Space], Tensor],
    what: str,
) -> Any:
    if _crosses(input, dims, what):
        return across(local(input.local), input.space)
    found = local(input.local)
    if not input.placement.cuts:
        return found
    if SPATIAL & set(dims) or not keepdim:
        raise refuse(what, "what it makes is no (B, C, D, H, W) volume; keep the dimension (keepdim=True)")
    return ShardedVolume(found, input.placement, input.space)


class _Largest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, space: Space, dims: tuple[int, ...], keepdim: bool) -> Tensor:
        largest = space.maximum(local.amax(dims, keepdim=True))
        mask = local == largest
        count = space.sum(mask.sum(dims, keepdim=True).to(local.dtype))
        ctx.save_for_backward(mask, count)
        ctx.space = space
        return largest if keepdim else largest.reshape(local.amax(dims).shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        mask, count = ctx.saved_tensors
        return mask * (ctx.space.sum(gradients[0]).reshape(count.shape) / count), None, None, None


def _normalised(
    input: ShardedVolume, weight: Tensor | None, bias: Tensor | None, groups: int, over_batch: bool, eps: float
) -> tuple[ShardedVolume, Tensor, Tensor]:
    batch, channels = input.shape[:2]
    pool = Pool(batch, channels, groups, over_batch, math.prod(input.shape[2:]))
    if pool.count <= 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(input.shape)}")
    sharing = input.space if input.placement.cuts else None
    made, mean, var = normalised(input.local, weight, bias, pool, eps, sharing)
    return ShardedVolume(made, input.placement, input.space), mean, var
