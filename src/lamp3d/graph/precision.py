"""Reduced precision: torch's autocast, kept away from convolutions that oneDNN computes wrongly.

oneDNN's bf16 gradient of a convolution's weight reads and writes memory that is not its own where the volume is hardly
larger than the kernel (torch 2.13 on a CPU with AVX512-BF16 and without AMX; docs/decisions/small-convolutions.md). The
result is anything up to infinity, and now and then a crash. Such volumes, the deepest levels of a network on small
patches, cost next to nothing, so they are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """The context of a precision: bf16 autocast where ``precision == "bf16"``, otherwise none.

    Args:
        device: where the network runs.
        precision: ``"fp32"`` or ``"bf16"``.
    """
    if precision != "bf16":
        yield
        return
    with torch.autocast(device.type, dtype=torch.bfloat16):
        if device.type == "cpu":
            with _SmallConvolutions():
                yield
        else:
            yield


def convolution_dtypes(image: Tensor, weight: Tensor, stride: Sequence[int]) -> tuple[torch.dtype, torch.dtype]:
    """In which precision a convolution is computed at present, and in which its result is given.

    Args:
        image: (B, C, …).
        weight: (C', C / groups, …), or the transposed convolution's.
        stride: of each axis.
    """
    device = image.device.type
    if not torch.is_autocast_enabled(device) or weight.dtype == torch.float64:
        return weight.dtype, weight.dtype
    dtype = torch.get_autocast_dtype(device)
    if device == "cpu" and dtype == torch.bfloat16 and _is_small(image.shape[2:], weight.shape[2:], stride):
        return torch.float32, dtype
    return dtype, dtype


def _is_small(extents: Sequence[int], kernel: Sequence[int], stride: Sequence[int]) -> bool:
    return any(width > 1 and extent < width * step for extent, width, step in zip(extents, kernel, stride, strict=True))


class _SmallConvolutions(TorchFunctionMode):
    """While active, convolutions on small volumes leave autocast."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.conv3d, F.conv_transpose3d):
            call = list(args)
            image = call[0] if call else kwargs["input"]
            weight = call[1] if len(call) > 1 else kwargs["weight"]
            stride = call[3] if len(call) > 3 else kwargs.get("stride", 1)
            steps = [stride] * 3 if isinstance(stride, int) else list(stride) * (3 // len(stride))
            computed, given = convolution_dtypes(image, weight, steps)
            if computed != given:
                with torch.autocast(image.device.type, enabled=False):
                    image = image.to(computed)
                    if call:
                        call[0] = image
                    else:
                        kwargs = kwargs | {"input": image}
                    return func(*call, **kwargs).to(given)
        return func(*args, **kwargs)
