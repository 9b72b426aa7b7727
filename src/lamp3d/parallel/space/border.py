"""A slab's own convolution while its neighbours' planes travel; what they add is added afterwards.

A convolution is linear: that of a slab with zeros around it, plus that of the neighbours' border planes alone, is that
of the whole. So no copy of the slab with its neighbours' planes is made, and beside the slab only those planes are
kept for the backward pass. There, in the same way, the border planes' gradients travel while the slab's is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lamp3d.graph.convolution import Call, Convolution
from lamp3d.parallel.sharded import ShardedVolume
from lamp3d.parallel.space.collect import empty
from lamp3d.parallel.space.layout import Cut, Layout, Window
from lamp3d.parallel.space.ranks import Space


def convolve_slab(volume: ShardedVolume, call: Call, windows: Sequence[Window]) -> ShardedVolume | None:
    """A convolution of slabs that keeps their planes; None where it is not of this kind.

    Args:
        volume: the input.
        call: the convolution's call.
        windows: along D, H, W.
    """
    if len(volume.placement.cuts) != 1:
        return None
    (cut,) = volume.placement.cuts
    window = windows[cut.dim - 2]
    halo = window.padding
    if window.stride != 1 or halo == 0 or window.reach != 2 * halo or cut.thinnest < halo:
        return None
    plain = Call(volume.local, call.weight, call.bias, call.settings)
    smallest = list(volume.local.shape[2:])
    smallest[cut.dim - 2] = cut.thinnest
    convolution, given = plain.convolution(smallest), plain.given()
    image = volume.local.to(convolution.computed)
    with torch.autocast(image.device.type, enabled=False):
        made: Tensor = _ConvolveSlab.apply(image, call.weight, call.bias, convolution, volume.space, cut, window)  # type: ignore[no-untyped-call]
    made = made.to(given)
    extents = [w.extent(extent) for w, extent in zip(windows, volume.shape[2:], strict=True)]
    depth, height, width = extents
    return ShardedVolume(made, Layout((depth, height, width), (cut,)), volume.space)


class _Border(NamedTuple):
    """One of a slab's two neighbours.

    Attributes:
        place: on the cut's axis.
        taps: of the kernel, those that reach its planes.
        padding: for F.pad, what is missing of the planes.
        at_end: whether it follows the slab.
    """

    place: int
    taps: slice
    padding: list[int]
    at_end: bool


class _ConvolveSlab(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        convolution: Convolution,
        space: Space,
        cut: Cut,
        window: Window,
    ) -> Tensor:
        dim, halo = cut.dim, window.padding
        borders = _borders(space, cut, window)
        halos = {border.place: empty(image, dim, halo, space) for border in borders}
        exchange = space.exchange(
            cut.axis,
            {border.place: _side(image, dim, halo, border.at_end) for border in borders},
            halos,
        )
        made = convolution.forward(image, weight, bias)
        exchange.wait()
        for border in borders:
            planes = F.pad(halos[border.place], border.padding)
            taps = _taps(weight, dim, border.taps)
            added = _at_border(convolution, planes, taps, dim).forward(planes, taps, None)
            _side(made, dim, halo, border.at_end).add_(added)
        ctx.save_for_backward(image, weight, *halos.values())
        ctx.convolution, ctx.space, ctx.cut, ctx.window = convolution, space, cut, window
        ctx.has_bias = bias is not None
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        image, weight, *halos = ctx.saved_tensors
        convolution, space, cut, dim, halo = ctx.convolution, ctx.space, ctx.cut, ctx.cut.dim, ctx.window.padding
        (gradient,) = gradients
        of_image_wanted, of_weight_wanted, of_bias_wanted = ctx.needs_input_grad[:3]
        borders = _borders(space, cut, ctx.window)
        of_weights: list[tuple[slice, Tensor]] = []
        sends: dict[int, Tensor] = {}
        for border, planes in zip(borders, halos, strict=True):
            padded = F.pad(planes, border.padding)
            # Laid out as oneDNN and cuDNN want it: a slice of a volume's gradient is neither of torch's layouts.
            of_side = _like(gradient, _side(gradient, dim, halo, border.at_end))
            taps = _taps(weight, dim, border.taps)
            mask = (of_image_wanted, of_weight_wanted, False)
            of_planes, of_taps, _ = _at_border(convolution, padded, taps, dim).backward(of_side, padded, taps, mask)
            if of_planes is not None:
                start = border.padding[2 * (4 - dim)]
                sends[border.place] = of_planes.narrow(dim, start, halo)
            if of_taps is not None:
                of_weights.append((border.taps, of_taps))
        receives = {border.place: empty(image, dim, halo, space) for border in borders} if of_image_wanted else {}
        exchange = space.exchange(cut.axis, sends, receives)
        mask = (of_image_wanted, of_weight_wanted, of_bias_wanted and ctx.has_bias)
        of_image, of_weight, of_bias = convolution.backward(gradient, image, weight, mask)
        exchange.wait()
        if of_image is not None:
            for border in borders:
                _side(of_image, dim, halo, border.at_end).add_(receives[border.place])
        if of_weight is not None:
            for part, of_part in of_weights:
                _taps(of_weight, dim, part, copy=False).add_(of_part)
            of_weight = of_weight.to(weight.dtype)
        return of_image, of_weight, None if of_bias is None else of_bias.to(weight.dtype), None, None, None, None


def _borders(space: Space, cut: Cut, window: Window) -> list[_Border]:
    """The neighbours that this rank's slab has."""
    me = space.coordinate[cut.axis]
    reach = window.kernel // 2
    missing = (reach - 1) * window.dilation
    borders = []
    if me > 0:
        borders.append(_Border(me - 1, slice(0, reach), _pad(cut.dim, 0, missing), at_end=False))
    if me + 1 < space.sizes[cut.axis]:
        last = slice(window.kernel - reach, window.kernel)
        borders.append(_Border(me + 1, last, _pad(cut.dim, missing, 0), at_end=True))
    return borders


def _at_border(convolution: Convolution, planes: Tensor, taps: Tensor, dim: int) -> Convolution:
    """The same convolution of border planes, with nothing around them."""
    stride, padding, *rest = convolution.settings
    settings = (stride, [0 if axis == dim - 2 else width for axis, width in enumerate(padding)], *rest)
    return Convolution.of(planes, taps, None, settings, convolution.computed)


def _taps(weight: Tensor, dim: int, taps: slice, *, copy: bool = True) -> Tensor:
    part = weight.narrow(dim, taps.start, taps.stop - taps.start)
    return _like(weight, part) if copy else part


def _like(model: Tensor, tensor: Tensor) -> Tensor:
    """In the layout of another."""
    last = model.dim() == 5 and model.stride(1) == 1 and model.shape[1] > 1
    return tensor.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)


def _side(volume: Tensor, dim: int, planes: int, at_end: bool) -> Tensor:
    return volume.narrow(dim, volume.shape[dim] - planes if at_end else 0, planes)


def _pad(dim: int, before: int, after: int) -> list[int]:
    padding = [0] * 6
    padding[2 * (4 - dim) : 2 * (4 - dim) + 2] = before, after
    return padding
