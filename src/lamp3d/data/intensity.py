"""The changes of a sample's intensities: blur, low resolution, gamma, brightness, contrast, noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lamp3d.data.augment import Change, Region

BLUR_REACH = 3.0  # standard deviations
COARSE_REACH = 3  # voxels: halving the resolution looks at the pairs beside a voxel's own


def widened(region: Region, size: Sequence[int], change: Change) -> Region:
    """The region of a sample (D, H, W) that the intensities of another region are made from.

    It begins at an even voxel, so that halving the resolution pairs the same voxels in every part of a sample.
    """
    reach = math.ceil(BLUR_REACH * change.sigma) + (COARSE_REACH if change.coarse else 0)
    if not reach:
        return region
    depth, height, width = (
        slice(max(0, (part.start - reach) // 2 * 2), min(n, -(-(part.stop + reach) // 2) * 2))
        for part, n in zip(region, size, strict=True)
    )
    return depth, height, width


def recoloured(image: Tensor, change: Change, rng: np.random.Generator, region: Region, size: Sequence[int]) -> Tensor:
    """Change the intensities of a region (C, d, h, w) of an image (C, D, H, W), and add its part of the noise.

    What lies outside the region is not known here: see `widened`.
    """
    if change.sigma:
        from monai.networks.layers import gaussian_1d, separable_filtering  # a second, that the others need not wait

        kernel = gaussian_1d(torch.tensor(change.sigma), truncated=BLUR_REACH, approx="sampled", normalize=True)
        image = separable_filtering(image[None], [kernel] * 3, mode="replicate")[0]
    if change.coarse:
        image = _at_half_resolution(image, change.coarse)
    if change.gamma != 1.0:
        image = image.clamp_min(0).pow(change.gamma)
    if change.gain != 1.0 or change.shift != 0.0:
        image = image * change.gain + change.shift
    if change.noise:
        everywhere = (len(image), *size)
        if change.noise_kind == "uniform":
            noise = 2 * rng.random(everywhere, dtype=np.float32) - 1
        else:
            noise = rng.standard_normal(everywhere, dtype=np.float32)
        image = image + torch.from_numpy(noise)[(slice(None), *region)] * change.noise
    return image


def _at_half_resolution(image: Tensor, axes: Sequence[int]) -> Tensor:
    """Pairs of voxels averaged along some axes, and interpolated between again."""
    factors = [2 if axis in axes else 1 for axis in range(3)]
    coarse = functional.avg_pool3d(image[None], factors, ceil_mode=True)
    fine = functional.interpolate(coarse, scale_factor=[float(f) for f in factors], mode="trilinear")[0]
    depth, height, width = image.shape[1:]
    return fine[:, :depth, :height, :width]
