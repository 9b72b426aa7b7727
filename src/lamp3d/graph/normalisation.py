"""Norms by the fastest of torch's kernels that compute the same: instance norms, and all of volumes that ranks share.

torch turns an instance norm into a batch norm of (1, B·C, D, H, W). On a CPU that takes three times as long as a group
norm with a group for every channel, and it brings channels-last values into the other layout and leaves its result
there. Batch norm itself keeps channels-last, but it adds up one value after the other, which in fp32 costs two digits;
beside the roundings of bf16 values that is nothing. Other channels-last values are normalised here, as those of slabs
are: moments, then one scaling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lamp3d.graph.norm_kernels import add_scaled_, affine, gradient_sums, slab_moments


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """``torch.nn.functional.instance_norm`` of a volume; None where it is best left to torch."""
    of_values = use_input_stats and running_mean is None and input.dim() == 5 and input[0, 0].numel() > 1
    if not of_values or input.device.type != "cpu" or input.dtype not in (torch.float32, torch.bfloat16):
        return None
    if input.stride(1) != 1:
        return F.group_norm(input, input.shape[1], weight, bias, eps)
    if input.shape[0] == 1 and input.dtype == torch.bfloat16:
        return F.batch_norm(input, None, None, weight, bias, training=True, eps=eps)
    batch, channels = input.shape[:2]
    pool = Pool(batch, channels, channels, False, input[0, 0].numel())
    return normalised(input, weight, bias, pool, eps)[0]


class Sharers(Protocol):
    """The ranks that have a volume in common."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all ranks."""
        ...

    def stack(self, tensor: Tensor) -> Tensor:
        """Everyone's, along a new first axis."""
        ...


def normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, pool: Pool, eps: float, sharers: Sharers | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A volume (B, C, D, H, W) or slab of one without its mean and deviation, scaled; and its mean and variance (B, C).

    Args:
        x: the values.
        weight, bias: (C,), or neither.
        pool: what is normalised together.
        eps: added to the variance.
        sharers: the ranks that have the other slabs.
    """
    made, mean, var = _Normalise.apply(x, weight, bias, sharers, pool, eps)  # type: ignore[no-untyped-call]
    return made, mean, var


@dataclass(frozen=True)
class Pool:
    """Which of the (B, C) channels are normalised together: those of a group, or of all cases."""

    batch: int
    channels: int
    groups: int
    over_batch: bool
    voxels: int

    @property
    def count(self) -> int:
        """How many values have one mean."""
        return self.voxels * (self.batch if self.over_batch else self.channels // self.groups)

    def mean(self, of_channels: Tensor) -> Tensor:
        """The mean over the channels (..., B, C) that belong together, for each of them."""
        if self.over_batch:
            return of_channels.mean(-2, keepdim=True).expand_as(of_channels)
        grouped = of_channels.reshape(*of_channels.shape[:-1], self.groups, -1)
        return grouped.mean(-1, keepdim=True).expand_as(grouped).flatten(-2)


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) · weight + bias, and the mean and variance that were used."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, sharers: Sharers | None, pool: Pool, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _combined(x, sharers, pool)
        scale = torch.rsqrt(var + eps)
        gain = scale if weight is None else scale * weight
        shift = -mean * gain if bias is None else bias - mean * gain
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.sharers, ctx.pool, ctx.has_bias = sharers, pool, bias is not None
        ctx.mark_non_differentiable(mean, var)
        return affine(x, gain, shift), mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        dy = gradients[0]
        of_ones, of_values = gradient_sums(dy, x, mean, scale)  # sums of dy, and of dy · normalised x, on this rank
        of_weight = of_values.sum(0).to(weight.dtype) if weight is not None else None
        of_bias = of_ones.sum(0) if ctx.has_bias else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, of_bias, None, None, None
        sums = torch.stack([of_ones, of_values])
        if ctx.sharers is not None:
            sums = ctx.sharers.sum(sums)
        gain = scale if weight is None else scale * weight
        if weight is not None:
            sums = sums * weight
        average = ctx.pool.mean(sums) / ctx.pool.voxels
        by_x = -scale.square() * average[1]
        rest = -scale * average[0] - by_x * mean
        dx = add_scaled_(affine(x, by_x, rest), dy, gain)
        return dx, of_weight, None if of_bias is None else of_bias.to(dy.dtype if weight is None else weight.dtype), \
            None, None, None  # fmt: skip


def _combined(x: Tensor, sharers: Sharers | None, pool: Pool) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, C) of all that is normalised together."""
    mean, var = slab_moments(x)
    if sharers is not None:
        voxels = torch.full_like(mean, x[0, 0].numel())
        counts, means, variances = sharers.stack(torch.stack([voxels, mean, var])).unbind(1)
        share = counts / pool.voxels
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean).square())).sum(0)
    of_all = pool.mean(mean)
    return of_all.contiguous(), pool.mean(var + (mean - of_all).square()).contiguous()
