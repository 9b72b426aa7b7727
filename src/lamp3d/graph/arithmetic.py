"""What a network's cells are computed in: a precision, and convolutions done as lamp3d wants them.

Nothing in the network is changed: while the cells' forward runs, a ``TorchFunctionMode`` takes the calls of
convolutions that torch would do too slowly or wrongly (:mod:`lamp3d.graph.convolution`), or whose backward is to be
split, and runs them through an autograd function of their own. All others are left to torch.

*Split*: the rest of the network waits for a gradient with respect to activations only. A schedule that splits the
backward (zero bubble) lets a stage compute and send that first, and its weight gradients when it would idle.
Convolutions hold nearly all of a network's arithmetic, so only they are split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lamp3d.graph.convolution import Convolution, Kernel, bind
from lamp3d.graph.normalisation import instance_norm


@contextmanager
def arithmetic(
    device: torch.device, precision: str, deferred: DeferredWeights | None = None, *, own_kernels: bool = True
) -> Iterator[None]:
    """The context in which cells are computed.

    Args:
        device: where the network runs.
        precision: ``"fp32"`` (the parameters' own dtype) or ``"bf16"`` (torch's autocast).
        deferred: where convolutions leave their weights' gradients to be computed; None: nowhere, they are not split.
        own_kernels: whether a CPU's tensors are computed as is best on CPUs; if not, as CUDA's are (for accounts of
            devices that are not here).
    """
    lowered = torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
    here = _Arithmetic(deferred, own_kernels)
    before = _present.set(here)
    try:
        with lowered, here:
            yield
    finally:
        _present.reset(before)


def compute(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """One of torch's functions on ordinary tensors, done as the present context says: for tensors made of others."""
    here = _present.get()
    return func(*args, **kwargs) if here is None else here.run(func, args, kwargs)


def deferring(weight: Tensor, bias: Tensor | None) -> DeferredWeights | None:
    """Where a convolution made of others is to leave the gradients of its parameters; None: it computes them."""
    here = _present.get()
    return None if here is None else here.deferred(weight, bias)


def _whole(weight: Tensor) -> Tensor:
    return weight


class DeferredWeights:
    """The weight gradients that one micro-batch's backward has left to be computed."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Convolution, Tensor, Tensor, Tensor, Tensor | None, Callable[[Tensor], Tensor]]] = []

    def add(
        self,
        convolution: Convolution,
        gradient: Tensor,
        image: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        part: Callable[[Tensor], Tensor] = _whole,
    ) -> None:
        """Remember what the weight gradient of one convolution is made of.

        Args:
            convolution: how it is computed.
            gradient: of its result.
            image: its input.
            weight: the parameter.
            bias: the other one.
            part: of the weight, those taps that the convolution has, as a view.
        """
        if gradient.untyped_storage().nbytes() > gradient.nbytes:
            gradient = gradient.clone()  # a part of a concatenation's gradient; the rest is not to live as long
        # Detached: the image's history would keep all leaves that it came from, and their gradients.
        self._waiting.append((convolution, gradient, image.detach(), weight, bias, part))

    def tensors(self) -> list[Tensor]:
        """What is held for it."""
        return [tensor for _, gradient, image, *_ in self._waiting for tensor in (gradient, image)]

    @torch.no_grad()
    def compute(self) -> None:
        """Add the weight gradients to the parameters' ``grad``, letting go of what they were made of one by one."""
        while self._waiting:
            convolution, gradient, image, weight, bias, part = self._waiting.pop()
            biased = bias is not None and bias.requires_grad
            _, *found = convolution.backward(gradient, image, part(weight), (False, weight.requires_grad, biased))
            for parameter, of_parameter, where in zip((weight, bias), found, (part, _whole), strict=True):
                if parameter is None or of_parameter is None or not parameter.requires_grad:
                    continue
                if parameter.grad is None:  # laid out as autograd would
                    parameter.grad = torch.zeros_like(parameter)
                where(parameter.grad).add_(of_parameter)


class _Convolve(torch.autograd.Function):
    """A convolution that is computed, and split, as lamp3d wants it."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        convolution: Convolution,
        deferred: DeferredWeights | None,
    ) -> Tensor:
        # Parameters are remembered as they are: what recomputation saves is not the parameter, but its content.
        ctx.save_for_backward(image, *([weight] if deferred is None else []))
        ctx.parameters = None if deferred is None else (weight, bias)
        ctx.convolution, ctx.deferred = convolution, deferred
        return convolution.forward(image, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        image, *saved = ctx.saved_tensors
        wanted = tuple(ctx.needs_input_grad[:3])
        if ctx.deferred is None:
            (weight,) = saved
        else:
            weight, bias = ctx.parameters
            ctx.deferred.add(ctx.convolution, gradients[0], image, weight, bias)
            wanted = (wanted[0], False, False)
        found = [None, None, None]
        if any(wanted):
            found = ctx.convolution.backward(gradients[0], image, weight, wanted)
        of_image, *of_parameters = found
        return of_image, *(None if found is None else found.to(weight.dtype) for found in of_parameters), None, None


class _Arithmetic(TorchFunctionMode):
    """While active, convolutions and instance norms are computed as this package says."""

    def __init__(self, deferred: DeferredWeights | None, own_kernels: bool):
        super().__init__()
        self._deferred, self._own_kernels = deferred, own_kernels

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # A tensor subclass looks inside itself first, and calls `compute`.
        looks_inside = any(_has_own_functions(kind) for kind in types)
        return func(*args, **(kwargs or {})) if looks_inside else self.run(func, args, kwargs or {})

    def deferred(self, weight: Tensor, bias: Tensor | None) -> DeferredWeights | None:
        """Where the gradients of these are left, if they are."""
        # Weights that are no leaves (weight standardisation) have a gradient to pass on at once, and those with hooks
        # one that autograd hands to them.
        is_split = weight.requires_grad and all(_is_plain_parameter(t) for t in (weight, bias) if t is not None)
        return self._deferred if is_split else None

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function on ordinary tensors."""
        if (call := bind(func, args, kwargs)) is not None:
            convolution, given = call.convolution(), call.given()
            deferred = self.deferred(call.weight, call.bias)
            another = convolution.kernel is not Kernel.TORCHS_CHOICE or convolution.computed != given
            if deferred or (another and self._own_kernels):
                image = call.image.to(convolution.computed)
                with torch.autocast(image.device.type, enabled=False):
                    found: Tensor = _Convolve.apply(image, call.weight, call.bias, convolution, deferred)  # type: ignore[no-untyped-call]
                return found.to(given)
        elif func is F.instance_norm and self._own_kernels and (normal := instance_norm(*args, **kwargs)) is not None:
            return normal
        elif not self._own_kernels and torch.is_autocast_enabled("cpu"):
            return _lowered_as_on_cuda(func, args, kwargs)
        return func(*args, **kwargs)


_KEPT_LOW = {"max_pool3d", "avg_pool3d", "adaptive_max_pool3d", "adaptive_avg_pool3d"}
"""What autocast computes in fp32 on a CPU, and in the precision of its input on CUDA."""

_RAISED = {"group_norm", "layer_norm", "softmax", "log_softmax"}
"""The reverse."""


def _lowered_as_on_cuda(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function on a CPU's tensors, in the precision in which CUDA's autocast would compute it."""
    name = getattr(func, "__name__", "")
    if name in _RAISED:
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.float, (args, kwargs))
    elif name not in _KEPT_LOW:
        return func(*args, **kwargs)
    with torch.autocast("cpu", enabled=False):
        return func(*args, **kwargs)


def _is_plain_parameter(tensor: Tensor) -> bool:
    """Not every leaf is one: weights that are made in another stage arrive as leaves, and their gradients go back."""
    return isinstance(tensor, nn.Parameter) and not tensor._backward_hooks


def _has_own_functions(kind: type) -> bool:
    theirs = getattr(kind, "__torch_function__", None)
    return kind is not Tensor and theirs is not torch._C._disabled_torch_function_impl


_present: ContextVar[_Arithmetic | None] = ContextVar("arithmetic", default=None)
