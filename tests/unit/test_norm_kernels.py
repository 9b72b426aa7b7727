"""Sums over a slab's voxels and their scaling: the fast kernels find what float64 finds."""

import pytest
import torch

from lamp3d.graph.norm_kernels import add_scaled_, affine, gradient_sums, slab_moments

SPACE = (2, 3, 4)


@pytest.mark.parametrize("size", [(1, 3, 3), (12, 12, 12), (13, 13, 13), (17, 16, 16)])  # about torch's limit of 2048
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_moments_and_gradient_sums(
    size: tuple[int, int, int], memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gradient = (
        torch.randn((2, 20, *size), generator=generator).to(dtype).contiguous(memory_format=memory_format)
        for _ in range(2)
    )
    mean, var = slab_moments(x)
    assert mean.dtype == var.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(mean.double(), x.double().mean(SPACE), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(var.double(), x.double().var(SPACE, correction=0), rtol=tolerance, atol=tolerance)

    scale = var.rsqrt()
    of_ones, of_values = gradient_sums(gradient, x, mean, scale)
    normalised = (x.double() - mean[:, :, None, None, None]) * scale[:, :, None, None, None]
    voxels = x[0, 0].numel()
    exact = gradient.double().sum(SPACE), (gradient.double() * normalised).sum(SPACE)
    # The kernel adds up products in its own order: allow for what float32 loses on that many of them.
    for found, wanted in zip((of_ones, of_values), exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=10 * tolerance, atol=tolerance * voxels)


@pytest.mark.parametrize("cases", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scaling_channel_by_channel(cases: int, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn((cases, 20, 3, 4, 5), generator=generator).to(dtype).contiguous(memory_format=memory_format)
        for _ in range(2)
    )
    wide = torch.promote_types(dtype, torch.float32)
    gain, shift, other = (torch.randn((cases, 20), generator=generator, dtype=wide) for _ in range(3))
    exact = x.double() * gain.double()[:, :, None, None, None] + shift.double()[:, :, None, None, None]

    made = affine(x, gain, shift)
    assert made.dtype == dtype
    assert made.is_contiguous(memory_format=memory_format)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(made.double(), exact, rtol=rounding, atol=4 * torch.finfo(wide).eps)

    exact += y.double() * other.double()[:, :, None, None, None]
    added = add_scaled_(made, y, other)
    assert added is made
    torch.testing.assert_close(added.double(), exact, rtol=rounding, atol=10 * rounding)  # of three roundings
