"""One step on one device and on a plan, and how far they are apart: the contract, for anyone's network."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lamp3d.graph.inputs import arguments, batch_of, shapes_by_name
from lamp3d.parallel import Engine, launch, mean_over_cases
from lamp3d.plan import Plan, TimeLine
from lamp3d.space.sharded import whole

ZERO = 1e-5
"""Of the largest gradient: a gradient below that counts as zero."""


@dataclass(frozen=True)
class RankReport:
    """What one rank found.

    Attributes:
        differences: largest relative difference of "output" (where the rank holds it), "loss", and the gradient of each
            of the rank's parameters from one device's, computed in float64.
        rounding: in float32 also one device's differs from that, where sums cancel by more than one expects; in float64
            zeros.
        bytes_sent: by this rank, in one training step.
        peak_bytes: of the worker, the step on one device not included.
        line: the time line of all ranks' second step (the first one warms up).
    """

    differences: dict[str, float]
    rounding: dict[str, float]
    bytes_sent: int
    peak_bytes: int
    line: TimeLine


def verify(
    make_network: Callable[[], nn.Module], plan: Plan, dtype: Literal["float64", "float32"] = "float64"
) -> list[RankReport]:
    """Run one step on one device and the same on the plan's devices.

    The loss is a mean over cases of a function that is not linear, so that every schedule can be checked.

    Args:
        make_network: a picklable function; called in every worker with torch's random state seeded alike.
        plan: its input shape is the mini-batch. bf16 rounds too coarsely to compare, so that precision does not count.
        dtype: in which to compute.

    Returns:
        the reports by rank.
    """
    return launch(_work, plan.devices, (make_network, plan.model_copy(update={"precision": "fp32"}), dtype))


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

    plain = _on_one_device(network.to(engine.device), inputs, targets)
    exact = plain if dtype == "float64" else _on_one_device(network.double(), inputs, targets)
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in engine.parameters.items()
    }
    here = [] if output is None else pytree.tree_leaves(pytree.tree_map(whole, output))
    found = _Step(here, loss, gradients)
    return RankReport(found.differences(exact), plain.differences(exact), bytes_sent, peak_bytes, line)


@dataclass(frozen=True)
class _Step:
    """What comes out of a step: output (if it is here), loss, and gradients by parameter."""

    output: list[Tensor]
    loss: Tensor
    gradients: dict[str, Tensor]

    def differences(self, exact: _Step) -> dict[str, float]:
        """As :attr:`RankReport.differences` has them.

        A gradient counts as large as the largest of its layer, which a sum that cancels does not say itself.
        """
        sizes = {name: float(gradient.abs().max()) for name, gradient in exact.gradients.items()}
        of_layer: dict[str, float] = defaultdict(lambda: ZERO * max(sizes.values(), default=0.0))
        for name, size in sizes.items():
            of_layer[_layer(name)] = max(of_layer[_layer(name)], size)
        found = {"loss": _relative(self.loss, exact.loss)}
        if self.output:
            pairs = zip(self.output, exact.output, strict=True)
            found["output"] = max(_relative(ours, theirs) for ours, theirs in pairs)
        return found | {
            name: _relative(gradient, exact.gradients[name], of_layer[_layer(name)])
            for name, gradient in self.gradients.items()
        }


def _on_one_device(network: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> _Step:
    network.zero_grad()
    first = next(network.parameters())
    args, kwargs = arguments(network, {name: tensor.to(first) for name, tensor in inputs.items()})
    output = network(*args, **kwargs)
    loss = _loss(output, targets.to(first))
    torch.autograd.backward(loss)
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in network.named_parameters()
    }
    return _Step([leaf.detach() for leaf in pytree.tree_leaves(output)], loss.detach(), gradients)


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _relative(found: Tensor, expected: Tensor, size: float = 0.0) -> float:
    """The largest difference, relative to the largest expected value (or ``size``); infinite if it is not a number."""
    found, expected = found.detach().double().cpu(), expected.double().cpu()
    apart = (found - expected).abs().max() / expected.abs().max().clamp_min(max(size, 1e-30))
    return float(apart.nan_to_num(nan=float("inf")))


@mean_over_cases
def _loss(output: Any, targets: Tensor) -> Tensor:
    losses = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            goal = targets.view(-1, *[1] * (leaf.dim() - 1))
            errors = (leaf - goal).square().mean(tuple(range(1, leaf.dim())))
            losses.append((errors + 0.1).sqrt().mean())
    return torch.stack(losses).sum()
