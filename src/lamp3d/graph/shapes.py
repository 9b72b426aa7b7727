"""Shapes, data types and memory layout of every value, from a dry run on fake tensors (no data, no memory)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lamp3d.graph.buffers import preserved_buffers
from lamp3d.graph.cells import CellGraph


@dataclass(frozen=True)
class ValueSpec:
    """What a rank must know to receive a value: shape, dtype, layout, and whether a gradient goes back."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    requires_grad: bool

    @property
    def nbytes(self) -> int:
        """Size of the value in bytes."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * self.dtype.itemsize


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a precision: bf16 where ``precision == "bf16"``, otherwise none."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def module_device(network: nn.Module) -> torch.device:
    """The device of the network's first parameter (CPU for a network without parameters)."""
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


@contextmanager
def fake_inputs(
    network: nn.Module, input_shape: Sequence[int], dtype: torch.dtype | None = None, channels_last: bool = False
) -> Iterator[tuple[Tensor]]:
    """A fake input of ``input_shape`` on the network's device, within the mode in which it can be computed with."""
    parameter = next(iter(network.parameters()), None)
    if dtype is None:
        dtype = torch.float32 if parameter is None else parameter.dtype
    with preserved_buffers(network), FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(tuple(input_shape), dtype=dtype, device=module_device(network))
        if channels_last:
            fake = fake.to(memory_format=torch.channels_last_3d)
        yield (fake,)


def infer_specs(
    graph: CellGraph, input_shape: Sequence[int], dtype: torch.dtype, precision: str, channels_last: bool
) -> dict[str, ValueSpec]:
    """The :class:`ValueSpec` of every tensor in the graph for an input of this shape and dtype.

    The layout is a prediction that both ends of a transfer share; a sender brings its tensor into that layout.
    """
    specs: dict[str, ValueSpec] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            if isinstance(result, Tensor):
                specs[node.name] = ValueSpec(
                    tuple(result.shape), result.dtype, _is_channels_last(result), result.requires_grad
                )
            return result

    mode = autocast(module_device(graph.root), precision)
    with fake_inputs(graph.root, input_shape, dtype, channels_last) as inputs, torch.enable_grad(), mode:
        Recorder(graph.root).run(*inputs)
    return specs


def weights_channels_last(network: nn.Module) -> None:
    """Lay the convolution weights out channels-last, in place: the ``nn.Parameter`` objects stay the same."""
    for parameter in network.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)


def _is_channels_last(tensor: Tensor) -> bool:
    return (
        tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d) and not tensor.is_contiguous()
    )
