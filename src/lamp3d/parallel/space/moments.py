"""Sums over a slab's voxels, by the fastest of torch's kernels for them."""

from __future__ import annotations

import torch
from torch import Tensor


def slab_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, C) of a slab, in float32 or better."""
    wide = torch.promote_types(x.dtype, torch.float32)
    var, mean = torch.var_mean(x.to(wide), (2, 3, 4), correction=0)
    return mean, var


def gradient_sums(gradient: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The sums (B, C) over a slab of a gradient, and of its product with (x - mean) · scale."""
    wide = mean.dtype
    of_ones = gradient.sum((2, 3, 4), dtype=wide)
    products = (gradient * x).sum((2, 3, 4), dtype=wide)
    return of_ones, (products - mean * of_ones) * scale
