"""What every cell does and holds, found on fake tensors: without data, without memory, for any device and volume.

A value may be saved for backward by its maker, by its user, or by both; a stage holds it once. The saved values of a
cell are therefore named, and only the rest (``internal_bytes``) is counted by cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from lamp3d.graph import CellGraph, DeferredWeights, Stage, arithmetic, laid_out
from lamp3d.graph.footprint import LiveBytes
from lamp3d.graph.inputs import InputShape
from lamp3d.graph.shapes import ValueSpec, fake_tensors, spec_of
from lamp3d.plan.walk import Values, inputs_of, walk

Sides = tuple[int, int, int]
"""Of a volume: depth, height, width."""

_ATEN = torch.ops.aten
_STATISTICS = {_ATEN.native_group_norm, _ATEN.native_batch_norm, _ATEN._native_batch_norm_legit, _ATEN.var_mean}
_FREE = {
    _ATEN.empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty, _ATEN.new_empty_strided, _ATEN.detach,
    torch.ops.prim.device,
}  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One operation on the device.

    Attributes:
        flops: floating-point operations of convolutions and matrix products; 0 of all others.
        moved: bytes that it reads and writes.
        channels: of a convolution, how wide its matrix product is at its narrowest; 0 of all others.
    """

    flops: int
    moved: int
    channels: int = 0


@dataclass(frozen=True)
class Halo:
    """What a convolution reads of a neighbour if the volume is cut: bytes of one border's planes along D, H and W."""

    bytes: Sides
    gradient: bool
    """Whether the planes' gradients travel back."""


@dataclass(frozen=True)
class CellWork:
    """One cell and one micro-batch.

    Attributes:
        name: the cell's name.
        forward, backward: the operations; ``backward`` is all of it.
        weight: the part of the backward that may be done apart (empty unless it was asked for).
        internal_bytes: saved for backward, values of other cells and parameters not counted.
        saved_values: the values (edges of the graph) among what the cell saves for backward.
        parameter_bytes: the cell's parameters.
        deferred_bytes, deferred_values: what is held between the two parts of the backward, counted alike.
        workspace_bytes: the most that is alive within its forward or backward beside what is saved, gradients included.
        extents: of the largest volume that it reads or makes; None where it has to do with none.
        halos: of its convolutions.
        sums: how many numbers each of its norms adds up over the whole volume.
    """

    name: str
    forward: tuple[Operation, ...]
    backward: tuple[Operation, ...]
    weight: tuple[Operation, ...]
    internal_bytes: int
    saved_values: frozenset[str]
    parameter_bytes: int
    deferred_bytes: int
    deferred_values: frozenset[str]
    workspace_bytes: int
    extents: Sides | None
    halos: tuple[Halo, ...]
    sums: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """All cells, and every value that passes between them or leaves the network."""

    cells: tuple[CellWork, ...]
    values: dict[str, ValueSpec]

    @property
    def value_bytes(self) -> dict[str, int]:
        """How large the values are."""
        return {name: spec.nbytes for name, spec in self.values.items()}


def account(
    graph: CellGraph,
    input_shape: InputShape,
    *,
    precision: str,
    channels_last: bool,
    split: bool = False,
    device: torch.device | None = None,
    own_kernels: bool = True,
) -> Work:
    """Run every cell forward and backward on fake tensors and note what it does.

    Args:
        graph: the network's cells; their parameters may be on the meta device.
        input_shape: (b, C, D, H, W) of one micro-batch; of several inputs, by name.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).
        channels_last: whether the inputs are laid out channels-last.
        split: whether the backward is done in two parts, weight gradients apart.
        device: on which everything is supposed to lie; by default the CPU.
        own_kernels: as for :func:`lamp3d.graph.arithmetic`; not for devices that are no CPU.
    """
    where = device or torch.device("cpu")

    def run(stage: Stage, inputs: Values) -> tuple[CellWork, Values]:
        return _account_cell(stage, inputs, precision, channels_last, where, split, own_kernels)

    with fake_tensors():
        values = inputs_of(graph, input_shape, torch.empty, where, channels_last=channels_last)
        specs = {name: spec_of(value) for name, value in values.items()}
        cells = []
        for cell, made in walk(graph, values, run):
            cells.append(cell)
            specs |= {name: spec_of(value) for name, value in made.items()}
    return Work(tuple(cells), specs)


def stand_ins(stage: Stage, device: torch.device, channels_last: bool) -> dict[str, Tensor]:
    """Fake tensors for a stage's parameters and buffers, for ``functional_call`` under a fake tensor mode."""
    made: dict[str, Tensor] = {}
    for name, tensor in (*stage.named_parameters(), *stage.named_buffers()):
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        if fake.dim() == 5:
            fake = laid_out(fake, channels_last)
        is_parameter = isinstance(tensor, nn.Parameter)  # and so is what stands in for it: split backwards ask
        made[name] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    return made


def _account_cell(
    stage: Stage,
    inputs: Values,
    precision: str,
    channels_last: bool,
    device: torch.device,
    split: bool,
    own_kernels: bool,
) -> tuple[CellWork, Values]:
    own_tensors = stand_ins(stage, device, channels_last)
    leaves = [value.detach().requires_grad_(value.requires_grad) for value in inputs.values()]
    saved: dict[int, Tensor] = {}
    later = DeferredWeights()

    def pack(tensor: Tensor) -> Tensor:
        saved[address(tensor)] = tensor
        return tensor

    forward, backward, weight = _Recorder(), _Recorder(), _Recorder()
    making, going_back = LiveBytes(), LiveBytes()
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        arithmetic(device, precision, later if split else None, own_kernels=own_kernels),
        making,
        forward,
    ):
        outputs = functional_call(stage, own_tensors, tuple(leaves))
    roots = [output for output in outputs if output.requires_grad]
    gradients = [torch.empty_like(root) for root in roots]
    if roots:
        with going_back, backward:
            torch.autograd.backward(roots, gradients)
    deferred = {address(tensor): tensor for tensor in later.tensors()}
    with going_back, weight:
        later.compute()
    names = {address(leaf): name for name, leaf in zip(inputs, leaves, strict=True)}
    names |= {address(output): name for name, output in zip(stage.outputs, outputs, strict=True)}
    own = {address(tensor) for tensor in own_tensors.values()}

    def internal(tensors: dict[int, Tensor]) -> int:
        return sum(t.untyped_storage().nbytes() for a, t in tensors.items() if a not in names and a not in own)

    volumes = [tensor for tensor in (*leaves, *outputs) if tensor.dim() == 5]
    largest = max(volumes, key=lambda volume: math.prod(volume.shape[2:]), default=None)
    work = CellWork(
        name=" + ".join(cell.name for cell in stage.cells),
        forward=tuple(forward.operations),
        backward=(*backward.operations, *weight.operations),
        weight=tuple(weight.operations),
        internal_bytes=internal(saved),
        saved_values=frozenset(names[a] for a in saved if a in names),
        parameter_bytes=sum(parameter.nbytes for parameter in stage.parameters_by_name().values()),
        deferred_bytes=internal(deferred),
        deferred_values=frozenset(names[a] for a in deferred if a in names),
        workspace_bytes=max(
            making.highest - making.now, going_back.highest + sum(gradient.nbytes for gradient in gradients)
        ),
        extents=None if largest is None else (largest.shape[2], largest.shape[3], largest.shape[4]),
        halos=tuple(forward.halos),
        sums=tuple(forward.sums),
    )
    values = {
        name: output.detach().requires_grad_(output.requires_grad)
        for name, output in zip(stage.outputs, outputs, strict=True)
    }
    return work, values


class _Recorder(TorchDispatchMode):
    """Notes every operation that reaches the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.halos: list[Halo] = []
        self.sums: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        packet: Callable[..., Any] = func._overloadpacket
        if func.is_view or packet in _FREE:
            return made
        tensors = {address(leaf): leaf for leaf in pytree.tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor)}
        flops = _flops(packet, args, kwargs, made)
        moved = sum(tensor.nbytes for tensor in tensors.values())
        self.operations.append(Operation(flops, moved, _channels(packet, args, made)))
        if packet is _ATEN.convolution and args[0].dim() == 5 and not args[6]:
            self._note_halo(*args)
        elif packet in _STATISTICS:
            self.sums.append(3 * args[0].shape[0] * args[0].shape[1])
        return made

    def _note_halo(
        self, image: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, *_: Any
    ) -> None:
        reach = [
            max(0, (width - 1) * gap + 1 - step)
            for width, gap, step in zip(weight.shape[2:], dilation, stride, strict=True)
        ]
        if any(reach):
            depth, height, width = (
                image.nbytes // extent * -(-planes // 2) for extent, planes in zip(image.shape[2:], reach, strict=True)
            )
            self.halos.append(Halo((depth, height, width), image.requires_grad))


def _flops(packet: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> int:
    if packet is _ATEN.convolution_backward:  # torch counts a weight's gradient as if there were one group
        gradient, image, weight, *_ = args
        once = conv_flop_count(list(image.shape), list(weight.shape), list(gradient.shape), args[7])
        of_image, of_weight, _ = args[10]
        return int(of_image + of_weight) * once
    return int(flop_registry[packet](*args, **kwargs, out_val=made)) if packet in flop_registry else 0


def _channels(packet: Callable[..., Any], args: tuple[Any, ...], made: Any) -> int:
    """How wide a convolution's matrix product is at its narrowest."""
    if packet is _ATEN.convolution:
        return int(made.shape[1])  # the channels that it reads count once for every voxel of the kernel
    if packet is _ATEN.convolution_backward:
        gradient, image, *_, (of_image, *_) = args
        return int(min(gradient.shape[1], image.shape[1]) if of_image else gradient.shape[1])
    return 0


def address(tensor: Tensor) -> int:
    """What tells one memory from another, of fake tensors too."""
    return int(tensor.untyped_storage()._cdata)
