"""Reduced precision: close to fp32 everywhere, also where oneDNN's bf16 weight gradient is not."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from lamp3d.graph import DeferredWeights, SplitConvolutions, autocast
from lamp3d.graph.precision import convolution_dtypes

CPU = torch.device("cpu")


def gradients(layer: nn.Module, image: Tensor, precision: str, *, split: bool = False) -> list[Tensor]:
    """Output and gradients of a layer for a fixed loss; memory that is freed just before holds huge numbers."""
    for parameter in layer.parameters():
        parameter.grad = None
    image = image.clone().requires_grad_()
    deferred = DeferredWeights()
    with autocast(CPU, precision):
        if split:
            with SplitConvolutions(deferred):
                output = layer(image)
        else:
            output = layer(image)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    junk = [torch.full((parameter.numel(),), 1e30) for parameter in layer.parameters() for _ in range(10)]
    del junk
    (output * target).sum().backward()
    deferred.compute()
    assert image.grad is not None
    found = [output.detach(), image.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
    assert len(found) == 2 + len(list(layer.parameters()))
    return [tensor.float().clone() for tensor in found]


LAYERS = [
    nn.Conv3d(16, 16, 3, padding=1),
    nn.Conv3d(8, 16, 3, padding=1, stride=2),
    nn.Conv3d(8, 16, 3, padding=(1, 1, 1), stride=(1, 2, 2), bias=False),
    nn.Conv3d(16, 8, 5, padding=2, groups=2),
    nn.Conv3d(8, 8, 3, padding="same", dilation=2),
    nn.Conv3d(8, 8, 1),
    nn.ConvTranspose3d(16, 8, 2, stride=2),
    nn.ConvTranspose3d(8, 16, 3, stride=2, padding=1, output_padding=1),
]
SHAPES = [(2, 2, 2), (2, 4, 5), (1, 2, 3), (3, 1, 1), (6, 6, 6), (2, 8, 8)]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("split", [False, True])
def test_bf16_is_close_to_fp32_on_volumes_of_any_size(layer: nn.Conv3d, split: bool) -> None:
    for shape, batch in itertools.product(SHAPES, (1, 3)):
        image = torch.randn(batch, layer.in_channels, *shape, generator=torch.Generator().manual_seed(0))
        exact, reduced = gradients(layer, image, "fp32"), gradients(layer, image, "bf16", split=split)
        for expected, found in zip(exact, reduced, strict=True):
            assert (found - expected).abs().max() <= 0.03 * expected.abs().max(), shape


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_split_backward_is_the_whole_one(layer: nn.Conv3d) -> None:
    layer = layer.double()
    try:
        for shape in SHAPES:
            image = torch.randn(2, layer.in_channels, *shape, dtype=torch.float64)
            whole, parts = gradients(layer, image, "fp32"), gradients(layer, image, "fp32", split=True)
            for expected, found in zip(whole, parts, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    finally:
        layer.float()


def test_only_small_volumes_leave_autocast() -> None:
    weight = torch.empty(4, 4, 3, 3, 3)
    with autocast(CPU, "bf16"):
        assert convolution_dtypes(torch.empty(1, 4, 3, 3, 3), weight, [1, 1, 1]) == (torch.bfloat16, torch.bfloat16)
        assert convolution_dtypes(torch.empty(1, 4, 2, 9, 9), weight, [1, 1, 1]) == (torch.float32, torch.bfloat16)
        assert nn.functional.conv3d(torch.randn(1, 4, 2, 2, 2), weight, padding=1).dtype == torch.bfloat16
    assert convolution_dtypes(torch.empty(1, 4, 2, 9, 9), weight, [1, 1, 1]) == (torch.float32, torch.float32)
