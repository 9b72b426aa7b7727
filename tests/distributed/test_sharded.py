"""Shared volumes: every operation, alone and in chains, gives on slabs what it gives on one device, gradients too.

Here a few hundred random examples on two to four ranks; with LAMP3D_FULL=1 more than a thousand.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Listener, wait
from threading import Thread
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, event, given, settings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lamp3d import launch
from lamp3d.graph.arithmetic import DeferredWeights, arithmetic
from lamp3d.graph.footprint import LiveBytes
from lamp3d.space.layout import Layout
from lamp3d.space.ranks import Space
from lamp3d.space.saved import recomputed
from lamp3d.space.sharded import ShardedVolume, shard
from lamp3d.train import HybridLoss, LossConfig
from tests.distributed.operations import Example, examples, serve
from tests.full import FULL

EXAMPLES = 500 if FULL else 60
"""For each number of ranks."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[Example], list[tuple[float, str]]]]:
    """What every rank finds for an example, on workers that stay for all of them."""
    pools: dict[int, list[Connection]] = {}
    threads = []

    def on(example: Example) -> list[tuple[float, str]]:
        count = 1
        for size in example.sizes:
            count *= size
        if count not in pools:
            with Listener() as listener:
                thread = Thread(target=launch, args=(serve, count, (str(listener.address),)))
                thread.start()
                threads.append(thread)
                connections = [listener.accept() for _ in range(count)]
            pools[count] = sorted(connections, key=lambda pipe: int(pipe.recv()))
        for pipe in pools[count]:
            pipe.send(example)
        answers: dict[Connection, tuple[float, str]] = {}
        while len(answers) < count:
            for pipe in wait(set(pools[count]) - set(answers)):
                answers[pipe] = error, text = pipe.recv()
                assert error < math.inf, (example, text)  # the others may wait for this one
        return list(answers.values())

    yield on
    for pool in pools.values():
        for pipe in pool:
            with suppress(OSError):
                pipe.send(None)
    for thread in threads:
        thread.join()


@pytest.mark.timeout(3600 if FULL else 1800)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_operations_on_slabs_are_those_on_one_device(
    ranks: Callable[[Example], list[tuple[float, str]]], count: int
) -> None:
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=not FULL, database=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(examples(count))
    def check(example: Example) -> None:
        found = ranks(example)
        says = {text for _, text in found}
        assert len(says) == 1, says  # all ranks refuse, or none
        event("refused" if says != {""} else "exact")
        assert max(error for error, _ in found) <= 1e-10, (example, found)

    check()


@pytest.mark.parametrize("padding", [1, 3])
def test_a_rank_whose_planes_come_from_padding_alone_reads_nothing(
    ranks: Callable[[Example], list[tuple[float, str]]], padding: int
) -> None:
    settings = {"kernel": (1, 3, 1), "stride": (2, 1, 2), "padding": (padding, 1, 0), "dilation": (3, 1, 2)}
    convolution = ("conv3d", {**settings, "groups": 4, "bias": True})
    example = Example((2,), (2,), (1, 4, 7, 12, 11), ((0, 6, 7),), (convolution,), 2, channels_last=False)
    assert max(error for error, _ in ranks(example)) <= 1e-10


def _after_tanh(slab: Tensor, operation: nn.Module, placement: Layout, space: Space) -> Tensor:
    made: ShardedVolume = operation(ShardedVolume(slab, placement, space).tanh())
    return made.local


def _kept(mesh: tuple[int, ...]) -> dict[str, float]:
    """What operations keep for their backward beside slab and result, over the slab's bytes."""
    torch.set_num_threads(1)
    space = Space(mesh, (2, 3)[: len(mesh)], range(math.prod(mesh)), dist.get_rank())
    found = {}
    for name, operation in {
        "same": nn.Conv3d(8, 8, 3, padding=1),
        "strided": nn.Conv3d(8, 8, 3, stride=2, padding=1),
        "pool": nn.MaxPool3d(3, stride=2, padding=1),
        "transposed": nn.ConvTranspose3d(8, 8, 3, stride=2, padding=1),
    }.items():
        volume = shard(torch.randn(1, 8, 32, 32, 32), space)
        volume.local = volume.local.clone().requires_grad_()
        with LiveBytes() as live:
            made = operation(volume)
        result = made.local.untyped_storage().nbytes() * (3 if name == "pool" else 1)  # and where its largest were
        found[name] = (live.now - result) / volume.local.nbytes
        with LiveBytes() as live, recomputed():
            again = checkpoint(_after_tanh, volume.local, operation, volume.placement, space, use_reentrant=False)
        found[f"{name} computed again"] = (live.now - again.untyped_storage().nbytes()) / volume.local.nbytes
    return found


MESHES = ((4,), (2, 2))

OnMeshes = dict[tuple[int, ...], tuple[dict[str, float], list[tuple[bool, float]]]]


def _on_meshes() -> OnMeshes:
    """By mesh, what `_kept` and `_deferred` find: one launch for all, since one takes seconds."""
    return {mesh: (_kept(mesh), _deferred(mesh)) for mesh in MESHES}


@pytest.fixture(scope="module")
def on_meshes() -> list[OnMeshes]:
    return launch(_on_meshes, 4)


@pytest.mark.parametrize("mesh", MESHES)
def test_no_operation_keeps_a_copy_of_its_slab(on_meshes: list[OnMeshes], mesh: tuple[int, ...]) -> None:
    by_rank = [found[mesh][0] for found in on_meshes]
    for name in ("same", "strided", "pool", "transposed"):
        shares = [kept[name] for kept in by_rank]
        assert min(shares) >= 0  # beside the last slab nothing may be needed
        assert 0 < max(shares) < 0.3, (name, shares)  # a plane of eight on both sides, or one of sixteen on two axes
        assert {kept[f"{name} computed again"] for kept in by_rank} == {0.0}


def _deferred(mesh: tuple[int, ...]) -> list[tuple[bool, float]]:
    """Of a convolution's parameters: whether backward left their gradients, and how far off they are in the end."""
    torch.manual_seed(0)
    space = Space(mesh, (2, 3)[: len(mesh)], range(math.prod(mesh)), dist.get_rank())
    convolution, images = nn.Conv3d(2, 3, 5, padding=2).double(), torch.randn(1, 2, 9, 11, 7, dtype=torch.float64)
    parameters = list(convolution.parameters())
    expected = torch.autograd.grad(convolution(images).sin().sum(), parameters)
    waiting = DeferredWeights()
    with arithmetic(images.device, "fp32", waiting):
        convolution(shard(images, space)).local.sin().sum().backward()
    left = [parameter.grad is None for parameter in parameters]
    waiting.compute()
    return [
        (was_left, float((space.sum(parameter.grad) - wanted).abs().max() / wanted.abs().max()))
        for was_left, parameter, wanted in zip(left, parameters, expected, strict=True)
        if parameter.grad is not None
    ]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_slabs_weight_gradients_can_be_left_for_later(on_meshes: list[OnMeshes], mesh: tuple[int, ...]) -> None:
    for _, found in (of_rank[mesh] for of_rank in on_meshes):
        assert [left for left, _ in found] == [True, True]
        assert max(error for _, error in found) <= 1e-12


def _loss_on_slabs(missing: Literal["mask", "merge"], exponent: int) -> list[float]:
    """How far loss and gradient of a shared volume are from those of the whole."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 9, 6, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (2, 1, 9, 6, 7), generator=generator)
    annotated = torch.tensor([[True, True, True, True], [False, True, False, True]])
    labels[1][labels[1] == 2] = 0  # an organ without contours is in no label map
    config = LossConfig(class_weights={"b": 2.0}, missing=missing, focal_exponent=exponent)
    loss_fn = HybridLoss(config, ("a", "b", "c"))
    whole = logits.clone().requires_grad_()
    expected = loss_fn(whole, (labels, annotated))
    expected.backward()
    world = dist.get_world_size()
    space = Space((world,), (2,), range(world), dist.get_rank())
    ours, theirs = shard(logits, space), shard(labels, space)
    ours.local = ours.local.clone().requires_grad_()
    leaf = ours.local
    found = loss_fn(ours, (theirs, annotated))
    (found / world).backward()
    begin, end = ours.placement.part(space.coordinate)[0]
    assert leaf.grad is not None
    assert whole.grad is not None
    return [
        abs(float(found.detach() - expected.detach())),
        float((leaf.grad - whole.grad[:, :, begin:end]).abs().max() / whole.grad.abs().max()),
    ]


def _losses_on_slabs() -> list[float]:
    return [*_loss_on_slabs("mask", 2), *_loss_on_slabs("merge", 0)]


def test_the_hybrid_loss_of_a_shared_volume_is_that_of_the_whole() -> None:
    for differences in launch(_losses_on_slabs, 3):
        assert len(differences) == 4
        assert max(differences) <= 1e-12
