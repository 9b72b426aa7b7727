"""The networks: shapes, sizes, names, gradients, and that a tracer sees every operation."""

import pickle
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lamp3d.errors import ConfigError
from lamp3d.nets import SEUNet, UNet, UShape

NETS = [UNet, SEUNet]
SHAPE = (2, 1, 32, 16, 16)


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    named = dict(network.named_parameters())
    return dict(zip(named, torch.autograd.grad(network(x).square().sum(), list(named.values())), strict=True))


@pytest.mark.parametrize(
    ("net", "filters", "parameters"),
    [
        (UNet, 32, 22_578_570),
        (UNet, 64, 90_299_146),
        (UNet, 128, 361_166_346),
        (SEUNet, 32, 23_040_418),
        (SEUNet, 64, 92_137_274),
        (SEUNet, 128, 368_500_330),
    ],
)
def test_parameter_counts_are_those_of_the_docstring(net: type[UShape], filters: int, parameters: int) -> None:
    with torch.device("meta"):
        network = net(1, 10, filters)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert f"{parameters:,}" in str(net.__doc__)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
@pytest.mark.parametrize("stem_stride", [1, 2])
def test_logits_have_the_images_resolution_and_gradients_reach_every_parameter(
    net: type[UShape], norm: str, stem_stride: int
) -> None:
    torch.manual_seed(0)
    network = net(2, 3, filters=4, norm=norm, stem_stride=stem_stride).double()
    assert network.divisor == 16 * stem_stride
    shape = (2, 2, 2 * network.divisor, network.divisor, network.divisor)
    logits = network(images(*shape))
    assert logits.shape == (2, 3, *shape[2:])
    logits.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("stem_stride", [1, 2])
def test_fx_traces_without_a_shape_and_changes_nothing(net: type[UShape], stem_stride: int) -> None:
    torch.manual_seed(0)
    network = net(1, 3, filters=2, stem_stride=stem_stride).double()
    traced = torch.fx.symbolic_trace(network)
    for shape in [(1, 1, 64, 32, 32), (2, 1, 32, 64, 32)]:
        x = images(*shape)
        assert torch.equal(traced(x), network(x))
        expected, actual = gradients(network, x), gradients(traced, x)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("net", NETS)
def test_every_layer_is_a_node_with_a_readable_name(net: type[UShape]) -> None:
    nodes = [str(node.target) for node in torch.fx.symbolic_trace(net(1, 3, filters=2)).graph.nodes]
    for name in ["encoder1.conv1", "encoder5.norm2", "pool4", "up4", "decoder4.norm2", "decoder1.act2", "logits"]:
        assert nodes.count(name) == 1
    leaves = [name for name, child in net(1, 3, filters=2).named_modules() if not list(child.children())]
    unused = {name for name in leaves if name not in nodes}
    assert unused <= {"head", "coarse_logits", *(f"decoder{i}.shortcut" for i in range(1, 5))}  # empty sequences only


def test_a_traceable_network_may_hold_one_of_these() -> None:
    network = nn.Sequential(nn.Conv3d(1, 1, 1), UNet(1, 2, filters=2)).double()
    x = images(*SHAPE)
    assert torch.equal(torch.fx.symbolic_trace(network)(x), network(x))


@pytest.mark.parametrize("net", NETS)
def test_torch_export_traces_it(net: type[UShape]) -> None:
    network = net(1, 2, filters=2).double()
    x = images(*SHAPE)
    assert torch.equal(torch.export.export(network, (x,)).module()(x), network(x))


@pytest.mark.parametrize("net", NETS)
def test_pickles(net: type[UShape]) -> None:
    network = net(1, 2, filters=2).double()
    x = images(*SHAPE)
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), network(x))


def test_skips_are_what_the_encoder_made() -> None:
    """Activations work in place: what the decoder receives must still be the encoder block's output."""
    network = UNet(1, 2, filters=2).double()
    made: dict[str, Tensor] = {}
    blocks: dict[str, Callable[..., Any]] = {f"encoder{i}": getattr(network, f"encoder{i}") for i in range(1, 5)}
    for name, block in blocks.items():
        block.register_forward_hook(lambda _m, _i, out, name=name: made.update({name: out.detach().clone()}))
    received: dict[str, Tensor] = {}
    for i in range(1, 5):
        decoder = getattr(network, f"decoder{i}")
        decoder.register_forward_pre_hook(lambda _m, args, i=i: received.update({f"encoder{i}": args[0].clone()}))
    network(images(*SHAPE))
    for name, skip in made.items():
        assert torch.equal(received[name][:, : skip.shape[1]], skip)


def test_max_filters_caps_every_block() -> None:
    network = UNet(1, 2, filters=4, max_filters=16)
    widths = [getattr(network, f"encoder{i}").conv2.out_channels for i in range(1, 6)]
    assert widths == [4, 8, 16, 16, 16]
    assert network(images(1, 1, 32, 32, 32, dtype=torch.float32)).shape == (1, 2, 32, 32, 32)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("stem_stride", [1, 2])
def test_every_level_can_have_its_own_width(net: type[UShape], stem_stride: Literal[1, 2]) -> None:
    widths = [2, 5, 3, 6, 4]  # they need not rise
    network = net(1, 3, filters=widths, stem_stride=stem_stride).double()
    assert [getattr(network, f"encoder{i}").conv2.out_channels for i in range(1, 6)] == widths
    assert [getattr(network, f"decoder{i}").conv2.out_channels for i in range(1, 5)] == widths[:4]
    assert network(images(1, 1, 64, 32, 32)).shape == (1, 3, 64, 32, 32)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("stem_stride", [1, 2])
def test_deep_supervision_adds_logits_of_coarser_levels_behind_the_same_first_ones(
    net: type[UShape], stem_stride: int
) -> None:
    torch.manual_seed(0)
    plain = net(1, 3, filters=2, stem_stride=stem_stride).double()
    deep = net(1, 3, filters=2, stem_stride=stem_stride, deep_supervision=2).double()
    assert (plain.heads, deep.heads) == (1, 3)
    deep.load_state_dict(plain.state_dict(), strict=False)
    x = images(1, 1, 64, 32, 32)
    logits = deep(x)
    assert logits.shape == (1, 9, 64, 32, 32)
    assert torch.equal(logits[:, :3], plain(x))
    for k in (1, 2):  # each its own, and all its levels' voxels count
        logits[:, 3 * k : 3 * k + 3].square().sum().backward(retain_graph=True)
        assert deep.coarse_logits[k - 1][0].weight.grad.abs().max() > 0
    assert torch.equal(torch.fx.symbolic_trace(deep)(x), logits)


@pytest.mark.parametrize(("se_reduction", "hidden"), [(1, 8), (2, 4), (8, 1), (100, 1)])
def test_se_reduction_leaves_at_least_one_hidden_unit(se_reduction: int, hidden: int) -> None:
    block = SEUNet(1, 2, filters=8, se_reduction=se_reduction).encoder1
    assert block.reduce.out_channels == hidden
    assert block.expand.in_channels == hidden


@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
def test_the_gate_depends_on_the_image(norm: str) -> None:
    torch.manual_seed(0)
    network = SEUNet(1, 2, filters=4, norm=norm).double()
    gates: list[Tensor] = []
    network.encoder3.gate.register_forward_hook(lambda _m, _i, out: gates.append(out))
    network(images(2, 1, 32, 32, 32))
    assert (gates[0][0] - gates[0][1]).abs().max() > 1e-6


def test_batch_norm_counts_the_batches_it_saw() -> None:
    network = UNet(1, 2, filters=2, norm="batch").double()
    network(images(*SHAPE))
    network.eval()(images(*SHAPE))
    assert network.encoder1.norm1.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"in_channels": 0}, "in_channels=0"),
        ({"out_channels": 0}, "out_channels=0"),
        ({"filters": -3}, "filters=-3"),
        ({"filters": [8, 16, 0, 64, 128]}, "filters=0"),
        ({"filters": [8, 16]}, r"filters=\[8, 16\] must be one number, or one for each of the 5 levels"),
        ({"norm": "layer"}, r"norm='layer' is unknown; choose one of instance, batch, group"),
        ({"stem_stride": 3}, "stem_stride=3"),
        ({"max_filters": 8}, "max_filters=8 is below filters=32"),
        ({"se_reduction": 0}, "se_reduction=0"),
        ({"deep_supervision": 4}, "deep_supervision=4 must be between 0 and 3"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SEUNet(**{"in_channels": 1, "out_channels": 2} | arguments)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((1, 1, 33, 32, 20), "33x32x20.*multiple of 16.*take 32x32x16 or 48x32x32"),
        ((1, 1, 0, 32, 32), "take 16x32x32"),
        ((1, 1, 32, 32), "are not"),
        ((1, 1, 16, 16, 16), "single voxel"),
    ],
)
def test_bad_image_sizes_are_refused(net: type[UShape], shape: tuple[int, ...], says: str) -> None:
    network = net(1, 2, filters=2)
    with pytest.raises(ConfigError, match=says):
        network(images(*shape, dtype=torch.float32))
    with pytest.raises(ConfigError, match=says):
        network.check_input(shape)
