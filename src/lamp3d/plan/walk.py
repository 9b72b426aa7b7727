"""Cell after cell through a network, each with what those before it have made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from lamp3d.graph import CellGraph, Stage, laid_out
from lamp3d.graph.inputs import InputShape
from lamp3d.graph.shapes import module_dtype

Found = TypeVar("Found")
Values = dict[str, Tensor]


def inputs_of(
    graph: CellGraph,
    input_shape: InputShape,
    make: Callable[..., Tensor],
    device: torch.device,
    *,
    channels_last: bool,
) -> Values:
    """A network's inputs by value, in the type of its parameters.

    Args:
        graph: its cells.
        input_shape: of the only input, or of each by its name.
        make: such as ``torch.randn``.
        device: on which they are to lie.
        channels_last: how they are laid out.
    """
    dtype = module_dtype(graph.root)
    shapes = input_shape if isinstance(input_shape, Mapping) else {graph.input_names[0]: input_shape}
    made = {}
    for value, name in zip(graph.inputs, graph.input_names, strict=True):
        tensor = make(tuple(shapes[name]), device=device, dtype=dtype)
        made[value] = laid_out(tensor, True) if channels_last else tensor
    return made


def walk(
    graph: CellGraph, values: Values, run: Callable[[Stage, Values], tuple[Found, Values]]
) -> Iterator[tuple[Found, Values]]:
    """Run every cell once, and keep values no longer than a later cell needs them.

    Args:
        graph: the cells.
        values: the network's inputs.
        run: one cell as a stage of its own, with its inputs; says what was found, and what it made.

    Yields:
        what was found and what was made, cell by cell.
    """
    alive = dict(values)
    last_use = {edge.value: max(edge.users) for edge in graph.edges}
    for index, stage in enumerate(graph.cut(range(len(graph.cells)))):
        found, made = run(stage, {name: alive[name] for name in stage.inputs})
        yield found, made
        alive.update(made)
        for name in [name for name in alive if last_use.get(name, -1) <= index]:
            del alive[name]
