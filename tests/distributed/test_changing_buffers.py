"""Buffers that a forward changes, hooks, and what depends on the whole mini-batch: as in the plain network."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lamp3d import Engine, launch, make_plan, mean_over_cases
from lamp3d.errors import LampError, PlanError
from lamp3d.parallel.loss import concatenate
from lamp3d.space.sharded import whole
from tests.plans import plan_at

SHAPE = (2, 1, 6, 6, 6)
STEPS = 3


def conv(channels: int, out: int) -> nn.Conv3d:
    return nn.Conv3d(channels, out, 3, padding=1)


def average(x: Tensor) -> Tensor:
    return x.detach().mean((0, 2, 3, 4), keepdim=True)


class Centred(nn.Module):
    """A moving average, kept and used in some way."""

    def __init__(self, middle: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.middle = conv(1, 4), conv(4, 2), middle
        self.register_buffer("mean", torch.zeros(1, 4, 1, 1, 1))
        self.register_buffer("steps", torch.zeros(()))
        self.double()

    def forward(self, image: Tensor) -> Tensor:
        return self.last(self.middle(self, self.first(image)).tanh())  # type: ignore[no-any-return]


def copied(net: Any, x: Tensor) -> Tensor:
    net.mean.copy_(0.9 * net.mean + 0.1 * average(x))
    return x - net.mean


def decayed(net: Any, x: Tensor) -> Tensor:
    net.mean.mul_(0.9).add_(0.1 * average(x))
    return x - net.mean


def warmed_up(net: Any, x: Tensor) -> Tensor:
    net.steps.add_(1)
    return x * (1 - torch.exp(-0.1 * net.steps))


def used_later(net: Any, x: Tensor) -> Tensor:
    net.mean.lerp_(average(x), 0.1)
    return net.first(x[:, :1]).tanh() - net.mean


def normed(net: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def centred(net: Any, x: Tensor) -> Tensor:
    return x - x.mean((0, 2, 3, 4), keepdim=True)


def spectral() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(conv(1, 4), nn.Tanh(), parametrizations.spectral_norm(conv(4, 4)), conv(4, 2)).double()


@mean_over_cases
def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def apart(
    net: nn.Module, engine: Engine, plain: nn.Module, change: Callable[[nn.Module], object] | None = None
) -> float:
    """How far loss, gradients and buffers are from the plain network's after several steps."""
    draw = torch.Generator().manual_seed(1)
    errors = []
    for _ in range(STEPS):
        image, target = (torch.randn(SHAPE, generator=draw, dtype=torch.double) for _ in range(2))
        for network in (net, plain):
            network.zero_grad()
        loss, expected = engine.step(image, target, squares), squares(plain(image), target)
        expected.backward()
        errors.append(abs(loss.item() / expected.item() - 1))
        gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
        errors += [
            float((p.grad - gradients[n]).abs().max() / gradients[n].abs().max()) for n, p in engine.parameters.items()
        ]
        buffers = dict(plain.named_buffers())
        errors += [float((buffer - buffers[name]).abs().max()) for name, buffer in engine.buffers.items()]
        if change is not None:
            for network in (net, plain):
                change(network)
    return max(errors)


@pytest.mark.parametrize("recompute", ["never", "always"])
@pytest.mark.parametrize("middle", [copied, decayed, warmed_up, used_later, normed, centred, None])
def test_a_step_is_the_plain_networks(middle: Callable[[Any, Tensor], Tensor] | None, recompute: str) -> None:
    net = spectral() if middle is None else Centred(middle)
    plain = copy.deepcopy(net)
    engine = Engine(net, make_plan(net, SHAPE, recompute=recompute))
    assert engine.plan.micro_batches == 1
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(net.get_buffer(name), buffer)  # planning has changed nothing
    assert apart(net, engine, plain) < 1e-12
    with pytest.raises(PlanError, match=r"changes in the forward|is computed over the mini-batch"):
        make_plan(net, SHAPE, micro_batches=2)


def test_what_wants_whole_mini_batches_in_training_alone_is_refused_there() -> None:
    net = Centred(lambda net, x: F.batch_norm(x, net.mean.flatten(), 1 + net.mean.flatten(), training=net.training))
    image = torch.randn(SHAPE, dtype=torch.double)
    engine = Engine(net.eval(), make_plan(net, SHAPE, micro_batches=2))
    torch.testing.assert_close(engine.forward(image), net(image).detach(), rtol=1e-12, atol=0)
    net.train()
    with pytest.raises(PlanError, match="'batch_norm' is computed over the mini-batch"):
        engine.step(image, image[:, :1], squares)


def test_what_is_loaded_later_is_used() -> None:
    net = Centred(lambda net, x: x * (1 / (1 + net.steps)))
    plain = copy.deepcopy(net)
    engine = Engine(net, make_plan(net, SHAPE, micro_batches=2))
    state = net.state_dict() | {"steps": torch.tensor(3.0).double()}
    assert apart(net, engine, plain, lambda network: network.load_state_dict(state)) < 1e-12


def hooked(kind: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(conv(1, 4), nn.Tanh(), conv(4, 4), nn.Tanh(), conv(4, 2)).double()
    if kind == "before":
        net.register_forward_pre_hook(lambda _, images: (images[0] * 3,))
    elif kind == "after":
        net.register_forward_hook(lambda *_: _[2] * 2)
    return net


@pytest.mark.parametrize("kind", ["before", "after"])
def test_hooks_of_the_network_itself_are_run(kind: str) -> None:
    net, plain = hooked(kind), hooked(kind)
    assert apart(net, Engine(net, make_plan(net, SHAPE, micro_batches=2)), plain) < 1e-12


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble_v"])
def test_hooks_of_parameters_see_their_gradients(schedule: str) -> None:
    net, plain = hooked(""), hooked("")
    for network in (net, plain):
        for parameter in network.parameters():
            parameter.register_hook(lambda gradient: gradient * 2)
    assert apart(net, Engine(net, make_plan(net, SHAPE, micro_batches=2, schedule=schedule)), plain) < 1e-12


def test_what_is_no_batch_is_not_joined() -> None:
    pieces = [(torch.ones(1, 2), None, 3), (torch.ones(2, 2), None, 3)]
    joined, *others = concatenate(pieces)
    assert joined.shape == (3, 2)
    assert others == [None, 3]
    with pytest.raises(PlanError, match="a single number for 2 micro-batches"):
        concatenate([torch.tensor(1.0)] * 2)


class Dropped(nn.Module):
    """What is dropped in place is dropped for all who look at it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.drop = conv(1, 4), conv(4, 2), nn.Dropout3d(1.0, inplace=True)
        self.double()

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(image)
        dropped = self.drop(x)
        return self.last(x + dropped)  # type: ignore[no-any-return]


def find_out() -> dict[str, Any]:
    torch.set_num_threads(1)
    slabs: dict[str, Any] = {"devices": 2, "space": (2,), "space_dims": (2,)}
    found: dict[str, Any] = {}
    makers = {
        middle.__name__: lambda middle=middle: Centred(middle) for middle in (copied, decayed, warmed_up, used_later)
    }
    for name, make in {**makers, "spectral": spectral}.items():
        net = make()
        starts = [0, len(plan_at(net, SHAPE, [0], 1).stages[0].cells) - 1]
        found[f"{name}, a pipeline"] = apart(net, Engine(net, plan_at(net, SHAPE, starts, 1, devices=2)), make())
        try:
            net = make()
            found[f"{name}, slabs"] = apart(net, Engine(net, plan_at(net, SHAPE, [0], 1, **slabs)), make())
        except LampError as error:
            found[f"{name}, slabs"] = str(error)
    net = Dropped()
    plan = plan_at(net, (1, 1, 8, 6, 6), [0], 1, **slabs)
    image = torch.ones(1, 1, 8, 6, 6, dtype=torch.double)
    output = whole(Engine(net, plan).forward(image))
    found["dropped in place"] = float((output - Dropped()(image)).abs().max())
    return found


def test_two_ranks_give_the_plain_networks_numbers_or_refuse() -> None:
    for found in launch(find_out, 2):
        refused = {name: found.pop(name) for name, value in list(found.items()) if isinstance(value, str)}
        assert all(re.search(r"cannot be", says) for says in refused.values()), refused
        assert all(error < 1e-10 for error in found.values()), found
        assert {name for name in found if name.endswith("pipeline")} >= {"copied, a pipeline", "spectral, a pipeline"}
