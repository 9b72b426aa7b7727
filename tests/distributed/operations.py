"""Random chains of operations on random volumes, on slabs and on one device: what the property tests draw and run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Client
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lamp3d.errors import LampError
from lamp3d.space.layout import AxisCut, Layout
from lamp3d.space.ranks import Space
from lamp3d.space.sharded import gathered_volume
from lamp3d.space.slabs import own_targets  # noqa: F401 (declares the operations)
from tests.plans import DEVICE

Operation = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """A volume, how it is cut, and what is done to it."""

    sizes: tuple[int, ...]
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    bounds: tuple[tuple[int, ...], ...]
    operations: tuple[Operation, ...]
    least: int
    channels_last: bool
    seed: int = field(default=0)


def _triple(smallest: int, largest: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(smallest, largest)] * 3)


@st.composite
def convolutions(draw: st.DrawFn) -> Operation:
    kernel = draw(_triple(1, 5))
    return "conv3d", {
        "kernel": kernel,
        "stride": draw(_triple(1, 3)),
        "padding": (draw(st.sampled_from(["same", "any"])) == "same" and tuple(k // 2 for k in kernel))
        or draw(_triple(0, 3)),
        "dilation": draw(st.one_of(st.just((1, 1, 1)), _triple(1, 3))),
        "groups": draw(st.sampled_from([1, 2, 4])),
        "bias": draw(st.booleans()),
    }


@st.composite
def same_convolutions(draw: st.DrawFn) -> Operation:
    """Those that have a way of their own: the slab's while the border travels."""
    half, dilation, stride = draw(_triple(0, 2)), draw(_triple(1, 2)), (1, 1, 1)
    if draw(st.booleans()):
        half, dilation, stride = (1, 1, 1), (1, 1, 1), draw(_triple(1, 3))
    return "conv3d", {
        "kernel": tuple(2 * h + 1 for h in half),
        "stride": stride,
        "padding": tuple(h * d for h, d in zip(half, dilation, strict=True)),
        "dilation": dilation,
        "groups": draw(st.sampled_from([1, 2, 4])),
        "bias": draw(st.booleans()),
    }


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> Operation:
    stride = draw(_triple(1, 3))
    return "conv_transpose3d", {
        "kernel": draw(_triple(1, 4)),
        "stride": stride,
        "padding": draw(_triple(0, 1)),
        "output_padding": tuple(draw(st.integers(0, s - 1)) for s in stride),
        "dilation": (1, 1, 1),
        "groups": draw(st.sampled_from([1, 2])),
        "bias": draw(st.booleans()),
    }


@st.composite
def pools(draw: st.DrawFn) -> Operation:
    kernel = draw(_triple(1, 4))
    name = draw(st.sampled_from(["max_pool3d", "avg_pool3d"]))
    settings = {
        "kernel_size": kernel,
        "stride": draw(_triple(1, 3)),
        "padding": tuple(draw(st.integers(0, k // 2)) for k in kernel),
    }
    if name == "max_pool3d":
        settings["ceil_mode"] = draw(st.booleans())
    return name, settings


@st.composite
def resizes(draw: st.DrawFn) -> Operation:
    mode = draw(st.sampled_from(["nearest", "trilinear"]))
    settings: dict[str, Any] = {"mode": mode}
    if draw(st.booleans()):
        settings["size"] = draw(_triple(1, 13))
    else:
        settings["scale_factor"] = draw(st.sampled_from([2, 0.5, 1.5, (1, 2, 3)]))
    if mode == "trilinear":
        settings["align_corners"] = draw(st.booleans())
    return "interpolate", settings


@st.composite
def simple(draw: st.DrawFn) -> Operation:
    norm = {"affine": draw(st.booleans())}
    channels = draw(st.sampled_from([(0, 0), (1, -1), (-2, 2)]))  # as many as before
    return draw(
        st.sampled_from([
            ("instance_norm", norm), ("batch_norm", norm), ("group_norm", norm), ("squeeze", {}), ("softmax", {}),
            ("largest", {}), ("leaky_relu", {"inplace": draw(st.booleans())}), ("gate", {}), ("halves", {}),
            ("moments", {}), ("attention", {}), ("waves", {}), ("shuffled", {}), ("spread", {}), ("expanded", {}),
            ("pad", {"amounts": (*draw(st.lists(st.integers(-2, 3), min_size=6, max_size=6)), *channels)}),
            ("slice", {"begin": draw(_triple(0, 2)), "end": draw(_triple(0, 2))}),
        ])
    )  # fmt: skip


@st.composite
def examples(draw: st.DrawFn, ranks: int) -> Example:
    sizes = draw(st.sampled_from([(ranks,), (2, 2)] if ranks == 4 else [(ranks,)]))
    dims = tuple(draw(st.permutations([2, 3, 4]))[: len(sizes)])
    shape = [draw(st.integers(1, 2)), 4, *(draw(st.integers(3, 14)) for _ in range(3))]
    bounds = []
    step = draw(st.integers(1, 3))  # slabs of so many planes, or multiples, stay in place in steps
    for size, dim in zip(sizes, dims, strict=True):
        shape[dim] = max(shape[dim], size * step)
        inner = draw(st.permutations(range(step, shape[dim], step)))[: size - 1]
        bounds.append((0, *sorted(inner), shape[dim]))
    any_operation = st.one_of(
        convolutions(), same_convolutions(), transposed_convolutions(), pools(), resizes(), simple()
    )
    return Example(
        sizes, dims, tuple(shape), tuple(bounds), tuple(draw(st.lists(any_operation, min_size=1, max_size=3))),
        draw(st.integers(1, 3)), draw(st.booleans()), draw(st.integers(0, 99)),
    )  # fmt: skip


def _weights(kernel: tuple[int, ...], groups: int, transposed: bool, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 4 // groups, *kernel)
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE),
        torch.randn(4, generator=generator, dtype=torch.float64).to(DEVICE),
    )


def run(x: Any, operation: Operation, number: int, parameters: list[Tensor]) -> Any:
    """One operation on an ordinary tensor or on a shared one; its weights are appended to ``parameters``."""
    name, settings = operation
    settings = dict(settings)
    if name in ("conv3d", "conv_transpose3d"):
        weight, bias = _weights(settings.pop("kernel"), settings["groups"], name != "conv3d", number)
        parameters += [weight.requires_grad_(), bias.requires_grad_()]
        return getattr(F, name)(x, weight, bias if settings.pop("bias") else None, **settings)
    if name in ("instance_norm", "batch_norm", "group_norm"):
        weight, bias = (t.flatten()[:4].contiguous() for t in _weights((1, 1, 1), 1, False, number))
        affine = (weight.requires_grad_(), bias.requires_grad_()) if settings["affine"] else (None, None)
        parameters += [weight, bias] if settings["affine"] else []
        if name == "instance_norm":
            return F.instance_norm(x, None, None, *affine)
        return F.group_norm(x, 2, *affine) if name == "group_norm" else F.batch_norm(x, None, None, *affine, True)
    if name in ("max_pool3d", "avg_pool3d", "interpolate"):
        return getattr(F, name)(x, **settings)
    if name == "pad":
        return F.pad(x, settings["amounts"])
    if name == "slice":
        keys = tuple(slice(a, n - b) for a, b, n in zip(settings["begin"], settings["end"], x.shape[2:], strict=True))
        return x[(slice(None), slice(None), *keys)]
    return _SIMPLE[name](x, settings)


_SIMPLE: dict[str, Callable[[Any, Any], Any]] = {
    "squeeze": lambda x, _: x * torch.sigmoid(F.adaptive_avg_pool3d(x, 1)),
    "softmax": lambda x, _: torch.softmax(x, 1),
    "largest": lambda x, _: x * x.amax((2, 3, 4), keepdim=True),
    "leaky_relu": lambda x, settings: F.leaky_relu(x * 1.5, 0.1, settings["inplace"]),
    "gate": lambda x, _: torch.where(x > 0, x, x.sum((2, 3, 4), keepdim=True) * x),
    "halves": lambda x, _: torch.cat([x[:, 2:] * 0.5, *torch.chunk(x, 2, 1)[:1]], 1),
    "attention": lambda x, _: x * torch.cat([x.max(1, keepdim=True)[0], x.mean(1, True)], 1).sum(1, True).sigmoid(),
    "waves": lambda x, _: torch.atan2(x, torch.hypot(x, x * 0.5) + 1) + torch.logaddexp(x, x.cos()),
    "shuffled": lambda x, _: F.glu(torch.cat([F.channel_shuffle(x, 2), F.normalize(x, dim=1)], 1), 1),
    "spread": lambda x, _: (x - x.amin((2, 3, 4), True)) * x.min(1, True).values.expand_as(x),
    "expanded": lambda x, _: x[:, :1].expand(-1, 4, -1, -1, -1) * torch.max(x, -x),
    "moments": lambda x, _: x - x.mean((1, 2, 3, 4), keepdim=True) + x.sum(1, keepdim=True) - x.square().mean(),
}


def compare(example: Example) -> tuple[float, str]:
    """The largest difference between slabs and one device, of output and gradients, and what says no (if it does)."""
    generator = torch.Generator().manual_seed(example.seed)
    x = torch.randn(example.shape, generator=generator, dtype=torch.float64).to(DEVICE)
    if example.channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    plain, plain_parameters = x.clone().requires_grad_(), []
    out: Any = plain * 1.0
    for number, operation in enumerate(example.operations):
        try:
            out = run(out, operation, number, plain_parameters)
        except (RuntimeError, ValueError) as error:  # such an operation torch itself refuses
            return 0.0, f"torch: {error}"
        if math.prod(out.shape) > 200_000:
            return 0.0, "torch: larger than it need be"
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(DEVICE)
    largest = float(out.detach().abs().max()) if out.numel() else 1.0
    scale = 1 / max(1.0, largest)  # the sine of large values would magnify their last digits
    ((out * scale).sin() * weights).sum().backward()

    world = dist.get_world_size()
    space = Space(
        example.sizes, example.dims, range(world), dist.get_rank(),
        least=example.least, channels_last=example.channels_last,
    )  # fmt: skip
    extents = (x.shape[2], x.shape[3], x.shape[4])
    cuts = tuple(AxisCut(d, a, b) for a, (d, b) in enumerate(zip(example.dims, example.bounds, strict=True)))
    volume = gathered_volume(x, space).relaid(Layout(extents, cuts))
    volume.local = volume.local.clone().requires_grad_()
    leaf, parameters = volume.local, []
    made: Any = volume * 1.0
    try:
        for number, operation in enumerate(example.operations):
            made = run(made, operation, number, parameters)
    except LampError as error:
        return 0.0, str(error)
    assert made.shape == out.shape, (made.shape, out.shape)
    shared = gathered_volume(weights, space).relaid(made.placement)
    (((made * scale).sin() * shared).sum() / world).backward()
    differences = [_apart(made.gathered().local, out)]
    part = tuple(slice(*ends) for ends in Layout(extents, cuts).part(space.coordinate))
    assert plain.grad is not None
    expected = plain.grad[(slice(None), slice(None), *part)]
    found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    differences.append(_apart(found, expected, float(plain.grad.abs().max())))
    for ours, theirs in zip(parameters, plain_parameters, strict=True):
        total = torch.zeros_like(ours) if ours.grad is None else ours.grad.clone()
        dist.all_reduce(total)
        differences.append(_apart(total, torch.zeros_like(theirs) if theirs.grad is None else theirs.grad))
    return max(differences), ""


def _apart(found: Tensor, expected: Tensor, largest: float = 0.0) -> float:
    """Largest difference, relative to the largest value (or to one, where all are smaller)."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if not found.numel():
        return 0.0
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max()) / max(largest, float(expected.abs().max()), 1.0)


def compare_all(chosen: Sequence[Example]) -> list[tuple[float, str]]:
    """All of them, one after the other."""
    torch.set_num_threads(1)
    dist.all_reduce(torch.zeros(1, device=DEVICE))  # connects all ranks: the first message need not be for everyone
    return [compare(example) for example in chosen]


def serve(address: str) -> None:
    """A worker: each message is an example, the answer what was found."""
    torch.set_num_threads(1)
    pipe = Client(address)
    pipe.send(dist.get_rank())
    while (example := pipe.recv()) is not None:
        try:
            pipe.send(compare(example))
        except Exception as error:  # for the test to show, with the example
            pipe.send((math.inf, f"{type(error).__name__}: {error}"))
            raise  # ends the other workers, who may wait for this one
