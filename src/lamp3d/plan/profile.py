"""What every cell costs on the device it will run on: seconds and bytes, measured with one micro-batch.

A value may be saved for backward by its maker, by its user, or by both; a stage holds it once. The profile therefore
names the saved values of a cell and counts only the rest (``internal_bytes``) by cell.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lamp3d.graph import (
    CellGraph,
    DeferredWeights,
    Stage,
    arithmetic,
    laid_out,
    module_device,
    preserved_buffers,
)
from lamp3d.graph.inputs import InputShape


@dataclass(frozen=True)
class CellProfile:
    """The cost of one cell for one micro-batch.

    Attributes:
        name: the cell's name.
        forward_seconds, backward_seconds: medians over the repetitions.
        weight_seconds: the part of the backward that may be done apart (0 unless it was measured apart).
        internal_bytes: saved for backward, values of other cells and parameters not counted.
        saved_values: the values (edges of the graph) among what the cell saves for backward.
        parameter_bytes: the cell's parameters.
        deferred_bytes, deferred_values: what is held between the two parts of the backward, counted alike.
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


@dataclass(frozen=True)
class Profile:
    """The cells' costs, and the bytes of every value that passes between cells."""

    cells: tuple[CellProfile, ...]
    value_bytes: dict[str, int]

    @property
    def seconds(self) -> float:
        """One micro-batch's forward and backward through all cells."""
        return sum(cell.forward_seconds + cell.backward_seconds for cell in self.cells)

    def scaled(self, share: float) -> Profile:
        """Of an input with that share of the voxels."""
        if share == 1:
            return self
        cells = [
            replace(
                cell,
                forward_seconds=cell.forward_seconds * share,
                backward_seconds=cell.backward_seconds * share,
                weight_seconds=cell.weight_seconds * share,
                internal_bytes=round(cell.internal_bytes * share),
                deferred_bytes=round(cell.deferred_bytes * share),
            )
            for cell in self.cells
        ]
        return Profile(tuple(cells), {name: round(size * share) for name, size in self.value_bytes.items()})


def profile_cells(
    graph: CellGraph,
    input_shape: InputShape,
    *,
    precision: str,
    channels_last: bool,
    repeats: int = 3,
    split: bool = False,
) -> Profile:
    """Time forward and backward of every cell and record what it saves.

    Args:
        graph: the network's cells; they run on the device where its parameters are.
        input_shape: (b, C, D, H, W) of one micro-batch; of several inputs, by name.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).
        channels_last: whether the inputs are laid out channels-last.
        repeats: timed repetitions, after one that warms up.
        split: whether the backward is done in two parts, weight gradients apart.
    """
    device = module_device(graph.root)
    parameter = next(iter(graph.root.parameters()), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    shapes = input_shape if isinstance(input_shape, Mapping) else {graph.input_names[0]: input_shape}
    values: dict[str, Tensor] = {}
    for value, name in zip(graph.inputs, graph.input_names, strict=True):
        tensor = torch.randn(tuple(shapes[name]), device=device, dtype=dtype)
        values[value] = laid_out(tensor, True) if channels_last else tensor
    last_use = {edge.value: max(edge.users) for edge in graph.edges}
    value_bytes = {name: value.nbytes for name, value in values.items()}
    cells = []
    gradients = [(p, p.grad) for p in graph.root.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None  # or backward would add to it
    try:
        with preserved_buffers(graph.root):
            for index, stage in enumerate(graph.cut(range(len(graph.cells)))):
                inputs = {name: values[name] for name in stage.inputs}
                cell, outputs = _profile_cell(stage, inputs, precision, device, repeats, split)
                cells.append(cell)
                values.update(outputs)
                value_bytes.update({name: value.nbytes for name, value in outputs.items()})
                for name in [name for name in values if last_use.get(name, -1) <= index]:
                    del values[name]
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    return Profile(tuple(cells), value_bytes)


def _profile_cell(
    stage: Stage, inputs: dict[str, Tensor], precision: str, device: torch.device, repeats: int, split: bool
) -> tuple[CellProfile, dict[str, Tensor]]:
    parameters = stage.parameters_by_name()
    seconds: list[tuple[float, float, float]] = []
    for _ in range(repeats + 1):
        leaves = [value.detach().requires_grad_(value.requires_grad) for value in inputs.values()]
        saved: dict[int, Tensor] = {}
        later = DeferredWeights()

        def pack(tensor: Tensor, saved: dict[int, Tensor] = saved) -> Tensor:
            saved[_address(tensor)] = tensor
            return tensor

        begin = _now(device)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            arithmetic(device, precision, later if split else None),
        ):
            outputs = stage(*leaves)
        middle = _now(device)
        roots = [output for output in outputs if output.requires_grad]
        gradients = [torch.ones_like(root) for root in roots]
        start = _now(device)
        if roots:
            torch.autograd.backward(roots, gradients)
        apart = _now(device)
        deferred = {_address(tensor): tensor for tensor in later.tensors()}
        later.compute()
        end = _now(device)
        seconds.append((middle - begin, end - start, end - apart if split else 0.0))
    names = {_address(leaf): name for name, leaf in zip(inputs, leaves, strict=True)}
    names |= {_address(output): name for name, output in zip(stage.outputs, outputs, strict=True)}
    own = {_address(parameter) for parameter in (*parameters.values(), *stage.buffers_by_name().values())}

    def internal(tensors: dict[int, Tensor]) -> int:
        return sum(t.untyped_storage().nbytes() for a, t in tensors.items() if a not in names and a not in own)

    forward, backward, weight = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
    profile = CellProfile(
        name=" + ".join(cell.name for cell in stage.cells),
        forward_seconds=forward,
        backward_seconds=backward,
        internal_bytes=internal(saved),
        saved_values=frozenset(names[address] for address in saved if address in names),
        parameter_bytes=sum(parameter.nbytes for parameter in parameters.values()),
        weight_seconds=weight,
        deferred_bytes=internal(deferred),
        deferred_values=frozenset(names[address] for address in deferred if address in names),
    )
    values = {
        name: output.detach().requires_grad_(output.requires_grad)
        for name, output in zip(stage.outputs, outputs, strict=True)
    }
    return profile, values


def _address(tensor: Tensor | nn.Parameter) -> int:
    return tensor.untyped_storage().data_ptr()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
