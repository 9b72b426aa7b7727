"""The backward of a convolution in two parts: the input's gradient at once, the weight's later.

The rest of the network waits for a gradient with respect to activations only. A schedule that splits the backward
(zero bubble) lets a stage compute and send that first, and its weight gradients when it would idle. Convolutions hold
nearly all of a network's arithmetic, so only they are split; every other operation is left to autograd as it is.

Nothing in the network is changed for this: while a stage's forward runs, a ``TorchFunctionMode`` takes the calls of
convolutions whose weights are parameters and runs them through an autograd function of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lamp3d.graph.precision import convolution_dtypes


class DeferredWeights:
    """The weight gradients that one micro-batch's backward has left to be computed."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor, _Convolution]] = []

    def add(self, gradient: Tensor, image: Tensor, convolution: _Convolution) -> None:
        """Remember what the weight gradient of one convolution is made of."""
        self._waiting.append((gradient, image, convolution))

    def tensors(self) -> list[Tensor]:
        """What is held for it."""
        return [tensor for gradient, image, _ in self._waiting for tensor in (gradient, image)]

    def compute(self) -> None:
        """Add the weight gradients to the parameters' ``grad``, letting go of what they were made of one by one."""
        while self._waiting:
            gradient, image, convolution = self._waiting.pop()
            convolution.accumulate(gradient, image)


class _Convolution:
    """One call of a convolution: its parameters and settings."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, transposed: bool, settings: Sequence[Any], dtype: torch.dtype
    ):
        self.weight, self.bias, self.transposed, self.settings, self.dtype = weight, bias, transposed, settings, dtype

    def forward(self, image: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.dtype)
        stride, padding, dilation, output_padding, groups = self.settings
        result: Tensor = torch.ops.aten.convolution(
            image, self.weight.to(self.dtype), bias, stride, padding, dilation, self.transposed, output_padding, groups
        )
        return result

    def of_input(self, gradient: Tensor, image: Tensor) -> Tensor:
        found: Tensor = self._backward(gradient, image, (True, False, False))[0]
        return found

    @torch.no_grad()
    def accumulate(self, gradient: Tensor, image: Tensor) -> None:
        biased = self.bias is not None and self.bias.requires_grad
        _, of_weight, of_bias = self._backward(gradient, image, (False, self.weight.requires_grad, biased))
        for parameter, found in ((self.weight, of_weight), (self.bias, of_bias)):
            if parameter is None or found is None or not parameter.requires_grad:
                continue
            if parameter.grad is None:  # laid out as autograd would
                parameter.grad = torch.empty_like(parameter).copy_(found)
            else:
                parameter.grad += found

    def _backward(self, gradient: Tensor, image: Tensor, wanted: tuple[bool, bool, bool]) -> Sequence[Any]:
        bias_sizes = None if self.bias is None else list(self.bias.shape)
        stride, padding, dilation, output_padding, groups = self.settings
        found: Sequence[Any] = torch.ops.aten.convolution_backward(
            gradient, image, self.weight.to(self.dtype), bias_sizes, stride, padding, dilation, self.transposed,
            output_padding, groups, wanted,
        )  # fmt: skip
        return found


class _Split(torch.autograd.Function):
    """A convolution whose backward leaves the weight's gradient to :class:`DeferredWeights`."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, weight: Tensor, convolution: _Convolution, deferred: DeferredWeights
    ) -> Tensor:
        # `weight` is an input so that the output has a gradient even where the image has none.
        ctx.save_for_backward(image)
        ctx.convolution, ctx.deferred = convolution, deferred
        return convolution.forward(image)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (image,) = ctx.saved_tensors
        ctx.deferred.add(gradients[0], image, ctx.convolution)
        of_image = ctx.convolution.of_input(gradients[0], image) if ctx.needs_input_grad[0] else None
        return of_image, None, None, None


class SplitConvolutions(TorchFunctionMode):
    """While active, convolutions defer their weight gradients.

    Args:
        deferred: where to.
    """

    def __init__(self, deferred: DeferredWeights):
        super().__init__()
        self._deferred = deferred

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (bind := _CONVOLUTIONS.get(func)) is not None:
            image, weight, bias, settings = bind(*args, **kwargs)
            if settings is not None and _is_trained(weight) and (bias is None or bias.is_leaf):
                computed, given = convolution_dtypes(image, weight, settings[0])
                call = _Convolution(weight, bias, func in _TRANSPOSED, settings, computed)
                result: Tensor = _Split.apply(image.to(computed), weight, call, self._deferred)  # type: ignore[no-untyped-call]
                return result.to(given)
        return func(*args, **kwargs)


def _is_trained(weight: Tensor) -> bool:
    return weight.is_leaf and weight.requires_grad


Bound = tuple[Tensor, Tensor, Tensor | None, tuple[Any, ...] | None]


def _convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Bound:  # fmt: skip
    if isinstance(padding, str):  # "same" and "valid" may pad unevenly; autograd's own way will do
        return input, weight, bias, None
    axes = weight.dim() - 2
    return input, weight, bias, (_each(stride, axes), _each(padding, axes), _each(dilation, axes), [0] * axes, groups)


def _transposed_convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Bound:  # fmt: skip
    axes = weight.dim() - 2
    settings = (_each(part, axes) for part in (stride, padding, dilation, output_padding))
    return input, weight, bias, (*settings, groups)


def _each(value: Any, axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


_TRANSPOSED = (F.conv_transpose3d, F.conv_transpose2d)
_CONVOLUTIONS: dict[Callable[..., Any], Callable[..., Bound]] = {
    **dict.fromkeys((F.conv3d, F.conv2d), _convolution),
    **dict.fromkeys(_TRANSPOSED, _transposed_convolution),
}
