"""From a module to cells and back: stages in a row are the network, at every cut."""

import copy
import itertools
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from lamp3d.errors import ConfigError, PlanError
from lamp3d.graph import CellGraph, infer_specs, refuse_tied_parameters, trace
from lamp3d.nets import SEUNet, UNet
from tests.networks import Branches, Chancy, Counting, InPlace, RandomDag, Tied, conv

SMALL = (2, 1, 4, 5, 6)
SHAPE = (1, 1, 16, 16, 32)


def run_stages(graph: CellGraph, starts: list[int], image: Tensor) -> Any:
    """The stages one after the other, each value on its way through a copy, as between devices."""
    values = {graph.inputs[0]: image}
    for stage in graph.cut(starts):
        outputs = stage(*(values[name].clone() for name in stage.inputs))
        values |= dict(zip(stage.outputs, outputs, strict=True))
    return graph.collect(values)


@pytest.mark.parametrize(
    "make",
    [InPlace, Branches, Chancy, Counting, *(lambda seed=seed: RandomDag(seed) for seed in range(4))],
    ids=["InPlace", "Branches", "Chancy", "Counting", *(f"RandomDag({seed})" for seed in range(4))],
)
def test_stages_in_a_row_are_the_network_at_every_cut(make: Any) -> None:
    torch.manual_seed(0)
    network = make().double().eval()
    images = torch.randn(SMALL, dtype=torch.float64)
    expected = network(images)
    graph = trace(network, SMALL)
    every_cell = list(range(len(graph.cells)))
    assert len(every_cell) > 4
    pairs = [[0, *pair] for pair in itertools.pairwise(every_cell[1:])]
    for starts in [[0], every_cell, *([0, cut] for cut in every_cell[1:]), *pairs]:
        found = run_stages(graph, starts, images.clone())
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        stages = graph.cut(starts)
        named = [name for stage in stages for name in stage.parameters_by_name()]
        assert sorted(named) == sorted(name for name, _ in network.named_parameters())
        for stage in stages:
            for name, parameter in stage.parameters_by_name().items():
                assert parameter is network.get_parameter(name)
            for name, buffer in stage.buffers_by_name().items():
                assert buffer is network.get_buffer(name)


@pytest.mark.parametrize("kind", [UNet, SEUNet])
def test_every_level_of_a_u_net_can_be_cut(kind: type[nn.Module]) -> None:
    graph = trace(kind(1, 2, filters=2), SHAPE)
    names = [cell.name for cell in graph.cells]
    for block in [f"encoder{level}" for level in range(1, 6)] + [f"decoder{level}" for level in range(1, 5)]:
        inside = [name for name in names if name.startswith(block)]
        assert len(inside) >= 4, block  # two convolutions, two norms with their activations
        assert any(name.startswith(f"{block}.conv2") for name in inside)
    assert any(name.startswith("cat") for name in names)


def test_edges_go_straight_from_maker_to_users_over_several_stages() -> None:
    graph = trace(UNet(1, 2, filters=2), SHAPE)
    names = [cell.name for cell in graph.cells]
    starts = [0, *(next(i for i, name in enumerate(names) if name.startswith(block)) for block in
              ("encoder3", "encoder5", "up3"))]  # fmt: skip
    edges = {edge.value: (edge.maker, edge.users) for edge in graph.stage_edges(starts)}
    skips = {value: ends for value, ends in edges.items() if ends == (0, (3,))}
    assert len(skips) == 2  # levels 1 and 2: from the first stage straight to the last
    assert len([ends for ends in edges.values() if ends == (1, (3,))]) == 1  # level 3
    assert len([ends for ends in edges.values() if ends == (1, (2,))]) == 2  # level 4 and the pooled value
    stages = graph.cut(starts)
    for edge in graph.stage_edges(starts):
        assert edge.value in stages[edge.maker].outputs
        for stage in range(len(stages)):
            assert (edge.value in stages[stage].inputs) == (stage in edge.users)


def test_the_input_and_early_outputs_cross_to_where_they_are_needed() -> None:
    graph = trace(Branches(), SMALL)
    last = next(cell.index for cell in graph.cells if "cat_1" in cell.nodes)
    edges = {edge.value: edge for edge in graph.stage_edges([0, 2, last])}
    assert edges["x"].maker == 0  # the input belongs to the first stage
    assert edges["x"].users == (2,)
    for output in graph.outputs:
        if output in edges:
            assert 2 in edges[output].users  # where the loss is
    outputs = graph.collect({name: torch.zeros(1) for name in graph.outputs})
    assert type(outputs) is dict
    assert type(outputs["aside"]) is list


def test_what_is_no_tensor_does_not_cross_a_cut() -> None:
    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(1, 2), conv(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            size = x.shape[2:]
            y = self.a(x)
            return nn.functional.interpolate(self.b(y), size=size)

    network = Sizes()
    graph = trace(network, SMALL)
    specs = infer_specs(graph, [(SMALL, torch.float32)], "fp32", False, torch.device("cpu"))
    assert all(edge.value in specs for edge in graph.edges)
    torch.testing.assert_close(
        run_stages(graph, list(range(len(graph.cells))), torch.ones(SMALL)), network(torch.ones(SMALL))
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", [UNet, SEUNet])
def test_predicted_values_are_the_real_ones(kind: type[nn.Module], precision: str, channels_last: bool) -> None:
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    network = kind(1, 2, filters=2).to(memory_format=layout)
    next(network.parameters()).requires_grad_(False)
    graph = trace(network, SHAPE)
    specs = infer_specs(graph, [((2, *SHAPE[1:]), torch.float32)], precision, channels_last, torch.device("cpu"))
    values = {graph.inputs[0]: torch.randn(2, *SHAPE[1:]).contiguous(memory_format=layout)}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        for stage in graph.cut(range(len(graph.cells))):
            outputs = stage(*(values[name] for name in stage.inputs))
            values |= dict(zip(stage.outputs, outputs, strict=True))
    for name, value in values.items():
        spec = specs[name]
        assert (spec.shape, spec.dtype, spec.nbytes) == (tuple(value.shape), value.dtype, value.nbytes), name
        assert spec.requires_grad == value.requires_grad, name


def test_tracing_changes_nothing() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(Counting(), nn.Conv3d(2, 1, 1), Counting())
    network[1].weight.grad = torch.ones_like(network[1].weight)
    network[2].eval()
    before = copy.deepcopy(network)
    modes = [module.training for module in network.modules()]
    state = torch.get_rng_state()
    graph = trace(network, SMALL)
    infer_specs(graph, [(SMALL, torch.float32)], "fp32", False, torch.device("cpu"))
    for (name, new), old in zip(network.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(new, old), name
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, p in network.named_parameters() if p.grad is not None] == ["1.weight"]
    assert torch.equal(network[1].weight.grad, torch.ones_like(network[1].weight))


def test_a_parameter_used_directly_lies_in_the_cell_that_uses_it() -> None:
    graph = trace(Branches(), SMALL)
    [cell] = [cell for cell in graph.cells if "scale" in cell.nodes]
    assert "mul" in cell.nodes


def test_tied_parameters_are_refused_only_where_a_cut_parts_them() -> None:
    graph = trace(Tied(), SMALL)
    for cut, tied in ((1, False), (2, True), (3, True)):
        if tied:
            with pytest.raises(PlanError, match=r"'twice\.(weight|bias)' .* stage 0 and in stage 1"):
                refuse_tied_parameters(graph.cut([0, cut]), [0, 1])
        else:
            refuse_tied_parameters(graph.cut([0, cut]), [0, 1])
        refuse_tied_parameters(graph.cut([0, cut]), [0, 0])  # on one device it may be in two stages


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=self.training)


class Sided(nn.Module):
    """One more output in training: the code has another number of lines."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * 2
        x = x * 2
        return x + 1


class Listing(nn.Module):
    """The same values, in a list in training."""

    def forward(self, x: Tensor) -> Any:
        return [x * 2] if self.training else x * 2


@pytest.mark.parametrize("make", [Functional, Sided, Listing])
def test_another_graph_in_the_other_mode_is_noticed(make: type[nn.Module]) -> None:
    network = make()
    training = trace(network, SMALL)
    evaluation = trace(network.eval(), SMALL)
    assert training.changes_with_mode
    assert evaluation.changes_with_mode
    image = torch.ones(1)
    assert isinstance(training.collect(dict.fromkeys(training.outputs, image)), list) == (make is Listing)
    assert evaluation.collect(dict.fromkeys(evaluation.outputs, image)) is image
    assert not trace(Chancy(), SMALL).changes_with_mode  # nn.Dropout is a module in another mode


def test_what_fails_in_the_other_mode_alone_does_no_harm() -> None:
    """Of one voxel, a norm has no variance: such a network predicts what it cannot be trained on."""
    network = nn.Sequential(nn.Conv3d(1, 2, 1), nn.InstanceNorm3d(2, track_running_stats=True)).eval()
    graph = trace(network, (1, 1, 1, 1, 1))
    assert graph.changes_with_mode
    with pytest.raises(ConfigError, match="Expected more than 1"):
        trace(network.train(), (1, 1, 1, 1, 1))


class Shaped(nn.Module):
    """Everything that needs the shape while the code runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        batch, *_ = x.shape
        if x.shape[-1] % 2:
            x = nn.functional.pad(x, (0, 1))
        halves = torch.cat([*torch.cat([x, x], 1).chunk(2, dim=1)], 1)
        pieces = [self.conv(piece) for piece in halves.split(2, 1)]
        grid = torch.linspace(0, 1, x.size(2)).to(x.dtype)
        out = sum(pieces) * grid[:, None, None] + torch.arange(2.0).view(1, 2, 1, 1, 1)
        return out.reshape(batch, -1)[:, : len(pieces) * 7].cumsum(1)


@pytest.mark.parametrize("shape", [SMALL, (3, 1, 6, 4, 5)])
def test_code_that_looks_at_shapes_is_traced_for_a_shape(shape: tuple[int, ...]) -> None:
    network = Shaped()
    before = set(vars(network))
    graph = trace(network, shape)
    assert graph.reads_shape
    assert set(vars(network)) == before
    image = torch.randn(shape)
    values = dict(zip(graph.inputs, [image], strict=True))
    for stage in graph.cut(range(len(graph.cells))):
        values |= dict(zip(stage.outputs, stage(*(values[name] for name in stage.inputs)), strict=True))
    torch.testing.assert_close(graph.collect(values), network(image))


def test_a_network_that_does_not_look_at_shapes_is_traced_for_all() -> None:
    for network in (UNet(1, 2, filters=1), InPlace(), Chancy()):
        assert not trace(network, SHAPE if isinstance(network, UNet) else SMALL).reads_shape


class Overwriting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1).mul_(2)


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


@pytest.mark.parametrize(
    ("network", "shape", "says"),
    [
        (Branching(), SMALL, r"^Branching cannot be traced by torch\.fx: .* must not branch on the values"),
        (Overwriting(), SMALL, r"'mul_' changes the network's input in place; .*x\.clone\(\)"),
        (nn.Sequential(nn.ReLU(inplace=True)), SMALL, "changes the network's input in place"),
        (TwoInputs(), SMALL, r"^TwoInputs cannot be called with the inputs x: .*'y'"),
        (TwoInputs(), {"x": SMALL, "z": SMALL}, r"^TwoInputs cannot be called with the inputs x, z: .*'z'"),
        (UNet(1, 2, filters=1), (1, 1, 16, 16, 20), r"^UNet does not accept an input of 1×1×16×16×20"),
        (UNet(1, 2, filters=1), (1, 3, 16, 16, 32), r"^UNet does not accept an input of 1×3×16×16×32"),
    ],
)
def test_what_cannot_be_split_is_refused(network: nn.Module, shape: tuple[int, ...], says: str) -> None:
    modes = [module.training for module in network.modules()]
    with pytest.raises(ConfigError, match=says):
        trace(network, shape)
    assert [module.training for module in network.modules()] == modes


def test_no_output_is_lost_where_leaves_of_the_output_repeat() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x * 2
            return y, y

    graph = trace(Twice(), SMALL)
    assert pytree.tree_leaves(run_stages(graph, [0], torch.ones(SMALL))) == [pytest.approx(torch.full(SMALL, 2.0))] * 2


class _Forward(nn.Module):
    """A convolution, and code around it."""

    def __init__(self, code: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.code = nn.Conv3d(1, 2, 3, padding=1), code
        self.register_buffer("number", torch.zeros(()))

    def forward(self, image: Tensor) -> Tensor:
        return self.code(self, image)


def _frozen(net: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        return net.conv(image)


def _exact(net: nn.Module, image: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=True):
        return net.conv(image)


def _written(net: nn.Module, image: Tensor) -> Tensor:
    out = torch.zeros(1, 2, 8, 8, 8)
    out[:, :, 1:-1] = net.conv(image)[:, :, 1:-1]
    return out * 2


def _accumulated(net: nn.Module, image: Tensor) -> Tensor:
    total = torch.zeros(1, 2, 8, 8, 8)
    total += net.conv(image)
    return total


def _drawn(net: nn.Module, image: Tensor) -> Tensor:
    return net.conv(image) * torch.rand((1, 1, 1, 1, 1), dtype=image.dtype)


def _assigned(net: nn.Module, image: Tensor) -> Tensor:
    net.number += 1
    return net.conv(image) * net.number


def _counted(net: Any, image: Tensor) -> Tensor:
    net.calls = getattr(net, "calls", 0) + 1
    return net.conv(image) * net.calls


def _kept(net: Any, image: Tensor) -> Tensor:
    before, net.last = getattr(net, "last", 0), net.conv(image)
    return net.last + before


def _averaged(net: Any, image: Tensor) -> Tensor:
    if not hasattr(net, "total"):
        net.total = torch.zeros(1)
    net.total += 1
    return net.conv(image) * net.total


def _made_at_first(net: Any, image: Tensor) -> Tensor:
    net.scale = getattr(net, "scale", nn.Parameter(torch.ones(1)))
    return net.conv(image) * net.scale


def _replaced(net: nn.Module, image: Tensor) -> Tensor:
    net.number.data = net.number.data + 1
    return net.conv(image) * net.number


def _written_to_itself(net: nn.Module, image: Tensor) -> Tensor:
    made = net.conv(image)
    made[:, 0] = 0
    return made


def _looked_into(net: Any, image: Tensor) -> Tensor:
    net.conv.register_forward_hook(lambda module, args, output: setattr(net, "seen", output))
    return net.conv(image) + net.seen


def _scaled_gradient(net: nn.Module, image: Tensor) -> Tensor:
    made = net.conv(image)
    made.register_hook(lambda gradient: gradient * 2)
    return made


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)

    @torch.jit.script
    def _swish(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class _Named(NamedTuple):
    fine: Tensor
    coarse: list[Tensor]


@dataclass
class _Made:
    fine: Tensor


def _checkpointed(reentrant: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda net, image: checkpoint(net.conv, image, use_reentrant=reentrant)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (_frozen, "switches gradients or autocast"),
        (_exact, "switches gradients or autocast"),
        (_written, "writes into a part of a tensor"),
        (_accumulated, "changes a tensor in place that the network's forward has made"),
        (_drawn, "draws random numbers"),
        (_checkpointed(True), r"use_checkpoint=False"),
        (_checkpointed(False), r"use_checkpoint=False"),
        (lambda net, image: torch.tensor(net.conv(image)) * 2, "makes a new tensor of the numbers"),
        (lambda net, image: torch.as_tensor([net.conv(image)]), "makes a new tensor of the numbers"),
        (lambda net, image: net.conv(image) * random.random(), "draws random numbers"),
        (lambda net, image: net.conv(image) * np.random.rand(), "draws random numbers"),  # noqa: NPY002
        (lambda net, image: _Made(net.conv(image)), "puts tensors into a _Made, .* return a tuple"),
        (_assigned, r"assigns to the buffer number, .* self\.number\.copy_"),
        (_counted, r"keeps something from one call to the next"),
        (_kept, r"keeps something from one call to the next"),
        (_averaged, r"keeps something from one call to the next"),
        (_made_at_first, r"makes scale at its first call; call it once before"),
        (_replaced, r"assigns to the data of a tensor"),
        (_written_to_itself, r"writes into a part of a tensor"),
        (_looked_into, r"uses what a hook of one of its layers has kept"),
        (_scaled_gradient, r"calls register_hook on a tensor"),
        (lambda net, image: _swish(net.conv(image)), r"take away @torch\.jit\.script"),
        (lambda net, image: torch.vmap(torch.sin)(net.conv(image)), r"calls torch\.vmap"),
        (lambda net, image: net.conv(image) * sum(p.sum() for p in net.parameters()), "does not call by name"),
    ],
)
def test_what_a_graph_would_do_otherwise_is_refused(code: Callable[[nn.Module, Tensor], Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trace(_Forward(code), (1, 1, 8, 8, 8))
    checkpoint(nn.Linear(2, 2), torch.ones(2), use_reentrant=False).sum().backward()  # as ever


def _once_weighted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still in use
        return nn.Sequential(nn.utils.weight_norm(nn.Conv3d(1, 2, 3)))


def _compiled() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what torch itself imports then
        return nn.Sequential(nn.Conv3d(1, 2, 3), torch.compile(nn.Conv3d(2, 2, 3)))


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return nn.Sequential(torch.jit.script(nn.Conv3d(1, 2, 3)))


def _hooked() -> nn.Module:
    net = nn.Sequential(nn.Sequential(nn.Conv3d(1, 2, 3)))
    net[0].register_full_backward_hook(lambda module, inner, outer: None)
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_scripted, "has been through torch.jit"),
        (_hooked, "0 has a backward hook"),
        (_compiled, "has been through torch.compile"),
        (
            lambda: nn.Sequential(nn.LazyConv3d(2, 3), nn.Conv3d(2, 2, 1)),
            "Sequential has lazy layers, .*: call it once",
        ),
        (_once_weighted, r"cannot be copied: .*parametrizations\.weight_norm does not"),
        (lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2, momentum=None)), "give it one, such as 0.1"),
    ],
)
def test_networks_that_cannot_be_traced_are_named(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trace(make(), (1, 1, 8, 8, 8))


@pytest.mark.parametrize(
    "made",
    [
        lambda fine, coarse: _Named(fine, [coarse]),
        lambda fine, coarse: OrderedDict(fine=fine, coarse=(coarse, fine)),
        lambda fine, coarse: [{"fine": fine}, None, "coarse", 2],
    ],
)
def test_an_output_comes_out_as_what_it_is(made: Callable[[Tensor, Tensor], Any]) -> None:
    net = _Forward(lambda net, image: made(net.conv(image), net.conv(image).relu()))
    image = torch.randn(2, 1, 4, 4, 4)
    graph = trace(net, tuple(image.shape))
    found, expected = run_stages(graph, list(range(len(graph.cells))), image), net(image)
    assert type(found) is type(expected)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for ours, theirs in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(ours, Tensor):
            torch.testing.assert_close(ours, theirs)
        else:
            assert ours == theirs


def test_attributes_that_are_tensors() -> None:
    net = _Forward(lambda net, image: (image.mT + image.data) @ net.conv(image).mT.detach() @ image.mT)
    image = torch.randn(1, 1, 4, 4, 4)
    graph = trace(net, tuple(image.shape))
    found = run_stages(graph, list(range(len(graph.cells))), image)
    torch.testing.assert_close(found, net(image))


def test_the_shape_of_a_buffer_is_no_shape_of_the_input() -> None:
    graph = trace(_Forward(lambda net, image: net.conv(image) * len(net.number.shape)), (1, 1, 8, 8, 8))
    assert not graph.reads_shape


def test_what_leaves_a_tensor_a_tensor_is_traced() -> None:
    """MONAI's HighResNet does; torch would end the process."""

    def code(net: nn.Module, image: Tensor) -> Tensor:
        made = net.conv(image)
        return made + torch.as_tensor(made) * torch.as_tensor(made, dtype=torch.float64) + torch.as_tensor([2.0])

    network, image = _Forward(code).double(), torch.randn(1, 1, 8, 8, 8, dtype=torch.float64)
    (found,) = pytree.tree_leaves(run_stages(trace(network, tuple(image.shape)), [0], image))
    torch.testing.assert_close(found, network(image))


def test_cells_of_a_layer_that_is_used_twice_have_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.act = nn.Conv3d(1, 2, 1), nn.Conv3d(2, 2, 1), nn.ReLU()

        def forward(self, image: Tensor) -> Tensor:
            return self.act(self.two(self.act(self.one(image))))

    assert [cell.name for cell in trace(Twice(), (1, 1, 4, 4, 4)).cells] == ["one", "act", "two", "act (2)"]


def _attention(order: tuple[int, ...]) -> Callable[[nn.Module, Tensor], Tensor]:
    """Of every voxel to every other one, or of every case."""

    def code(net: nn.Module, image: Tensor) -> Tensor:
        tokens = net.conv(image).flatten(2).permute(order)
        return (tokens @ tokens.transpose(-1, -2)).softmax(-1) @ tokens

    return code


def _over_windows(net: nn.Module, image: Tensor) -> Tensor:
    """As a Swin transformer does it: windows of all cases along the first axis, queries and keys along another one."""
    made = net.conv(image)
    windows = made.view(-1, 2, 2, 2, 4, 4).transpose(1, 2).reshape(-1, 2, 64)
    one, two = windows.reshape(-1, 2, 2, 32).permute(2, 0, 1, 3).unbind(0)
    return (one * two).roll(1, 1).softmax(1).view(image.shape[0], 2, 2, 16).sum((2, 3))


_GRAM = torch.eye(2)


@pytest.mark.parametrize(
    ("code", "goes_over"),
    [
        (lambda net, x: net.conv(x) / net.conv(x).max(), True),
        (lambda net, x: net.conv(x) / net.conv(x).flatten().norm(), True),
        (lambda net, x: net.conv(x) - net.conv(x).mean((2, 3, 4)).mean(0)[:, None, None, None], True),
        (lambda net, x: net.conv(x).flip(0), True),
        (lambda net, x: net.conv(x).cumsum(-5), True),
        (lambda net, x: nn.functional.normalize(net.conv(x), dim=0), True),
        (lambda net, x: net.conv(x).transpose(0, 1).softmax(1), True),
        (lambda net, x: net.conv(x)[1:], True),
        (lambda net, x: torch.stack(net.conv(x).unbind()[::-1]), True),
        (lambda net, x: net.conv(x).flatten(1) @ net.conv(x).flatten(1).T, True),
        (_attention((1, 0, 2)), True),
        (_attention((0, 1, 2)), False),
        (_over_windows, False),
        (lambda net, x: net.conv(x).transpose(0, 1).softmax(0), False),
        (lambda net, x: net.conv(x)[:, [1, 0]].flip(1)[:, :, 1:], False),
        (lambda net, x: torch.cat([net.conv(x), net.conv(x)]).chunk(2)[0] * net.conv.weight.mean(0).sum(), False),
        (lambda net, x: net.conv(x) / net.conv(x).amax((1, 2, 3, 4), keepdim=True), False),
        (lambda net, x: nn.functional.embedding((x > 0).long().flatten(1), net.conv.bias[:, None]).softmax(1), False),
        (lambda net, x: torch.einsum("bcdhw,ce->bedhw", net.conv(x), _GRAM), False),
        (lambda net, x: nn.functional.group_norm(nn.functional.instance_norm(net.conv(x)), 2), False),
    ],
)
def test_what_goes_over_the_cases_of_a_mini_batch_is_noticed(code: Any, goes_over: bool) -> None:
    for batch in (2, 3):
        graph = trace(_Forward(code), (batch, 1, 4, 4, 4))
        assert (graph.whole_batch is not None) == goes_over
