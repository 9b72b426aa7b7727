"""What every cell costs one micro-batch: seconds, measured or worked out, and bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lamp3d.graph import CellGraph, DeferredWeights, Stage, arithmetic, laid_out, module_device, preserved_buffers
from lamp3d.graph.footprint import LiveBytes
from lamp3d.graph.inputs import InputShape
from lamp3d.graph.shapes import ValueSpec
from lamp3d.plan.hardware import Hardware
from lamp3d.plan.walk import Values, inputs_of, walk
from lamp3d.plan.work import CellWork, Operation, Work, account

TimedLoss = Callable[[Any], Tensor]
"""From a network's output to a 0-dim tensor: with targets of its own, to be timed."""

STEADY_SECONDS, MOST_REPEATS = 1.5, 3
"""Passes of so many seconds are timed in any case, but at most so many times as many as were asked for."""

LOSS_VOXELS = 1 << 20
"""At most so many are timed; losses of larger volumes take in proportion."""


@dataclass(frozen=True)
class CellSeconds:
    """How long a cell takes; ``backward`` is all of it, ``weight`` the part of it that may be done apart."""

    forward: float
    backward: float
    weight: float = 0.0


@dataclass(frozen=True)
class Timing:
    """The seconds of all cells.

    Attributes:
        cells: in order.
        uncertainty: of their sum, relative: half of what lies between the fastest and the slowest pass.
    """

    cells: tuple[CellSeconds, ...]
    uncertainty: float = 0.0

    @property
    def seconds(self) -> float:
        """Forward and backward through all cells."""
        return sum(cell.forward + cell.backward for cell in self.cells)

    def share(self, part: float) -> Timing:
        """So large a part of it."""
        cells = (CellSeconds(part * cell.forward, part * cell.backward, part * cell.weight) for cell in self.cells)
        return replace(self, cells=tuple(cells))


@dataclass(frozen=True)
class LossCost:
    """What a loss costs for one micro-batch.

    Attributes:
        seconds: forward and backward.
        extra_bytes: alive at its fullest moment, beside the outputs and their gradient.
    """

    seconds: float
    extra_bytes: int

    def share(self, part: float) -> LossCost:
        """So large a part of it."""
        return LossCost(part * self.seconds, round(part * self.extra_bytes))


@dataclass(frozen=True)
class CellProfile:
    """The cost of one cell for one micro-batch.

    Attributes:
        name: the cell's name.
        forward_seconds, backward_seconds: with what a cut volume has to exchange.
        weight_seconds: the part of the backward that may be done apart (0 unless it was measured apart).
        internal_bytes: saved for backward, values of other cells and parameters not counted.
        saved_values: the values (edges of the graph) among what the cell saves for backward.
        parameter_bytes: the cell's parameters.
        deferred_bytes, deferred_values: what is held between the two parts of the backward, counted alike.
        workspace_bytes: the most that is alive within its forward or backward beside what is saved.
        exchanged_bytes: that a rank sends to those with which it shares a volume, forward and backward.
    """

    name: str
    forward_seconds: float
    backward_seconds: float
    internal_bytes: int
    saved_values: frozenset[str]
    parameter_bytes: int
    weight_seconds: float = 0.0
    deferred_bytes: int = 0
    deferred_values: frozenset[str] = frozenset()
    workspace_bytes: int = 0
    exchanged_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True)
class Profile:
    """What a micro-batch costs.

    Attributes:
        cells: each of them; with the loss in the last one's backward, if it is known.
        value_bytes: of every value that passes between cells.
        uncertainty: of the seconds, relative.
        loss_bytes: what the loss has alive at its fullest moment, beside the outputs and their gradient.
    """

    cells: tuple[CellProfile, ...]
    value_bytes: dict[str, int]
    uncertainty: float = 0.0
    loss_bytes: int = 0

    @property
    def seconds(self) -> float:
        """One micro-batch's forward and backward through all cells."""
        return sum(cell.seconds for cell in self.cells)

    def times(self, factor: int) -> Profile:
        """Of a micro-batch with so many times the cases."""
        if factor == 1:
            return self
        cells = [
            replace(
                cell,
                forward_seconds=cell.forward_seconds * factor,
                backward_seconds=cell.backward_seconds * factor,
                weight_seconds=cell.weight_seconds * factor,
                internal_bytes=cell.internal_bytes * factor,
                deferred_bytes=cell.deferred_bytes * factor,
                workspace_bytes=cell.workspace_bytes * factor,
                exchanged_bytes=cell.exchanged_bytes * factor,
            )
            for cell in self.cells
        ]
        value_bytes = {name: size * factor for name, size in self.value_bytes.items()}
        return replace(self, cells=tuple(cells), value_bytes=value_bytes, loss_bytes=self.loss_bytes * factor)

    def with_loss(self, cost: LossCost) -> Profile:
        """With a loss: its seconds are the last cell's, before whose backward it is computed."""
        *cells, last = self.cells
        last = replace(last, backward_seconds=last.backward_seconds + cost.seconds)
        return replace(self, cells=(*cells, last), loss_bytes=cost.extra_bytes)


def profile_of(work: Work, timing: Timing) -> Profile:
    """What is known of the cells' bytes and of their seconds, together."""
    cells = [
        CellProfile(
            name=cell.name,
            forward_seconds=seconds.forward,
            backward_seconds=seconds.backward,
            weight_seconds=seconds.weight,
            internal_bytes=cell.internal_bytes,
            saved_values=cell.saved_values,
            parameter_bytes=cell.parameter_bytes,
            deferred_bytes=cell.deferred_bytes,
            deferred_values=cell.deferred_values,
            workspace_bytes=cell.workspace_bytes,
        )
        for cell, seconds in zip(work.cells, timing.cells, strict=True)
    ]
    return Profile(tuple(cells), work.value_bytes, timing.uncertainty)


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


def model_cells(work: Work, hardware: Hardware, precision: str, times: float = 1.0) -> Timing:
    """The seconds of cells on a device that is only described: operation by operation, arithmetic or memory.

    The host issues operations ahead of the device, which waits for it where it is the faster one.

    Args:
        work: what the cells do.
        hardware: the device.
        precision: ``"fp32"`` or ``"bf16"``.
        times: as many cases at once as the cells are known for.
    """

    def total(operations: Sequence[Operation]) -> float:
        device = sum(hardware.seconds(times * op.flops, times * op.moved, precision, op.channels) for op in operations)
        return max(device, len(operations) * hardware.host_seconds)

    return Timing(tuple(CellSeconds(total(c.forward), total(c.backward), total(c.weight)) for c in work.cells))


def scale_timing(timings: Sequence[tuple[Timing, Work]], wanted: Work) -> Timing:
    """The seconds of smaller volumes' cells, brought to what the wanted volume's cells have to do.

    Convolutions count by their arithmetic, all other cells by the bytes that they read and write. From two volumes, the
    line through both; from one, in proportion.

    Args:
        timings: of one volume or two, the smaller one first, and what their cells do.
        wanted: what the wanted volume's cells do.
    """
    timing, work = timings[-1]
    cells = []
    for index, (seconds, large) in enumerate(zip(timing.cells, wanted.cells, strict=True)):
        by_flops = any(operation.flops for operation in large.forward)
        amount, wanted_amount = (_amount(cell, by_flops) for cell in (work.cells[index], large))
        factor = wanted_amount / amount if amount else 1.0
        if len(timings) > 1:
            before, less = timings[0][0].cells[index], _amount(timings[0][1].cells[index], by_flops)
            if amount > less and (now := seconds.forward + seconds.backward) > 0:
                slope = max(0.0, now - before.forward - before.backward) / (amount - less)
                factor = min(factor, (now + slope * (wanted_amount - amount)) / now)
        cells.append(CellSeconds(seconds.forward * factor, seconds.backward * factor, seconds.weight * factor))
    return Timing(tuple(cells), timing.uncertainty)


def _amount(cell: CellWork, by_flops: bool) -> int:
    return sum(op.flops if by_flops else op.moved for op in (*cell.forward, *cell.backward))


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
