"""One step on one device and on a plan, and how far they are apart: the contract, for anyone's network."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lamp3d.errors import ConfigError
from lamp3d.graph.inputs import arguments, batch_of, shapes_by_name
from lamp3d.parallel import Engine, launch, mean_over_cases
from lamp3d.plan import Plan, TimeLine
from lamp3d.space.sharded import whole

ZERO = 1e-5
"""Of the largest gradient: a gradient below that counts as zero, such as that of a bias in front of a norm."""


@dataclass(frozen=True)
class RankReport:
    """What one rank found.

    Attributes:
        differences: largest relative difference of "output" (where the rank holds it), "loss", and the gradient of each
            of the rank's parameters.
        bytes_sent: by this rank, in one training step.
        peak_bytes: of the worker, the step on one device not included.
        line: the time line of all ranks' second step (the first one warms up).
    """

    differences: dict[str, float]
    bytes_sent: int
    peak_bytes: int
    line: TimeLine


def load_network(path: str) -> nn.Module:
    """A network from ``package.module:function`` (called without arguments) or ``package.module:CLASS``.

    The module may also lie in the present folder.

    Raises:
        ConfigError: there is no such thing, or it gives no module.
    """
    module, _, name = path.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:  # as `python -m` does
        sys.path.insert(0, os.getcwd())
    try:
        network = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"no network {path!r} ({error}); write it as package.module:function.") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{path} gives {type(network).__name__}, not a torch.nn.Module.")
    return network


def verify(
    make_network: Callable[[], nn.Module], plan: Plan, dtype: Literal["float64", "float32"] = "float64"
) -> list[RankReport]:
    """Run one step on one device and the same on the plan's devices.

    The loss is a mean over cases of a function that is not linear, so that every schedule can be checked.

    Args:
        make_network: a picklable function; called in every worker with torch's random state seeded alike.
        plan: its input shape is the mini-batch; its precision must be fp32.
        dtype: in which to compute.

    Returns:
        the reports by rank.
    """
    if plan.precision != "fp32":
        raise ConfigError("verify compares plans in fp32 (computed in float64 or float32); bf16 rounds too coarsely.")
    return launch(_work, plan.devices, (make_network, plan, dtype))


def _work(make_network: Callable[[], nn.Module], plan: Plan, dtype: str) -> RankReport:
    torch.manual_seed(0)
    network = make_network().to(getattr(torch, dtype)).train()
    generator = torch.Generator().manual_seed(1)
    make = partial(torch.randn, generator=generator, dtype=getattr(torch, dtype))
    inputs = {name: make(shape) for name, shape in shapes_by_name(plan.input_shape, network).items()}
    targets = make(batch_of(plan.input_shape))
    engine = Engine(copy.deepcopy(network), plan)
    given = inputs if engine.reads_input else None, targets if engine.holds_output else None
    engine.step(*given, _loss)
    bytes_sent, peak_bytes = engine.bytes_sent, engine.peak_bytes()
    for parameter in engine.parameters.values():
        parameter.grad = None
    loss = engine.step(*given, _loss)
    line = engine.time_line()
    output = engine.forward(inputs if engine.reads_input else None)

    network, targets = network.to(engine.device), targets.to(engine.device)
    args, kwargs = arguments(network, {name: tensor.to(engine.device) for name, tensor in inputs.items()})
    plain_output = network(*args, **kwargs)
    plain_loss = _loss(plain_output, targets)
    torch.autograd.backward(plain_loss)
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    floor = ZERO * max((float(gradient.abs().max()) for gradient in gradients.values()), default=0.0)
    differences = {"loss": _relative(loss, plain_loss.detach().double().cpu())}
    if output is not None:
        output = pytree.tree_map(whole, output)
        pairs = zip(pytree.tree_leaves(output), pytree.tree_leaves(plain_output), strict=True)
        differences["output"] = max(_relative(a, b.detach()) for a, b in pairs)
    for name, parameter in engine.parameters.items():
        expected = gradients.get(name, torch.zeros_like(parameter))
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        differences[name] = _relative(found, expected, floor)
    return RankReport(differences, bytes_sent, peak_bytes, line)


@mean_over_cases
def _loss(output: Any, targets: Tensor) -> Tensor:
    losses = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            goal = targets.view(-1, *[1] * (leaf.dim() - 1))
            errors = (leaf - goal).square().mean(tuple(range(1, leaf.dim())))
            losses.append((errors + 0.1).sqrt().mean())
    return torch.stack(losses).sum()


def _relative(found: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    """The largest difference, relative to the largest expected value (at least ``floor``)."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(floor))
