"""What a norm does with a slab's voxels, sums and scaling, by the fastest of torch's kernels that lose no digits.

On a CPU torch's ``var_mean`` takes six times as long as all of a group norm, which finds the same moments on its way.
That of channels-last values subtracts squares of which little is left where the mean is large: good enough beside
the roundings of bf16 values, not in fp32. Scaling bf16 values channel by channel with ``addcmul`` takes nine times as
long as a batch norm with given statistics, and rounds the factors too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamp3d.graph.allocator import make_room

SPACE = (2, 3, 4)
SMALL = 4096
"""Voxels. Below 2048 of them torch's channels-last kernel writes the input's gradient even if it is not asked for: to a
null pointer (2.13). So it is asked for; it costs nothing then."""


def slab_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, C) of a slab, in float32 or better."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.device.type != "cpu":
        var, mean = torch.var_mean(x.to(wide), SPACE, correction=0)
        return mean, var
    if _has_fast_sums(x):
        batch, channels = x.shape[:2]
        one = torch.ones(channels, dtype=wide)
        settings = (batch, channels, x[0, 0].numel(), channels, 0.0)
        _, mean, scale = torch.ops.aten.native_group_norm(x, one, torch.zeros_like(one), *settings)
        return mean, scale.square().reciprocal()  # of no variance the scale is infinite
    mean = x.mean(SPACE, keepdim=True, dtype=wide)
    return mean.flatten(1), (x - mean).square_().mean(SPACE)


def gradient_sums(gradient: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The sums (B, C) over a slab of a gradient, and of its product with (x - mean) · scale."""
    wide = mean.dtype
    if x.device.type == "cpu" and _has_fast_sums(x) and gradient.stride() == x.stride():
        channels, voxels = x.shape[1], x[0, 0].numel()
        one = torch.ones(channels, dtype=wide)
        sums = []
        for case in range(x.shape[0]):  # it adds up cases
            one_case = (tensor[case : case + 1] for tensor in (gradient, x, mean, scale))
            settings = (1, channels, voxels, channels, [voxels < SMALL, True, True])
            _, of_values, of_ones = torch.ops.aten.native_group_norm_backward(*one_case, one, *settings)
            sums.append(torch.stack([of_ones, of_values]))
        of_ones, of_values = torch.stack(sums, 1)
        return of_ones, of_values
    of_ones = gradient.sum(SPACE, dtype=wide)
    products = (gradient * x).sum(SPACE, dtype=wide)
    return of_ones, (products - mean * of_ones) * scale


def affine(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """x · gain + shift, both (B, C), in the dtype of x."""
    make_room(x)
    if not _scales_by_batch_norm(x):
        return torch.addcmul(_per_channel(shift, x), x, _per_channel(gain, x))
    zero, one = torch.zeros_like(gain[0]), torch.ones_like(gain[0])
    cases = [
        torch.ops.aten.native_batch_norm(x[i : i + 1], gain[i], shift[i], zero, one, False, 0.0, 0.0)[0]
        for i in range(x.shape[0])
    ]
    return cases[0] if len(cases) == 1 else torch.cat(cases)


def add_scaled_(made: Tensor, x: Tensor, gain: Tensor) -> Tensor:
    """Made + x · gain, in place; gain is (B, C)."""
    if _scales_by_batch_norm(x):
        return made.add_(affine(x, gain, torch.zeros_like(gain)))
    return made.addcmul_(x, _per_channel(gain, x))


def _scales_by_batch_norm(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def _per_channel(numbers: Tensor, x: Tensor) -> Tensor:
    return numbers.to(x.dtype)[:, :, None, None, None]


def _has_fast_sums(x: Tensor) -> bool:
    return x.is_contiguous() or x.dtype == torch.bfloat16
