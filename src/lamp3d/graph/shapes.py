"""Shapes, data types and memory layout of every value, from a dry run on fake tensors (no data, no memory)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from lamp3d.graph.arithmetic import arithmetic
from lamp3d.graph.cells import CellGraph
from lamp3d.graph.inputs import Shape

InputSpec = tuple[Shape, torch.dtype]
"""Shape and dtype of an input."""


@dataclass(frozen=True)
class ValueSpec:
    """What a rank must know to receive a value: shape, dtype, layout, and whether a gradient goes back."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    requires_grad: bool
    placement: Any = None
    """Of which part of a volume it is, where ranks share one."""

    @property
    def nbytes(self) -> int:
        """Size of the value in bytes."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * self.dtype.itemsize


def module_device(network: nn.Module) -> torch.device:
    """The device of the network's first parameter; the CPU where there is none, or none with content."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def module_dtype(network: nn.Module) -> torch.dtype:
    """The data type of the network's first parameter, and so of its inputs; float32 where there is none."""
    return next((parameter.dtype for parameter in network.parameters()), torch.float32)


class _Runner(nn.Module):
    """An interpreter as a module, so that its graph's parameters can be stood in for."""

    def __init__(self, interpreter: fx.Interpreter):
        super().__init__()
        self.root = interpreter.module
        self.interpreter = interpreter

    def forward(self, *inputs: Tensor) -> Any:
        return self.interpreter.run(*inputs)


@contextmanager
def quiet() -> Iterator[None]:
    """Torch's log keeps silent of what fails on fake tensors: it is raised, and told by whoever asked."""
    log = logging.getLogger(fake_tensor.__name__)
    silent, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = silent


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within it, tensors are made without data."""
    with quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        yield


def dry_run(
    interpreter: fx.Interpreter,
    inputs: Sequence[InputSpec],
    *,
    device: torch.device | None = None,
    channels_last: bool = False,
    wrap: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Run a graph on fake tensors: parameters and buffers are stood in for, so neither their content nor their place
    matters, and nothing is changed.

    Args:
        interpreter: of the graph, noting what it wants to know.
        inputs: shape and dtype of each of the network's inputs.
        device: on which everything is supposed to lie; by default that of the parameters.
        channels_last: layout of the inputs that are volumes.
        wrap: what to make of each input before the network sees it.
    """
    root = interpreter.module
    assert isinstance(root, nn.Module)
    interpreter.extra_traceback = False  # an error's message is for users
    device = device or module_device(root)
    with fake_tensors():
        stand_ins: dict[str, Tensor] = {}
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            stand_ins[f"root.{name}"] = fake.requires_grad_(tensor.requires_grad)
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in inputs]
        if channels_last:
            tensors = [laid_out(tensor, True) for tensor in tensors]
        if wrap is not None:
            tensors = [wrap(tensor) for tensor in tensors]
        functional_call(_Runner(interpreter), stand_ins, tuple(tensors))


def infer_specs(
    graph: CellGraph,
    inputs: Sequence[InputSpec],
    precision: str,
    channels_last: bool,
    device: torch.device,
    wrap: Callable[[Tensor], Tensor] | None = None,
    describe: Callable[[Tensor], ValueSpec] | None = None,
) -> dict[str, ValueSpec]:
    """The :class:`ValueSpec` of every tensor in the graph for inputs of these shapes and dtypes on such a device.

    The layout is a prediction that both ends of a transfer share; a sender brings its tensor into that layout.

    Args:
        graph: of the network.
        inputs: its inputs.
        precision: ``"fp32"`` or ``"bf16"``.
        channels_last: layout of the inputs that are volumes.
        device: where it will run.
        wrap: what to make of each input before the network sees it.
        describe: what is to be said of a value, where it is not an ordinary tensor.
    """
    specs: dict[str, ValueSpec] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            if isinstance(result, Tensor):
                specs[node.name] = (describe or spec_of)(result)
            return result

    with torch.enable_grad(), arithmetic(device, precision):
        dry_run(Recorder(graph.root), inputs, device=device, channels_last=channels_last, wrap=wrap)
    return specs


class SpecsOnDemand(Mapping[str, ValueSpec]):
    """What `infer_specs` finds, once a value is asked for: its dry run takes as long as a small network's forward.

    Args:
        infer: finds it.
    """

    def __init__(self, infer: Callable[[], dict[str, ValueSpec]]):
        self.work_out = functools.cache(infer)

    def __getitem__(self, name: str) -> ValueSpec:
        return self.work_out()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.work_out())

    def __len__(self) -> int:
        return len(self.work_out())


def spec_of(tensor: Tensor) -> ValueSpec:
    """What an ordinary tensor looks like."""
    return ValueSpec(tuple(tensor.shape), tensor.dtype, _is_channels_last(tensor), tensor.requires_grad)


def lay_out_weights(network: nn.Module, channels_last: bool) -> None:
    """Bring the convolution weights into one layout, in place: the ``nn.Parameter`` objects stay the same."""
    for parameter in network.parameters():
        if parameter.dim() == 5:
            parameter.data = laid_out(parameter.data, channels_last)


def laid_out(volume: Tensor, channels_last: bool) -> Tensor:
    """A (B, C, D, H, W) tensor in a layout that its strides tell beyond doubt.

    With a single channel memory is in both layouts at once, and torch leaves the strides as they were; but they decide
    in which layout a convolution's result is, and by which of its roundings.
    """
    layout = torch.channels_last_3d if channels_last and volume.dim() == 5 else torch.contiguous_format
    strides = torch.empty(volume.shape, device="meta", memory_format=layout).stride()
    return volume.contiguous(memory_format=layout).as_strided(volume.shape, strides)


def _is_channels_last(tensor: Tensor) -> bool:
    return (
        tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d) and not tensor.is_contiguous()
    )
