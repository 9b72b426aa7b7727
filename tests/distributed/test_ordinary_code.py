"""What users write without thinking of devices: lists of targets, heads without a loss, changes in place."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from enum import Enum
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp3d import Engine, launch, mean_over_cases
from lamp3d.errors import LampError, PlanError
from lamp3d.graph.buffers import training_batch_norm
from lamp3d.parallel.mesh import Place
from lamp3d.parallel.outbox import ThreadedOutbox
from lamp3d.parallel.shares import own_share
from lamp3d.parallel.transfer import Transfer
from tests.networks import Aged
from tests.plans import cell_names, plan_at

REPLICAS: dict[str, Any] = {"devices": 2, "data": 2}
SLABS: dict[str, Any] = {"devices": 2, "space": (2,), "space_dims": (2,)}
PIPELINE: dict[str, Any] = {"devices": 2}


def two_layers(out: int = 1) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, out, 3, padding=1))
    return layers.double()


class InPlaceAfter(nn.Module):
    """An operation that does nothing here, and a change of what it gives."""

    def __init__(self, nothing: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 1, 3, padding=1)
        self.nothing = nothing
        self.double()

    def forward(self, image: Tensor) -> Tensor:
        skip = self.first(image)
        return self.last(skip + F.relu(self.nothing(skip), inplace=True))


class Standardised(nn.Module):
    """A convolution whose weight is computed: under a plan that is cut there, it is a value that crosses the cut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv3d(1, 1, 3, padding=1)
        self.double()

    def forward(self, image: Tensor) -> Tensor:
        return F.conv3d(image.sin(), (self.layer.weight * 2).tanh(), padding=1).tanh()


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.one, self.two = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 1, 1), nn.Conv3d(4, 1, 1)
        self.double()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        body = self.body(image).relu()
        return self.one(body), self.two(body)


class Deep(TwoHeads):
    """Its second head, and a factor, are switched from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.factor, self.mode = True, torch.ones(1).double(), nn.Sequential(Mode())

    def forward(self, image: Tensor) -> Any:
        body = self.mode(self.body(image).relu() * self.factor)
        return (self.one(body), self.two(body)) if self.deep else self.one(body)


class Mode(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image * 2 if self.training else image


class TwiceInAnotherOrder(nn.Module):
    """Tied weights, which are used in another order than the layers are named."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.two, self.one, self.last = (nn.Conv3d(1, 1, 3, padding=1) for _ in range(3))
        self.one.weight = self.two.weight
        self.double()

    def forward(self, image: Tensor) -> Tensor:
        return self.last(self.two(self.one(image).tanh()) * torch.linspace(0, 1, 6).to(image))


def in_two_dimensions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1)).double()


def resized(x: Tensor) -> Tensor:
    return F.interpolate(x, size=x.shape[2:], mode="trilinear")


def padded(x: Tensor) -> Tensor:
    return F.pad(x, (0,) * 6)


def sliced(x: Tensor) -> Tensor:
    return F.pad(F.relu(x[:, :, 2:], inplace=True), (0, 0, 0, 0, 2, 0))


def reduced(x: Tensor) -> Tensor:
    return x * x.mean(axis=(2, 3, 4), keepdim=True) + x.softmax(1, torch.float64) + (0 if x == None else 1)  # noqa: E711


@mean_over_cases
def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


@mean_over_cases
def of_all_targets(output: Tensor, targets: list[Tensor]) -> Tensor:
    return sum(((output - target).square().mean() for target in targets), torch.zeros(())) / len(targets)


def no_mean(output: Tensor, target: Tensor) -> Tensor:
    return (squares(output, target) + 0.1).sqrt()


@mean_over_cases
def of_annotated(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """The second head is judged only in cases that are annotated."""
    (one, two), (truth, annotated) = output, target
    loss = (one - truth).square().mean()
    if annotated.any():
        loss = loss + ((two - truth).square().mean((1, 2, 3, 4)) * annotated).mean()
    return loss


def apart(net: nn.Module, images: Any, targets: Any, loss: Any, settings: dict[str, Any]) -> float:
    """How far loss and gradients are from the plain network's, relative."""
    plain = copy.deepcopy(net)
    if isinstance(images, tuple):
        expected = sum(loss(plain(image), target) for image, target in zip(images, targets, strict=True)) / len(images)
    else:
        expected = loss(plain(**images) if isinstance(images, dict) else plain(images), targets)
    expected.backward()
    shape: Any = (
        {name: tuple(image.shape) for name, image in images.items()}
        if isinstance(images, dict)
        else tuple((images[0] if isinstance(images, tuple) else images).shape)
    )
    starts = settings.get("starts", [0, 1] if settings is PIPELINE else [0])
    settings = {key: value for key, value in settings.items() if key != "starts"}
    engine = Engine(net, plan_at(net, shape, starts, 1, **settings))
    found = engine.step(images, targets, loss)
    errors = [abs(found.item() / expected.item() - 1)]
    for name, parameter in plain.named_parameters():
        if len(starts) > 1 and name not in engine.parameters:
            continue  # the other rank's
        ours = engine.parameters[name].grad
        assert (ours is None) == (parameter.grad is None), name
        if ours is not None and parameter.grad is not None:
            errors.append(float((ours - parameter.grad).abs().max() / parameter.grad.abs().max()))
    return max(errors)


def refusal(
    net: nn.Module, images: Tensor, targets: Any, settings: dict[str, Any], after: Callable[[], object] = lambda: None
) -> str:
    engine = Engine(net, plan_at(net, tuple(images.shape), [0], 1, **settings))
    after()
    try:
        engine.step(images, targets, squares)
    except LampError as error:
        return str(error)
    return "nothing"


def find_out() -> dict[str, Any]:
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(1)
    image, a, b = (torch.randn(2, 1, 6, 6, 6, generator=draw, dtype=torch.double) for _ in range(3))
    one = image[:1]
    annotated = {k: torch.tensor([k & 1, k >> 1]) for k in range(4)}
    found: dict[str, Any] = {
        "a list of targets": apart(two_layers(), image, [a, b], of_all_targets, REPLICAS),
        "a tuple of targets": apart(two_layers(), image, (a, b), of_all_targets, REPLICAS),
        "a tuple of micro-batches": apart(two_layers(), (image, 2 * image), (a, b), no_mean, REPLICAS),
        "resized": apart(InPlaceAfter(resized), one, a[:1], squares, SLABS),
        "reduced": apart(InPlaceAfter(reduced), one, a[:1], squares, SLABS),
        "padded": apart(InPlaceAfter(padded), one, a[:1], squares, SLABS),
    }
    aged = {"age": torch.randn(2, 3, generator=draw, dtype=torch.double), "image": image}
    for name, way in {"replicas": REPLICAS, "slabs": SLABS, "a pipeline": PIPELINE}.items():
        torch.manual_seed(0)  # the same weights on both ranks
        found[f"a vector first, {name}"] = apart(Aged().double(), aged, a, squares, way)
        if way is not SLABS:
            found[f"two dimensions, {name}"] = apart(in_two_dimensions(), image[:, :, 0], a[:, :, 0], squares, way)
    for k in (0, 1, 2, 3):
        found[f"a head judged in {k}"] = apart(TwoHeads(), image, (a, annotated[k]), of_annotated, REPLICAS)
    names = cell_names(Standardised(), tuple(image.shape))
    for cut in range(1, len(names) - 1):
        way = {"schedule": "zero_bubble_v", "ranks": [0, 1, 0], "starts": [0, cut, len(names) - 1]}
        found[f"a computed weight, cut at {cut}"] = apart(Standardised(), image, a, squares, way)
    found["weights"] = refusal(two_layers(), image, (a, torch.ones(3)), REPLICAS)
    found["no tensor"] = refusal(two_layers(), image, (a, None), REPLICAS)
    normed = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2), nn.Conv3d(2, 1, 1)).double().eval()
    found["trained after all"] = refusal(normed, image, a, REPLICAS, normed.train)
    found["a slice changed"] = refusal(InPlaceAfter(sliced), one, a[:1], SLABS)
    shallow = Deep()
    shallow.deep = False
    found["a head unknown"] = refusal(shallow, image, a, REPLICAS, lambda: setattr(shallow, "deep", True))
    return found


REFUSED = ("weights", "no tensor", "trained after all", "a slice changed", "a head unknown")


def test_numbers_are_the_plain_networks() -> None:
    for found in launch(find_out, 2):
        refused = {key: found.pop(key) for key in REFUSED}
        assert all(error < 1e-10 for error in found.values()), found
        assert len(found) == 18
        assert "must be the batch of 2; one of them is (3,)" in refused["weights"]
        assert "one of them is NoneType" in refused["no tensor"]
        assert "is a BatchNorm in training mode" in refused["trained after all"]
        assert "it would change a slice in place" in refused["a slice changed"]
        assert "uses two.weight, which it did not when the engine was made" in refused["a head unknown"]


def test_what_is_set_between_steps_is_noticed() -> None:
    net, image = Deep(), torch.randn(1, 1, 4, 4, 4, dtype=torch.double)
    engine = Engine(net, plan_at(net, tuple(image.shape), [0], 1))
    cut = Engine(net, plan_at(net, tuple(image.shape), [0, 1], 1, ranks=[0, 0]))

    def hook() -> None:
        net.mode.register_forward_hook(lambda module, args, output: output * 3)

    for change in (
        lambda: net.factor.mul_(2),
        lambda: setattr(net, "factor", torch.full((1,), 5.0).double()),
        net.mode.eval,
        hook,
        lambda: setattr(net, "deep", False),
    ):
        assert engine.forward(image)[0].shape == image.shape
        change()
        with torch.no_grad():
            torch.testing.assert_close(engine.forward(image), net(image), rtol=1e-12, atol=0)
    with pytest.raises(PlanError, match="or is set up otherwise than it was then"):
        cut.forward(image)


class SetUp(nn.Module):
    """Set up by all but numbers and words of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.act = nn.Conv3d(1, 4, 1), nn.Conv3d(4, 1, 1), nn.LeakyReLU(0.1)
        self.config, self.mixes, self.scale = SimpleNamespace(alpha=1.0, own=self), {"a"}, np.ones(1)
        self.gate, self.squash, self.kind = partial(F.elu, alpha=1.0), torch.tanh, Kind.PLAIN
        self.double()

    def forward(self, image: Tensor) -> Tensor:
        image = self.gate(self.act(self.first(image))) * self.config.alpha * float(self.scale[0])
        if self.kind is Kind.SINE:
            image = image.sin()
        return self.last(self.squash(image) + ("b" in self.mixes))


class Kind(Enum):
    PLAIN, SINE = 1, 2


def test_what_is_replaced_or_set_in_objects_between_steps_is_noticed() -> None:
    net, image = SetUp(), torch.randn(1, 1, 4, 4, 4, dtype=torch.double)
    engine = Engine(net, plan_at(net, tuple(image.shape), [0], 1))
    for change in (
        lambda: setattr(net, "act", nn.LeakyReLU(0.7)),
        lambda: setattr(net.config, "alpha", 2.0),
        lambda: net.mixes.add("b"),
        lambda: net.scale.fill(3),
        lambda: setattr(net, "gate", partial(F.elu, alpha=0.5)),
        lambda: setattr(net, "squash", torch.sigmoid),
        lambda: setattr(net, "kind", Kind.SINE),
    ):
        change()
        with torch.no_grad():
            torch.testing.assert_close(engine.forward(image), net(image), rtol=1e-12, atol=0)


def test_a_head_that_is_thawed_is_trained_even_if_it_came_later() -> None:
    net, image = Deep(), torch.randn(1, 1, 4, 4, 4, dtype=torch.double)
    net.deep = False
    engine = Engine(net, plan_at(net, tuple(image.shape), [0], 1))
    net.deep = True
    net.body.requires_grad_(False)
    for thawed in (False, True):
        net.two.requires_grad_(thawed)
        engine.step(image, image, lambda output, target: squares(output[0], target) + squares(output[1], target))
        assert (net.two.weight.grad is not None) == thawed


def test_a_tensor_kept_from_inference_mode_is_read() -> None:
    net, image = Deep(), torch.randn(1, 1, 4, 4, 4, dtype=torch.double)
    with torch.inference_mode():
        net.factor = torch.full((1,), 2.0).double()
    engine = Engine(net, plan_at(net, tuple(image.shape), [0], 1))
    with torch.no_grad():
        torch.testing.assert_close(engine.forward(image), net(image), rtol=1e-12, atol=0)


class Scaled(nn.Module):
    """Takes grey values as they lie in files, or fractions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv3d(1, 1, 1)
        self.double()

    def forward(self, image: Tensor) -> Tensor:
        fractions = image if image.is_floating_point() else image / 255
        return self.layer(fractions.to(self.layer.weight.dtype))


def test_code_that_looks_at_the_type_of_its_input_is_traced_for_each() -> None:
    net, image = Scaled(), torch.arange(64, dtype=torch.uint8).reshape(1, 1, 4, 4, 4)
    engine = Engine(net, plan_at(net, tuple(image.shape), [0], 1))
    for given in (image.double(), image, image / 255, image.long(), image > 9):
        with torch.no_grad():
            torch.testing.assert_close(engine.forward(given), net(given), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_may_be_in_half_precision_under_autocast(dtype: torch.dtype) -> None:
    net, image = nn.Sequential(nn.Conv3d(1, 2, 1), nn.ReLU(), nn.Conv3d(2, 1, 1)), torch.randn(1, 1, 4, 4, 4).to(dtype)
    engine = Engine(net, plan_at(net, tuple(image.shape), [0], 1, precision="bf16"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(engine.forward(image), net(image))


def test_tied_parameters_are_named_once_and_as_the_network_does() -> None:
    net = TwiceInAnotherOrder()
    engine = Engine(net, plan_at(net, (2, 1, 6, 6, 6), [0, 1], 1, ranks=[0, 0]))
    assert set(engine.parameters) == set(dict(net.named_parameters()))
    assert not engine.buffers  # what the code makes is none


class AsDeepAsTheVolume(nn.Module):
    """Another graph for every depth."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv3d(1, 1, 3, padding=1)
        self.double()

    def forward(self, image: Tensor) -> Tensor:
        for _ in range(image.shape[2] // 4):
            image = image + self.layer(image).tanh()
        return image


@pytest.mark.parametrize("recompute", ["never", "always"])
def test_alone_on_its_device_a_network_may_be_another_one_for_every_shape(recompute: str) -> None:
    net = AsDeepAsTheVolume()
    plain = copy.deepcopy(net)
    engine = Engine(net, plan_at(net, (1, 1, 4, 4, 4), [0], 1, recompute=recompute))
    for depth in (4, 12, 8, 4):
        image = torch.randn(1, 1, depth, 4, 4, dtype=torch.double)
        plain.zero_grad()
        net.zero_grad()
        expected = squares(plain(image), -image)
        expected.backward()
        torch.testing.assert_close(engine.step(image, -image, squares), expected.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(net.layer.weight.grad, plain.layer.weight.grad, rtol=1e-12, atol=1e-14)
    cell = engine.graph.cells[0].name
    in_blocks = Engine(AsDeepAsTheVolume(), plan_at(net, (1, 1, 4, 4, 4), [0], 1, recompute=((cell,),)))
    with pytest.raises(PlanError, match=r"does something else with an input of .* one with the whole network on each"):
        in_blocks.step(torch.randn(1, 1, 8, 4, 4, dtype=torch.double), torch.zeros(1).double(), squares)


def test_an_engine_does_not_train_parameters_that_it_does_not_know() -> None:
    net, image = two_layers(), torch.randn(1, 1, 4, 4, 4, dtype=torch.double)
    engine = Engine(net, plan_at(net, (1, 1, 4, 4, 4), [0], 1))
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.load_state_dict(state)
    engine.step(image, -image, squares)
    net.load_state_dict(state, assign=True)
    with pytest.raises(PlanError, match=r"0\.weight is another one .* load without assign"):
        engine.step(image, -image, squares)


def test_a_share_is_what_the_mini_batch_is_cut_into() -> None:
    a, b = torch.arange(4), torch.arange(4) * 10
    assert own_share([a, b], 1, 2, listed=True)[0] is b
    assert [t.tolist() for t in own_share([a, b], 1, 2, listed=False)] == [[2, 3], [20, 30]]
    assert own_share({"x": (a,)}, 0, 4, listed=False, batch=4)["x"][0].tolist() == [0]
    assert own_share(None, 0, 2, listed=False) is None
    for wrong in ([a, b[:3]], [a, torch.tensor(1.0)], [a, "b"]):
        with pytest.raises(PlanError, match="must be the batch of 4"):
            own_share(wrong, 0, 2, listed=False)
    with pytest.raises(PlanError, match="cannot be shared evenly"):
        own_share(a, 0, 3, listed=False)


@pytest.mark.parametrize(
    ("norm", "wants_all"),
    [
        (nn.BatchNorm3d(2), True),
        (nn.BatchNorm3d(2).eval(), False),
        (nn.BatchNorm3d(2, track_running_stats=False).eval(), True),
        (nn.InstanceNorm3d(2), False),
        (nn.InstanceNorm3d(2, track_running_stats=True), True),
        (nn.InstanceNorm3d(2, track_running_stats=True).eval(), False),
        (nn.GroupNorm(1, 2), False),
    ],
    ids=str,
)
def test_norms_that_want_whole_mini_batches(norm: nn.Module, wants_all: bool) -> None:
    assert (training_batch_norm(nn.Sequential(norm)) is not None) == wants_all


def test_a_send_never_waits_for_its_receiver() -> None:
    class Later:
        def __init__(self) -> None:
            self.arrived = threading.Event()

        def wait(self) -> None:
            self.arrived.wait()

    works, outbox = [Later() for _ in range(100)], ThreadedOutbox()
    for work in works:
        outbox.put(work, torch.zeros(1))  # type: ignore[arg-type]
    assert len(outbox) == 100
    for work in works:
        work.arrived.set()
    outbox.flush()
    assert len(outbox) == 0


def test_a_send_that_has_failed_is_told_when_all_are_done() -> None:
    class Lost:
        def wait(self) -> None:
            raise RuntimeError("connection closed by peer")

    place = Place(0, 2, 0, 0, 0, ((0, 1),), None, None, None)
    transfer = Transfer(torch.device("cpu"), place, [(0, 1)])
    (outbox,) = transfer._outboxes.values()
    outbox.put(Lost(), torch.zeros(1))  # type: ignore[arg-type]
    while len(outbox):
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match="closed by peer"):
        transfer.flush()
