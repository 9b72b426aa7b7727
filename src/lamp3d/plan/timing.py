"""Timing cells, and the loss, on the device at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamp3d.graph import CellGraph, DeferredWeights, Stage, arithmetic, laid_out, module_device, preserved_buffers
from lamp3d.graph.footprint import LiveBytes
from lamp3d.graph.inputs import InputShape
from lamp3d.graph.shapes import ValueSpec
from lamp3d.plan.profile import CellSeconds, LossCost, Profile, Timing, profile_of
from lamp3d.plan.walk import Values, inputs_of, walk
from lamp3d.plan.work import account

TimedLoss = Callable[[Any], Tensor]
"""From a network's output to a 0-dim tensor: with targets of its own, to be timed."""

STEADY_SECONDS, MOST_REPEATS = 1.5, 3
"""Passes go on until they have taken so many seconds, but to no more than so many times the number asked for."""

LOSS_VOXELS = 1 << 20
"""At most so many are timed; losses of larger volumes take in proportion."""


def profile_cells(
    graph: CellGraph,
    input_shape: InputShape,
    *,
    precision: str,
    channels_last: bool,
    repeats: int = 3,
    split: bool = False,
) -> Profile:
    """Time every cell on the device where its parameters are, and find what it saves."""
    settings = {"precision": precision, "channels_last": channels_last, "split": split}
    timing = time_cells(graph, input_shape, repeats=repeats, **settings)  # type: ignore[arg-type]
    return profile_of(account(graph, input_shape, device=module_device(graph.root), **settings), timing)  # type: ignore[arg-type]


def time_cells(
    graph: CellGraph,
    input_shape: InputShape,
    *,
    precision: str,
    channels_last: bool,
    repeats: int = 3,
    split: bool = False,
) -> Timing:
    """Time forward and backward of every cell.

    Args:
        graph: the network's cells; they run on the device where its parameters are.
        input_shape: (b, C, D, H, W) of one micro-batch; of several inputs, by name.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).
        channels_last: whether the inputs are laid out channels-last.
        repeats: timed passes through all cells, after one that warms up; more where they take moments.
        split: whether the backward is done in two parts, weight gradients apart.
    """
    device = module_device(graph.root)

    def run(stage: Stage, inputs: Values) -> tuple[_Marks, Values]:
        return _time_cell(stage, inputs, precision, device, split)

    values = inputs_of(graph, input_shape, torch.randn, device, channels_last=channels_last)
    gradients = [(p, p.grad) for p in graph.root.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None  # or what is computed apart would be added to it
    try:
        with preserved_buffers(graph.root):
            marked = list(_passes(lambda: [marks for marks, _ in walk(graph, values, run)], device, repeats))
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    passes = [[marks.seconds(split) for marks in of_cells] for of_cells in marked]
    totals = [sum(cell.forward + cell.backward for cell in cells) for cells in passes]
    uncertainty = (max(totals) - min(totals)) / 2 / statistics.median(totals)
    return Timing(tuple(_median(of_cell) for of_cell in zip(*passes, strict=True)), uncertainty)


def _passes(run: Callable[[], list[_Marks]], device: torch.device, repeats: int) -> Iterator[list[_Marks]]:
    """What is marked in each pass through all cells, after one that warms up.

    As in a step, a cell does not find its operands in the caches from having just run; and a moment in which the
    machine is slow meets most cells in one pass only, so that the median leaves it out.
    """
    run()
    begin = _now(device)
    for index in range(MOST_REPEATS * repeats):
        if index >= repeats and _now(device) - begin > STEADY_SECONDS:
            return
        marks = run()
        _now(device)  # until a GPU has come to the last mark
        yield marks


def time_loss(
    loss: TimedLoss, graph: CellGraph, values: Mapping[str, ValueSpec], device: torch.device, repeats: int = 3
) -> LossCost:
    """What a loss costs for one micro-batch.

    Args:
        loss: it.
        graph: the network's cells.
        values: the network's outputs among them.
        device: on which to time it.
        repeats: timed repetitions, after one that warms up.
    """
    shapes = {name: values[name].shape for name in graph.outputs}
    factor = 1.0
    if len(shapes) == 1 and len(shape := values[graph.outputs[0]].shape) == 5:
        planes = min(shape[2], max(1, LOSS_VOXELS // (shape[3] * shape[4])))
        shapes = {graph.outputs[0]: (1, shape[1], planes, *shape[3:])}
        factor = shape[0] * shape[2] / planes
    outputs = {
        name: laid_out(torch.randn(shape, dtype=values[name].dtype, device=device), values[name].channels_last)
        for name, shape in shapes.items()
    }

    def seconds() -> float:
        leaves = {name: output.detach().requires_grad_() for name, output in outputs.items()}
        begin = _now(device)
        with torch.enable_grad():
            torch.autograd.backward(loss(graph.collect(leaves)))
        return _now(device) - begin

    with LiveBytes() as live:
        seconds()
    extra = max(0, live.highest - sum(output.nbytes for output in outputs.values()))
    return LossCost(factor * statistics.median(seconds() for _ in range(repeats)), round(factor * extra))


Mark = float | torch.cuda.Event
"""A moment on a device's time line."""


@dataclass(frozen=True)
class _Marks:
    """Of one forward and backward of a cell: begin and end of each, and where weight gradients computed apart begin."""

    forward: tuple[Mark, Mark]
    backward: tuple[Mark, Mark]
    apart: Mark

    def seconds(self, split: bool) -> CellSeconds:
        """Between the marks, once the device has passed them."""
        end = self.backward[1]
        return CellSeconds(_between(*self.forward), _between(*self.backward), _between(self.apart, end) * split)


def _time_cell(
    stage: Stage, inputs: Values, precision: str, device: torch.device, split: bool
) -> tuple[_Marks, Values]:
    leaves = [value.detach().requires_grad_(value.requires_grad) for value in inputs.values()]
    later = DeferredWeights()
    with arithmetic(device, precision, later if split else None):
        begin = _mark(device)
        outputs = stage(*leaves)
        middle = _mark(device)
    roots = [output for output in outputs if output.requires_grad]
    gradients = [torch.ones_like(root) for root in roots]
    start = _mark(device)
    if roots:
        # Not `backward`, which copies the gradients of leaves where their layout is another one: within a stage,
        # values are no leaves.
        torch.autograd.grad(
            roots, [t for t in (*leaves, *stage.parameters()) if t.requires_grad], gradients, allow_unused=True
        )
    apart = _mark(device)
    later.compute()
    marks = _Marks((begin, middle), (start, _mark(device)), apart)
    values = {
        name: output.detach().requires_grad_(output.requires_grad)
        for name, output in zip(stage.outputs, outputs, strict=True)
    }
    return marks, values


def _median(seconds: Sequence[CellSeconds]) -> CellSeconds:
    columns = zip(*((cell.forward, cell.backward, cell.weight) for cell in seconds), strict=True)
    return CellSeconds(*(statistics.median(column) for column in columns))


def _mark(device: torch.device) -> Mark:
    """Now; on a GPU when it gets here, without making the host wait for it, which in a step is ahead of it as well."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _between(first: Mark, second: Mark) -> float:
    if isinstance(first, float) and isinstance(second, float):
        return second - first
    assert isinstance(first, torch.cuda.Event)
    assert isinstance(second, torch.cuda.Event)
    return float(first.elapsed_time(second)) / 1e3


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
