"""What cells are computed in: torch's numbers by faster kernels; bf16 close to fp32 where oneDNN's is not."""

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lamp3d import SEUNet, UNet
from lamp3d.graph import DeferredWeights, arithmetic, infer_specs, laid_out, lay_out_weights, trace
from lamp3d.graph.allocator import limit_freed_memory, make_room
from lamp3d.graph.convolution import Convolution, Kernel, bind
from lamp3d.graph.onednn import Reading, outgrows_its_room
from lamp3d.plan.hardware import has_fast_bf16

CPU = torch.device("cpu")


def gradients(layer: nn.Module, image: Tensor, precision: str, *, split: bool = False) -> list[Tensor]:
    """Output and gradients of a layer for a fixed loss; memory that is freed just before holds huge numbers.

    Without a precision torch alone computes them.
    """
    for parameter in layer.parameters():
        parameter.grad = None
    image = image.clone().requires_grad_()
    deferred = DeferredWeights()
    with arithmetic(CPU, precision, deferred if split else None) if precision else nullcontext():
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
    nn.ConvTranspose3d(8, 16, 2, dilation=2, padding=1, output_padding=1),
]
SHAPES = [(2, 2, 2), (2, 4, 5), (1, 2, 3), (3, 1, 1), (6, 6, 6), (2, 8, 8)]


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if isinstance(layer, nn.Conv3d)], ids=str)
@pytest.mark.parametrize("planes", [5, 12, 67])
def test_without_room_the_gradient_of_a_weight_is_added_up_by_pieces(
    layer: nn.Conv3d, planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.randn(2, layer.in_channels, planes, 6, 7, generator=torch.Generator().manual_seed(0))
    exact = gradients(layer, image, "fp32")
    added: list[Tensor] = []
    by_pieces = Convolution._weight_by_pieces

    def spied(*args: Any) -> Tensor:
        added.append(by_pieces(*args))
        return added[-1]

    monkeypatch.setattr("lamp3d.graph.convolution.make_room", lambda *tensors: False)
    monkeypatch.setattr(Convolution, "_weight_by_pieces", spied)
    for of_exact, of_pieces in zip(exact, gradients(layer, image, "bf16", split=True), strict=True):
        assert (of_exact - of_pieces).norm() < 1e-2 * of_exact.norm()
    in_bf16 = min(planes, 6) >= layer.kernel_size[0] * layer.stride[0]
    assert bool(added) == in_bf16


def test_room_is_made_for_real_tensors_alone() -> None:
    limit_freed_memory(1)
    try:
        assert not make_room(torch.ones(1))
        with FakeTensorMode():
            assert make_room(torch.ones(1))
    finally:
        limit_freed_memory(None)
    assert make_room(torch.ones(1))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("split", [False, True])
def test_bf16_is_close_to_fp32_on_volumes_of_any_size(layer: nn.Conv3d, split: bool) -> None:
    for shape, batch in itertools.product(SHAPES, (1, 3)):
        image = torch.randn(batch, layer.in_channels, *shape, generator=torch.Generator().manual_seed(0))
        exact, reduced = gradients(layer, image, "fp32"), gradients(layer, image, "bf16", split=split)
        for expected, found in zip(exact, reduced, strict=True):
            assert (found - expected).abs().max() <= 0.03 * expected.abs().max(), shape


LARGE_AND_FEW_PLANES = [
    (nn.Conv3d(32, 32, 3, padding=1), (3, 64, 64)),
    (nn.Conv3d(16, 16, (1, 3, 3), padding=(0, 1, 1), bias=False), (1, 112, 96)),
    (nn.Conv3d(16, 8, 3, padding=1, stride=(1, 2, 2)), (5, 300, 90)),
    (nn.ConvTranspose3d(16, 16, 2, stride=2), (2, 160, 48)),
    (nn.Conv3d(600, 40, (1, 3, 3), padding=(0, 1, 1), stride=(1, 1, 2)), (41, 87, 7)),  # turned it is no better
]


@pytest.mark.parametrize(("layer", "shape"), LARGE_AND_FEW_PLANES, ids=str)
@pytest.mark.parametrize("room", [True, False])
def test_bf16_is_close_to_fp32_where_planes_are_large_and_few(
    layer: nn.Conv3d, shape: tuple[int, ...], room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamp3d.graph.convolution.make_room", lambda *tensors: room)
    monkeypatch.setattr("lamp3d.graph.convolution.PIECES", 2)
    image = laid_out(torch.randn(1, layer.in_channels, *shape, generator=torch.Generator().manual_seed(0)), True)
    for split in (False, True):
        for expected, found in zip(
            gradients(layer, image, "fp32"), gradients(layer, image, "bf16", split=split), strict=True
        ):
            assert (found - expected).norm() <= 0.01 * expected.norm()


def test_volumes_that_outgrow_onednns_room_are_known() -> None:
    def outgrows(channels: int, *shape: int, widths: tuple[int, int, int] = (3, 3, 3)) -> bool:
        settings = ([1] * 3, [width // 2 for width in widths], [1] * 3, False, [0] * 3, 1)
        image, weight = (torch.empty(1, channels, *extents, device="meta") for extents in (shape, widths))
        return outgrows_its_room(Reading.of(image, weight.expand(channels, -1, -1, -1, -1), settings))

    # Found wrong, or crashing, on a CPU with AMX and one thread.
    assert outgrows(16, 8, 96, 96)
    assert outgrows(16, 1, 96, 96, widths=(1, 3, 3))
    assert outgrows(16, 16, 512, 16)
    assert outgrows(32, 3, 60, 64)
    assert outgrows(320, 3, 24, 8)
    # Found right, and too large to be treated specially for nothing.
    for shape in ((48, 96, 96), (64, 64, 64), (16, 96, 96), (128, 128, 128), (352, 256, 288)):
        assert not outgrows(16, *shape)
        assert not outgrows(64, *shape) or shape[0] == 16


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


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_fp32_convolutions_are_torchs(layer: nn.Conv3d, channels_last: bool, split: bool) -> None:
    lay_out_weights(layer, channels_last)
    for shape, batch in itertools.product(SHAPES, (1, 3)):
        image = torch.randn(batch, layer.in_channels, *shape)
        if channels_last:
            image = laid_out(image, True)
        expected, found = gradients(layer, image, ""), gradients(layer, image, "fp32", split=split)
        for wanted, ours in zip(expected, found, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def small(*, width: int = 3, channels_last: bool = False, **settings: Any) -> Convolution:
    """How a convolution of a small volume at batch 1 is computed."""
    image, weight = torch.empty(1, 4, 6, 6, 6), torch.empty(4, 4, width, width, width)
    call = bind(F.conv3d, (laid_out(image, True) if channels_last else image, weight), settings)
    assert call is not None
    return call.convolution()


def test_no_small_convolution_is_left_to_torchs_slow_kernel() -> None:
    assert small().kernel is Kernel.ONEDNN
    assert small(stride=2, padding=1).kernel is Kernel.ONEDNN
    assert small(width=1).kernel is Kernel.TORCHS_CHOICE  # there it is a matrix product already
    assert small(width=1, channels_last=True).kernel is Kernel.MATRIX_PRODUCT
    network, image = UNet(1, 2, filters=4), torch.randn(1, 1, 32, 32, 32)
    for layout in (False, True):
        network.zero_grad()
        lay_out_weights(network, layout)
        with torch.profiler.profile() as profiler, arithmetic(CPU, "fp32"):
            network(laid_out(image, True) if layout else image).sum().backward()
        slow = {event.key: event.count for event in profiler.key_averages() if "slow_conv" in event.key}
        # A pointwise convolution of contiguous values alone (the network's last): a matrix product by another name.
        assert sum(slow.values()) <= 2, slow


def test_only_small_volumes_leave_autocast() -> None:
    with arithmetic(CPU, "bf16"):
        assert small().computed == torch.bfloat16
        assert small(width=5, stride=2).computed == torch.float32
        weight = torch.empty(4, 4, 3, 3, 3)
        assert F.conv3d(torch.randn(1, 4, 2, 2, 2), weight, padding=1).dtype == torch.bfloat16
    assert small(width=5, stride=2).computed == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("affine", [False, True])
def test_instance_norm_is_torchs(dtype: torch.dtype, batch: int, channels_last: bool, affine: bool) -> None:
    layer = nn.InstanceNorm3d(4, affine=affine, eps=0.1)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, generator=generator)
    image = laid_out(torch.randn(batch, 4, 3, 4, 5, generator=generator), channels_last)
    expected = gradients(layer.double(), image.double(), "")
    found = gradients(layer.double() if dtype == torch.float64 else layer.float(), image.to(dtype), "fp32")
    for wanted, ours in zip(expected, found, strict=True):
        tolerance = {torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-6}[dtype]
        assert (ours - wanted).abs().max() <= tolerance * wanted.abs().max()
    with arithmetic(CPU, "fp32"):
        kept = dtype != torch.float64
        assert (layer.to(dtype)(image.to(dtype)).stride(1) == 1) == (channels_last and kept)
        with pytest.raises(ValueError, match="more than 1 spatial element"):
            layer(torch.ones(1, 4, 1, 1, 1, dtype=dtype))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_layouts_are_predicted(precision: str, channels_last: bool) -> None:
    network = SEUNet(1, 2, filters=4)
    lay_out_weights(network, channels_last)
    graph = trace(network, (1, 1, 32, 32, 32))
    specs = infer_specs(graph, [((1, 1, 32, 32, 32), torch.float32)], precision, channels_last, CPU)
    image = torch.randn(1, 1, 32, 32, 32)
    seen = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            if isinstance(result, Tensor) and result.dim() == 5 and result[0, 0].numel() > 1 and result.shape[1] > 1:
                seen[node.name] = (result.stride(1) == 1, result.dtype)
            return result

    with arithmetic(CPU, precision):
        Recorder(graph.root).run(laid_out(image, True) if channels_last else image)
    assert seen == {name: (specs[name].channels_last, specs[name].dtype) for name in seen}
    layouts = [layout for layout, _ in seen.values()]
    # torch's instance norm changes it in fp32, and its bf16 convolutions do where the hardware has none.
    if not channels_last or (precision == "bf16" and has_fast_bf16("cpu")):
        assert all(layouts) if channels_last else not any(layouts)
