"""A slab's own convolution while its neighbours' planes travel; what they add is added afterwards.

A convolution is linear: that of a slab with zeros around it, plus those of the neighbours' border planes alone, is that
of the whole. So no copy of the slab with its neighbours' planes is made, and beside the slab only those planes are
kept for the backward pass. There, in the same way, the border planes' gradients travel while the slab's is computed.
Where two axes are cut a neighbour may also be diagonal, and then shares an edge instead of a face.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lamp3d.graph.arithmetic import DeferredWeights, deferring
from lamp3d.graph.convolution import Call, Convolution, laid_out_as
from lamp3d.space.collect import empty
from lamp3d.space.layout import AxisCut, Layout, Window
from lamp3d.space.ranks import Place, Space
from lamp3d.space.sharded import ShardedVolume


def convolve_slab(volume: ShardedVolume, call: Call, windows: Sequence[Window]) -> ShardedVolume | None:
    """A convolution whose every slab is made from the same slab and its neighbours' borders; None if it is another.

    Args:
        volume: the input.
        call: the convolution's call.
        windows: along D, H, W.
    """
    cuts = volume.placement.cuts
    crossed = [(cut, windows[cut.dim - 2]) for cut in cuts if not windows[cut.dim - 2].is_pointwise]
    if not crossed or not all(_stays_in_place(cut, window) for cut, window in crossed):
        return None
    plain = Call(volume.local, call.weight, call.bias, call.settings)
    smallest = list(volume.local.shape[2:])
    for cut in cuts:
        smallest[cut.dim - 2] = cut.thinnest
    convolution, given = plain.convolution(smallest), plain.given()
    image = volume.local.to(convolution.computed)
    borders = _borders(volume.space, crossed)
    with torch.autocast(image.device.type, enabled=False):
        made: Tensor = _ConvolveSlab.apply(  # type: ignore[no-untyped-call]
            image, call.weight, call.bias, convolution, volume.space, borders, deferring(call.weight, call.bias)
        )
    made = made.to(given)
    depth, height, width = (w.extent(extent) for w, extent in zip(windows, volume.shape[2:], strict=True))
    of_made = tuple(cut.with_bounds(windows[cut.dim - 2].bounds(cut.bounds)) for cut in cuts)
    return ShardedVolume(made, Layout((depth, height, width), of_made), volume.space)


def _stays_in_place(cut: AxisCut, window: Window) -> bool:
    """Whether what a slab makes alone, with zeros around it, lies in its place and lacks only a part at the borders."""
    halo, step = window.padding, window.stride
    if halo == 0 or window.reach != 2 * halo or cut.thinnest < halo:
        return False
    # Wider kernels in steps: their border's few planes are what oneDNN computes wrongly in bf16.
    return step == 1 or (window.kernel == 3 and window.dilation == 1 and all(b % step == 0 for b in cut.bounds[:-1]))


class _Side(NamedTuple):
    """Of a border, along one axis.

    Attributes:
        dim: the axis, of a (B, C, D, H, W) tensor.
        at_end: whether the neighbour follows the slab.
        reads: how many of the neighbour's planes the slab's result is made of.
        sends: how many of the slab's the neighbour's is made of.
        makes: planes of the slab's result that are made of the neighbour's.
        taps: of the kernel, those that reach beyond the border.
        missing: planes of zeros before and after the neighbour's, so that each tap finds one.
    """

    dim: int
    at_end: bool
    reads: int
    sends: int
    makes: int
    taps: slice
    missing: tuple[int, int]

    @classmethod
    def of(cls, dim: int, window: Window, at_end: bool) -> _Side:
        """Where a window crosses a cut."""
        before, after = window.padding, max(0, window.padding + 1 - window.stride)
        reads, sends = (after, before) if at_end else (before, after)
        makes, taps = -(-reads // window.stride), -(-reads // window.dilation)
        missing = max(0, (makes - 1) * window.stride + (taps - 1) * window.dilation + 1 - reads)
        if at_end:
            return cls(dim, at_end, reads, sends, makes, slice(window.kernel - taps, window.kernel), (missing, 0))
        return cls(dim, at_end, reads, sends, makes, slice(0, taps), (0, missing))

    def narrow(self, volume: Tensor, planes: int) -> Tensor:
        """So many of a volume's planes next to the border."""
        return volume.narrow(self.dim, volume.shape[self.dim] - planes if self.at_end else 0, planes)


class _Border(NamedTuple):
    """What a slab shares with a neighbour: a face with one side, an edge with two.

    Attributes:
        place: of the neighbour in the mesh.
        sides: one for each axis along which the neighbour lies beyond the slab.
    """

    place: Place
    sides: tuple[_Side, ...]

    @property
    def is_read(self) -> bool:
        """Whether the slab's result is made of the neighbour's planes too."""
        return all(side.reads for side in self.sides)

    @property
    def is_sent(self) -> bool:
        """Whether the neighbour's is made of the slab's."""
        return all(side.sends for side in self.sides)

    def room_to_read(self, image: Tensor, space: Space) -> Tensor:
        """For the neighbour's planes."""
        return empty(image, {side.dim: side.reads for side in self.sides}, space)

    def room_for_gradient(self, image: Tensor, space: Space) -> Tensor:
        """For the gradient of the slab's planes that the neighbour has read."""
        return empty(image, {side.dim: side.sends for side in self.sides}, space)

    def sent(self, image: Tensor) -> Tensor:
        """The slab's planes that the neighbour reads, as a view."""
        for side in self.sides:
            image = side.narrow(image, side.sends)
        return image

    def made(self, volume: Tensor) -> Tensor:
        """Of the result, what is made of the neighbour's planes, as a view."""
        for side in self.sides:
            volume = side.narrow(volume, side.makes)
        return volume

    def taps(self, weight: Tensor) -> Tensor:
        """Those that reach beyond the border, as a view."""
        for side in self.sides:
            weight = weight.narrow(side.dim, side.taps.start, side.taps.stop - side.taps.start)
        return weight

    def padded(self, planes: Tensor) -> Tensor:
        """The neighbour's planes with those that are missing."""
        missing = [0] * 6
        for side in self.sides:
            missing[2 * (4 - side.dim) : 2 * (4 - side.dim) + 2] = side.missing
        return F.pad(planes, missing) if any(missing) else planes

    def unpadded(self, planes: Tensor) -> Tensor:
        """Back again."""
        for side in self.sides:
            planes = planes.narrow(side.dim, side.missing[0], side.reads)
        return planes

    def convolution(self, whole: Convolution, planes: Tensor, taps: Tensor) -> Convolution:
        """The same convolution of border planes, with nothing around them."""
        stride, padding, *rest = whole.settings
        beyond = {side.dim - 2 for side in self.sides}
        settings = (stride, [0 if axis in beyond else width for axis, width in enumerate(padding)], *rest)
        return Convolution.of(planes, taps, None, settings, whole.computed)


def _borders(space: Space, crossed: Sequence[tuple[AxisCut, Window]]) -> list[_Border]:
    """Those that this rank's slab has."""
    borders = []
    for steps in itertools.product((-1, 0, 1), repeat=len(crossed)):
        place = list(space.coordinate)
        for (cut, _), step in zip(crossed, steps, strict=True):
            place[cut.axis] += step
        inside = all(0 <= index < size for index, size in zip(place, space.sizes, strict=True))
        if any(steps) and inside:
            sides = [_Side.of(cut.dim, w, step > 0) for (cut, w), step in zip(crossed, steps, strict=True) if step]
            borders.append(_Border(tuple(place), tuple(sides)))
    return borders


class _ConvolveSlab(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        convolution: Convolution,
        space: Space,
        borders: Sequence[_Border],
        deferred: DeferredWeights | None,
    ) -> Tensor:
        read = [border for border in borders if border.is_read]
        halos = {border.place: border.room_to_read(image, space) for border in read}
        sends = {border.place: border.sent(image) for border in borders if border.is_sent}
        exchange = space.exchange(sends, halos)
        made = convolution.forward(image, weight, bias)
        exchange.wait()
        for border in read:
            planes, taps = border.padded(halos[border.place]), laid_out_as(weight, border.taps(weight))
            border.made(made).add_(border.convolution(convolution, planes, taps).forward(planes, taps, None))
        ctx.save_for_backward(image, weight, *halos.values())
        # Parameters are remembered as they are: what recomputation saves is not the parameter, but its content.
        ctx.parameters = None if deferred is None else (weight, bias)
        ctx.convolution, ctx.space, ctx.borders, ctx.deferred = convolution, space, borders, deferred
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        image, weight, *halos = ctx.saved_tensors
        convolution, space, borders, deferred = ctx.convolution, ctx.space, ctx.borders, ctx.deferred
        (gradient,) = gradients
        of_image_wanted, of_weight_wanted, of_bias_wanted = ctx.needs_input_grad[:3]
        if deferred is not None:
            deferred.add(convolution, gradient, image, *ctx.parameters)
            of_weight_wanted = of_bias_wanted = False
        read = [border for border in borders if border.is_read]
        of_weights: list[Tensor | None] = []
        sends: dict[Place, Tensor] = {}
        for border, halo in zip(read, halos, strict=True):
            planes, taps = border.padded(halo), laid_out_as(weight, border.taps(weight))
            # Laid out as oneDNN and cuDNN want it: a slice of a volume's gradient is neither of torch's layouts.
            of_part = laid_out_as(gradient, border.made(gradient))
            mask = (of_image_wanted, of_weight_wanted, False)
            at_border = border.convolution(convolution, planes, taps)
            if deferred is not None:
                deferred.add(at_border, of_part, planes, ctx.parameters[0], None, border.taps)
            of_planes, of_taps, _ = at_border.backward(of_part, planes, taps, mask) if any(mask) else [None] * 3
            if of_planes is not None:
                sends[border.place] = border.unpadded(of_planes)
            of_weights.append(of_taps)
        sent = [border for border in borders if border.is_sent and of_image_wanted]
        receives = {border.place: border.room_for_gradient(image, space) for border in sent}
        exchange = space.exchange(sends, receives)
        mask = (of_image_wanted, of_weight_wanted, of_bias_wanted)
        of_image = of_weight = of_bias = None
        if any(mask):
            of_image, of_weight, of_bias = convolution.backward(gradient, image, weight, mask)
        exchange.wait()
        if of_image is not None:
            for border in sent:
                border.sent(of_image).add_(receives[border.place])
        if of_weight is not None:
            for border, of_taps in zip(read, of_weights, strict=True):
                border.taps(of_weight).add_(of_taps)
            of_weight = of_weight.to(weight.dtype)
        return of_image, of_weight, None if of_bias is None else of_bias.to(weight.dtype), *[None] * 4
