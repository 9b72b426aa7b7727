"""A network's inputs: one tensor, or several by the names of its ``forward``'s parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from lamp3d.errors import ConfigError

T = TypeVar("T")
Shape = tuple[int, ...]
InputShape = Sequence[int] | Mapping[str, Sequence[int]]
"""(B, C, D, H, W) of the one tensor that a network takes; or, by the name of ``forward``'s parameter, the shape of
each: the batch comes first in all of them. Parameters without a shape keep their defaults."""


def title_of(network: nn.Module) -> str:
    """What to call a network: its own ``title``, which networks around another's have, or that of its class."""
    return str(getattr(network, "title", type(network).__name__))


def divisor_of(network: nn.Module) -> int:
    """What the sides of a network's volumes must be multiples of: what it says itself, or enough for five halvings."""
    return int(getattr(network, "divisor", 32))


def shapes_by_name(shape: InputShape, network: nn.Module) -> dict[str, Shape]:
    """The shape of each input; a single one belongs to ``forward``'s first parameter."""
    if isinstance(shape, Mapping):
        return {name: tuple(extents) for name, extents in shape.items()}
    return {_first_parameter(network): tuple(shape)}


def arguments(network: nn.Module, inputs: Mapping[str, T]) -> tuple[tuple[T, ...], dict[str, T]]:
    """Inputs by name as what ``forward`` is called with."""
    named = dict(inputs)
    first = _first_parameter(network)
    # By its place: it may be a parameter that has no name for callers, such as ``*volumes``.
    return ((named.pop(first),), named) if first in named else ((), named)


def _first_parameter(network: nn.Module) -> str:
    return next(iter(inspect.signature(network.forward).parameters), "input")


def batch_of(shape: InputShape) -> int:
    """The mini-batch's size.

    Raises:
        ConfigError: the inputs differ in it, or have no axes.
    """
    if not all(shape.values() if isinstance(shape, Mapping) else [shape]):
        raise ConfigError(f"an input has at least the batch as its axis; {shape!r} is no shape of one.")
    sizes = {extents[0] for extents in shape.values()} if isinstance(shape, Mapping) else {shape[0]}
    if len(sizes) != 1:
        raise ConfigError(f"the first axis of every input is the batch, but these have batches of {sorted(sizes)}.")
    return sizes.pop()


def volume_of(shape: InputShape) -> Shape:
    """The shape of the volume among the inputs: of the first with five axes, or where there is none, of the first."""
    if not isinstance(shape, Mapping):
        return tuple(shape)
    shapes = [tuple(extents) for extents in shape.values()]
    return next((extents for extents in shapes if len(extents) == 5), shapes[0])


def with_batch(shape: InputShape, batch: int) -> Shape | dict[str, Shape]:
    """The same inputs for a batch of another size."""
    if isinstance(shape, Mapping):
        return {name: (batch, *extents[1:]) for name, extents in shape.items()}
    return (batch, *shape[1:])


def input_text(shape: InputShape) -> str:
    """The shape for people: ``2×1×64×64×64``, or ``image 2×1×64×64×64, time 2``."""
    if isinstance(shape, Mapping):
        return ", ".join(f"{name} {input_text(extents)}" for name, extents in shape.items())
    return "×".join(map(str, shape))
