"""Whether a network computes of one case of a mini-batch what depends on the others.

Then parts of a mini-batch do not give the whole's numbers. It is found out on fake tensors, from torch's own operators,
whose arguments have names: each value that depends on the inputs is followed with the axis along which its cases lie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

_MOVES = {"cat", "stack", "unsqueeze", "squeeze", "permute", "transpose", "t"}
"""What leaves every case as it is, although a `dim` is among its arguments."""
_PARTS = ("slice", "split")  # and split_with_sizes


class OverCases(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, notes whether an operation goes over the cases of what depends on the inputs.

    Where it is lost along which axis they lie, nothing is noted.

    Attributes:
        found: whether one did.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False
        self._axes: Any = WeakTensorKeyDictionary()
        self._cases = 1

    def add_input(self, tensor: Tensor) -> None:
        """One of the network's inputs: its cases lie along the first axis."""
        if tensor.dim():
            self._cases = tensor.shape[0]
            self._axes[tensor] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        axes: list[int | None] = [self._axes.get(tensor) for tensor in tensors]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        made = func(*args, **kwargs)
        known = [(index, axis) for index, axis in enumerate(axes) if axis is not None]
        if not known:
            return made
        index, axis = known[0]
        shape = shapes[index]
        name, given = func._schema.name.removeprefix("aten::").removesuffix("_"), _named(func._schema, args, kwargs)
        found = [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]
        if name in ("mm", "bmm"):
            self.found |= _multiplies_cases(axes, batched=name == "bmm")
        elif name.startswith(_PARTS):  # of two mini-batches behind each other, one
            self.found |= any(tensor.shape[axis] % self._cases != 0 for tensor in found)
        elif index == 0 and axis in _dims(name, given, shape, [tuple(tensor.shape) for tensor in found]):
            self.found = True
            return made
        for tensor in found:
            if (after := self._axis_after(name, given, axis, shape, tuple(tensor.shape))) is not None:
                self._axes[tensor] = after
        return made

    def _axis_after(
        self, name: str, given: Mapping[str, Any], axis: int, shape: tuple[int, ...], made: tuple[int, ...]
    ) -> int | None:
        """Along which axis of what an operator has made the cases lie; None if that is lost."""
        if name == "permute":
            return [dim % len(shape) for dim in given["dims"]].index(axis)
        if name in ("transpose", "t"):
            first, second = (int(given.get(dim, end)) % len(shape) for dim, end in (("dim0", 0), ("dim1", -1)))
            return {first: second, second: first}.get(axis, axis)
        if name in ("view", "_unsafe_view", "reshape"):
            before = math.prod(shape[:axis])
            fits = (i for i, n in enumerate(made) if math.prod(made[:i]) == before and n % self._cases == 0)
            return next(fits, None)
        if name in ("unsqueeze", "stack"):
            return axis + (int(given["dim"]) % len(made) <= axis)
        if len(made) > len(shape) and name != "embedding":
            return axis + len(made) - len(shape)  # it has been broadcast
        if len(made) < len(shape):  # axes are gone, or were selected
            gone = {axis} if name == "squeeze" and shape[axis] == 1 else _given_dims(given, shape)
            axis -= sum(dim < axis for dim in gone) if axis not in gone else len(shape)
        return axis if 0 <= axis < len(made) else None


def _multiplies_cases(axes: Sequence[int | None], *, batched: bool) -> bool:
    """Whether a product of matrices is a sum over cases, or one of every case with every other."""
    rows = 1 if batched else 0
    one, other = axes
    if one is None or other is None:
        return one == rows + 1 or other == rows
    return not batched or (one, other) != (0, 0)


def _named(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """An operator's arguments by their names."""
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    return defaults | dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | dict(kwargs)


def _dims(name: str, given: Mapping[str, Any], shape: tuple[int, ...], made: list[tuple[int, ...]]) -> set[int]:
    """Along which axes of its first tensor an operator goes."""
    if name in _MOVES:
        return set()
    if name == "index":
        return {axis for axis, index in enumerate(given["indices"]) if index is not None}
    if not {"dim", "dims"} & given.keys():  # a maximum of everything
        return set(range(len(shape))) if made and made[0] == () else set()
    return _given_dims(given, shape)


def _given_dims(given: Mapping[str, Any], shape: tuple[int, ...]) -> set[int]:
    """The axes that an operator is given; all of them, where it is given none."""
    dims = given.get("dim", given.get("dims"))
    return {dim % len(shape) for dim in ([dims] if isinstance(dims, int) else dims or range(len(shape)))}
