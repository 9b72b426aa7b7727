"""How a convolution is computed: in which precision, by which of torch's kernels, and its gradients one by one.

torch chooses badly for three sorts of convolution on a CPU, and all are common in a 3D network; the figures are in
docs/decisions/arithmetic.md.

* In fp32 a small volume at batch 1 goes to an im2col kernel that is four to ten times slower than oneDNN's, which is
  called by its own name instead; for gradients it has none, but torch takes it when given oneDNN's own kind of tensor.
  A pointwise convolution of channels-last values, which meets the same fate, is a matrix product.
* In bf16 oneDNN's gradient of the weight reads and writes memory that is not its own where the volume is hardly larger
  than the kernel. Such volumes, the deepest levels of a network on small patches, are computed in fp32. With AMX it
  does so where planes are large and few. There depth and height change places.
* For large ones it takes copies of the image and of the result's gradient. Where there is no room for them, the
  gradients by pieces of the volume are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from lamp3d.graph.allocator import make_room
from lamp3d.graph.onednn import Reading, outgrows_its_room

Mask = tuple[bool, bool, bool]
"""Which gradients are wanted: the image's, the weight's, the bias's."""

PIECES = 16
"""Of a volume whose weight gradients are added up."""


class Kernel(Enum):
    """Whose code computes a convolution."""

    TORCHS_CHOICE = auto()
    ONEDNN = auto()
    MATRIX_PRODUCT = auto()
    TURNED = auto()
    """torch's choice, but the weight's gradient with depth and height in each other's place."""


@dataclass(frozen=True)
class Convolution:
    """One call of a convolution, apart from its tensors.

    Attributes:
        settings: stride, padding, dilation, transposed, output padding, groups, as aten wants them.
        computed: the dtype in which it is computed.
        kernel: whose code does it.
    """

    settings: tuple[Any, ...]
    computed: torch.dtype
    kernel: Kernel

    @classmethod
    def of(
        cls, image: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...], computed: torch.dtype
    ) -> Convolution:
        """The one that is best for such tensors."""
        return cls(settings, computed, _kernel(image, weight, bias, settings, computed))

    def forward(self, image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution, laid out as the image is; ``image`` is of the dtype in which it is computed."""
        made_channels = weight.shape[1] * self.settings[-1] if self.settings[3] else weight.shape[0]
        make_room(*[image] * max(1, made_channels // image.shape[1]))
        weight, bias = weight.to(self.computed), None if bias is None else bias.to(self.computed)
        if self.kernel is Kernel.MATRIX_PRODUCT:
            # Into a tensor of its own: the result of an autograd function must be no view of another.
            made = image.new_empty((image.shape[0], weight.shape[0], *image.shape[2:]))
            made = made.to(memory_format=torch.channels_last_3d)
            rows, products = (tensor.movedim(1, -1).flatten(0, -2) for tensor in (image, made))
            if bias is None:
                torch.mm(rows, weight.flatten(1).T, out=products)
            else:
                torch.addmm(bias, rows, weight.flatten(1).T, out=products)
            return made
        if self.kernel is Kernel.ONEDNN and not isinstance(image, FakeTensor):
            stride, padding, dilation, transposed, output_padding, groups = self.settings
            if transposed:
                found = torch.ops.mkldnn._convolution_transpose_pointwise(
                    image, weight, bias, padding, output_padding, stride, dilation, groups, "none", [], ""
                )
            else:
                found = torch.ops.aten.mkldnn_convolution(image, weight, bias, padding, stride, dilation, groups)
        else:
            found = torch.ops.aten.convolution(image, weight, bias, *self.settings)
        return found if self.kernel is Kernel.TORCHS_CHOICE else laid_out_as(image, found)

    def backward(self, gradient: Tensor, image: Tensor, weight: Tensor, mask: Mask) -> list[Tensor | None]:
        """The gradients of image, weight and bias, those that are wanted, in the dtype in which it is computed."""
        found: list[Tensor | None]
        if make_room(image, image, gradient) or not (mask[1] and self._is_in_pieces(image)):
            found = self._gradients(gradient, image, weight, mask)
        else:
            found = self._gradients(gradient, image, weight, (mask[0], False, mask[2]))
            found[1] = self._weight_by_pieces(gradient, image, weight)
        make_room(image, image)  # for the gradients of what made the image, which torch computes by itself
        return found

    def _gradients(self, gradient: Tensor, image: Tensor, weight: Tensor, mask: Mask) -> list[Tensor | None]:
        weight = weight.to(self.computed)
        if self.kernel is Kernel.TURNED and any(mask[1:]):  # the bias's gradient comes from the same code
            of_image = self._gradients(gradient, image, weight, (True, False, False))[0] if mask[0] else None
            return [of_image, *self._parameters_turned(gradient, image, weight, mask)]
        if self.kernel is Kernel.MATRIX_PRODUCT:
            out, values = gradient.movedim(1, -1), image.movedim(1, -1)
            rows = out.reshape(-1, out.shape[-1])
            return [
                (out @ weight.flatten(1)).movedim(-1, 1) if mask[0] else None,
                (rows.T @ values.reshape(-1, values.shape[-1])).view(weight.shape) if mask[1] else None,
                rows.sum(0) if mask[2] else None,
            ]
        bias_sizes = [gradient.shape[1]]
        if self.kernel in (Kernel.TORCHS_CHOICE, Kernel.TURNED) or isinstance(image, FakeTensor):
            return list(
                torch.ops.aten.convolution_backward(gradient, image, weight, bias_sizes, *self.settings, list(mask))
            )
        of_image, of_weight, of_bias = torch.ops.aten.convolution_backward(
            _onednn(gradient), _onednn(image), weight.contiguous(), bias_sizes, *self.settings, list(mask)
        )
        return [
            laid_out_as(image, of_image.to_dense()) if mask[0] else None,
            laid_out_as(weight, of_weight) if mask[1] else None,
            of_bias,
        ]

    def _parameters_turned(
        self, gradient: Tensor, image: Tensor, weight: Tensor, mask: Mask
    ) -> tuple[Tensor | None, Tensor | None]:
        """Their gradients with depth and height in each other's place, or if that is no better, in fp32."""
        gradient, image, weight = (laid_out_as(t, t.transpose(2, 3)) for t in (gradient, image, weight))
        settings = tuple([each[1], each[0], *each[2:]] if isinstance(each, list) else each for each in self.settings)
        turned = Convolution.of(image, weight, None, settings, self.computed)
        if turned.kernel is Kernel.TURNED:
            turned = Convolution.of(image, weight, None, settings, torch.float32)
            gradient, image = gradient.float(), image.float()
        _, of_weight, of_bias = turned._gradients(gradient, image, weight, (False, *mask[1:]))
        return None if of_weight is None else of_weight.transpose(2, 3), of_bias

    def _is_in_pieces(self, image: Tensor) -> bool:
        transposed = self.settings[3]
        return _is_volume_in_bf16(image, self.computed) and not transposed

    def _weight_by_pieces(self, gradient: Tensor, image: Tensor, weight: Tensor) -> Tensor:
        """The weight's gradient without copies of the volume, the sum of what groups of planes give."""
        weight = weight.to(self.computed)
        stride, padding, dilation, transposed, output_padding, groups = self.settings
        reach, planes, made = dilation[0] * (weight.shape[2] - 1) + 1, image.shape[2], gradient.shape[2]
        settings = (stride, [0, *padding[1:]], dilation, transposed, output_padding, groups)
        total = torch.zeros_like(weight, dtype=torch.float32)
        pieces = max(1, min(PIECES, made // reach))  # none is hardly larger than the kernel
        for begin, end in pairwise(made * i // pieces for i in range(pieces + 1)):
            first, last = begin * stride[0] - padding[0], (end - 1) * stride[0] - padding[0] + reach
            beyond = (0, 0, 0, 0, max(-first, 0), max(last - planes, 0))
            piece = F.pad(image[:, :, max(first, 0) : min(last, planes)], beyond)
            of_piece = Convolution.of(piece, weight, None, settings, self.computed)
            _, found, _ = of_piece._gradients(gradient[:, :, begin:end], piece, weight, (False, True, False))
            total += cast(Tensor, found)
        return total.to(weight.dtype)


class Call(NamedTuple):
    """A call of one of torch's convolutions, its arguments in order."""

    image: Tensor
    weight: Tensor
    bias: Tensor | None
    settings: tuple[Any, ...]

    def convolution(self, smallest: Sequence[int] | None = None) -> Convolution:
        """How it is to be computed at present (autocast or not).

        Args:
            smallest: the sides of the smallest image, where others compute a part of the same volume each: all of them
                have to choose one dtype. None: those of this one.
        """
        sides = self.image.shape[2:] if smallest is None else smallest
        return Convolution.of(self.image, self.weight, self.bias, self.settings, self._computed(sides))

    def given(self) -> torch.dtype:
        """The dtype that torch would give the result."""
        device = self.image.device.type
        if torch.is_autocast_enabled(device) and self.weight.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
        return self.weight.dtype

    def _computed(self, sides: Sequence[int]) -> torch.dtype:
        given = self.given()
        if self.image.device.type == "cpu" and given == torch.bfloat16 and self._hardly_exceeds_its_kernel(sides):
            return torch.float32
        return given

    def _hardly_exceeds_its_kernel(self, sides: Sequence[int]) -> bool:
        axes = zip(sides, self.weight.shape[2:], self.settings[0], strict=True)
        return any(width > 1 and extent < width * step for extent, width, step in axes)


def bind(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Call | None:
    """The call of a convolution, if it is one that can be computed here."""
    if (binder := _BINDERS.get(func)) is None:
        return None
    return binder(*args, **kwargs)


def _convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Call | None:  # fmt: skip
    axes = weight.dim() - 2
    dilations = _each(dilation, axes)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        both = [step * (width - 1) for step, width in zip(dilations, weight.shape[2:], strict=True)]
        if any(width % 2 for width in both):
            return None  # torch pads unevenly then
        padding = [width // 2 for width in both]
    settings = (_each(stride, axes), _each(padding, axes), dilations, False, [0] * axes, groups)
    return Call(input, weight, bias, settings) if input.dim() == weight.dim() else None


def _transposed_convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Call | None:  # fmt: skip
    axes = weight.dim() - 2
    stride, padding, dilation, output_padding = (_each(s, axes) for s in (stride, padding, dilation, output_padding))
    settings = (stride, padding, dilation, True, output_padding, groups)
    return Call(input, weight, bias, settings) if input.dim() == weight.dim() else None


_BINDERS: dict[Callable[..., Any], Callable[..., Call | None]] = {
    **dict.fromkeys((F.conv3d, F.conv2d), _convolution),
    **dict.fromkeys((F.conv_transpose3d, F.conv_transpose2d), _transposed_convolution),
}


def _is_volume_in_bf16(image: Tensor, computed: torch.dtype) -> bool:
    """Whether oneDNN's gradients of weights in bf16 are at work."""
    return image.device.type == "cpu" and computed == torch.bfloat16 and image.dim() == 5


def _kernel(
    image: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...], computed: torch.dtype
) -> Kernel:
    if _is_volume_in_bf16(image, computed):
        return Kernel.TURNED if outgrows_its_room(Reading.of(image, weight, settings)) else Kernel.TORCHS_CHOICE
    if image.device.type != "cpu" or computed != torch.float32 or not torch._C._has_mkldnn:
        return Kernel.TORCHS_CHOICE
    chosen = torch._C._select_conv_backend(image.to(computed), weight, bias, *settings)
    if not chosen.name.startswith("Slow"):
        return Kernel.TORCHS_CHOICE
    stride, padding, _, transposed, output_padding, groups = settings
    if transposed and any(extra >= step for extra, step in zip(output_padding, stride, strict=True)):
        return Kernel.TORCHS_CHOICE  # oneDNN has no such thing
    if all(width == 1 for width in weight.shape[2:]):
        plain = not transposed and groups == 1 and set(stride) == {1} and set(padding) == {0}
        return Kernel.MATRIX_PRODUCT if plain and _is_channels_last(image) else Kernel.TORCHS_CHOICE
    return Kernel.ONEDNN


def _each(value: Any, axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _onednn(tensor: Tensor) -> Tensor:
    found: Tensor = tensor.contiguous().to_mkldnn()
    return found


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 5 and tensor.stride(1) == 1


def laid_out_as(model: Tensor, found: Tensor) -> Tensor:
    """A tensor in the layout of another."""
    layout = torch.channels_last_3d if _is_channels_last(model) else torch.contiguous_format
    return found.contiguous(memory_format=layout)
