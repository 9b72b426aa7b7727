"""Convolutions and pooling of volumes that are cut into slabs: each rank makes the planes whose middle it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lamp3d.graph.arithmetic import compute
from lamp3d.graph.convolution import Call, bind
from lamp3d.space.border import convolve_slab
from lamp3d.space.collect import collect
from lamp3d.space.layout import AxisCut, Layout, Spread, Window
from lamp3d.space.saved import Own, kept_apart
from lamp3d.space.sharded import ShardedVolume, even_layout, refuse, rule

Local = Callable[[Tensor, list[int]], Tensor]
"""The operation on a tensor, with so much padding along each of D, H, W."""


@rule(F.conv3d)
def convolution(*args: Any, **kwargs: Any) -> ShardedVolume:
    """``torch.nn.functional.conv3d``."""
    call = _call(F.conv3d, args, kwargs)
    volume, (stride, padding, dilation, *_, groups) = call.image, call.settings
    assert isinstance(volume, ShardedVolume)
    kernel = call.weight.shape[2:]
    windows = [Window(*numbers) for numbers in zip(kernel, stride, padding, dilation, strict=True)]
    if (found := convolve_slab(volume, call, windows)) is not None:
        same = found.placement == volume.placement
        return found if same else settled(found.local, found.placement.extents, found.placement.cuts, volume)

    def local(image: Tensor, padding: list[int]) -> Tensor:
        return compute(F.conv3d, image, call.weight, call.bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]

    return _windowed(volume, windows, local, 0.0)


@rule(torch.max_pool3d, F.max_pool3d)
def max_pool(
    input: ShardedVolume, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> ShardedVolume:  # fmt: skip
    """``torch.nn.functional.max_pool3d``."""
    if return_indices:
        raise refuse("max_pool3d", "indices are asked for")
    kernel, padding, dilation = _three(kernel_size), _three(padding), _three(dilation)
    stride = _three(stride) if stride else kernel
    windows = [Window(*n, ceil=ceil_mode) for n in zip(kernel, stride, padding, dilation, strict=True)]

    def local(image: Tensor, padding: list[int]) -> Tensor:
        return torch.max_pool3d(image, kernel, stride, padding, dilation, ceil_mode)

    return _windowed(input, windows, local, -torch.inf)


@rule(F.avg_pool3d)
def average_pool(
    input: ShardedVolume, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> ShardedVolume:  # fmt: skip
    """``torch.nn.functional.avg_pool3d``."""
    kernel, padding = _three(kernel_size), _three(padding)
    stride = _three(stride) if stride else kernel
    if ceil_mode or (any(padding) and not count_include_pad and divisor_override is None):
        raise refuse("avg_pool3d", "windows that hang over the edge are divided by other numbers")
    windows = [Window(*numbers) for numbers in zip(kernel, stride, padding, strict=True)]

    def local(image: Tensor, padding: list[int]) -> Tensor:
        return F.avg_pool3d(image, kernel, stride, padding, False, True, divisor_override)

    return _windowed(input, windows, local, 0.0)


@rule(F.conv_transpose3d)
def transposed_convolution(*args: Any, **kwargs: Any) -> ShardedVolume:
    """``torch.nn.functional.conv_transpose3d``."""
    call = _call(F.conv_transpose3d, args, kwargs)
    assert isinstance(call.image, ShardedVolume)
    volume = call.image
    numbers = zip(call.weight.shape[2:], *call.settings[:3], call.settings[4], strict=True)
    spreads = [Spread(*n) for n in numbers]
    extents = [spread.extent(extent) for spread, extent in zip(spreads, volume.shape[2:], strict=True)]
    return _spread(spread_again(volume, extents), call, spreads, extents)


def _spread(volume: ShardedVolume, call: Call, spreads: Sequence[Spread], extents: Sequence[int]) -> ShardedVolume:
    cuts = [cut.with_bounds(spreads[cut.dim - 2].bounds(cut.bounds)) for cut in volume.placement.cuts]
    if any(cut.thinnest < 1 for cut in cuts):
        return _spread(volume.gathered(), call, spreads, extents)
    stride, padding, dilation, _, output_padding, groups = call.settings
    image, padding, output_padding, trims, own = volume.local, list(padding), list(output_padding), [], []
    for cut, made in zip(volume.placement.cuts, cuts, strict=True):
        spread = spreads[cut.dim - 2]
        reads = [spread.reads(slab, cut.extent) for slab in made.slabs]
        image = collect(image, volume.space, cut, [planes for planes, _ in reads])
        padding[cut.dim - 2] = output_padding[cut.dim - 2] = 0
        here = volume.space.coordinate[cut.axis]
        begin, end = made.slabs[here]
        own.append(Own.of(cut.dim, cut.slabs[here], reads[here][0], 0))
        trims.append((cut.dim, begin - reads[here][1], end - begin))
    # Planes that no input plane reaches still have the bias, which is therefore added at the end.
    trimmed = any(begin != 0 or planes != _spread_planes(image, spreads, dim) for dim, begin, planes in trims)
    bias = None if trimmed else call.bias
    with kept_apart(image, volume.local, own):
        local: Tensor = compute(
            F.conv_transpose3d, image, call.weight, bias, stride, padding, output_padding, groups, dilation
        )
    if trimmed:
        for dim, begin, planes in trims:
            local = _trimmed(local, dim, begin, planes)
        if call.bias is not None:
            local = local + call.bias.to(local.dtype)[:, None, None, None]
    return settled(local, extents, cuts, volume)


def spread_again(volume: ShardedVolume, larger: Sequence[int]) -> ShardedVolume:
    """A gathered volume that is about to grow, cut again if what it grows to is large enough."""
    if volume.placement.cuts:
        return volume
    now = even_layout(volume.placement.extents, volume.space)
    depth, height, width = larger
    then = even_layout((depth, height, width), volume.space)
    if now is None or then is None or any(cut.thinnest < volume.space.least for cut in then.cuts):
        return volume
    return volume.relaid(now)


def settled(local: Tensor, extents: Sequence[int], cuts: Sequence[AxisCut], like: ShardedVolume) -> ShardedVolume:
    """What an operation has made, as a volume; gathered if its slabs are too thin to be worth it."""
    depth, height, width = extents
    made = ShardedVolume(local, Layout((depth, height, width), tuple(cuts)), like.space)
    shrunk = all(a <= b for a, b in zip(extents, like.shape[2:], strict=True))
    return made.gathered() if shrunk and any(cut.thinnest < like.space.least for cut in cuts) else made


def _windowed(volume: ShardedVolume, windows: Sequence[Window], local: Local, fill: float) -> ShardedVolume:
    extents = [window.extent(extent) for window, extent in zip(windows, volume.shape[2:], strict=True)]
    cuts = [cut.with_bounds(windows[cut.dim - 2].bounds(cut.bounds)) for cut in volume.placement.cuts]
    if any(cut.thinnest < 1 for cut in cuts):
        return _windowed(volume.gathered(), windows, local, fill)
    image, padding, missing = volume.local, [window.padding for window in windows], [0] * 6
    own = []
    for cut, made in zip(volume.placement.cuts, cuts, strict=True):
        reads = [windows[cut.dim - 2].reads(slab, cut.extent) for slab in made.slabs]
        image = collect(image, volume.space, cut, [read for read, _, _ in reads])
        here = volume.space.coordinate[cut.axis]
        read, before, after = reads[here]
        own.append(Own.of(cut.dim, cut.slabs[here], read, before))
        padding[cut.dim - 2] = 0
        missing[2 * (4 - cut.dim) : 2 * (4 - cut.dim) + 2] = before, after
    if any(missing):
        image = F.pad(image, missing, value=fill)
    with kept_apart(image, volume.local, own):
        result = local(image, padding)
    return settled(result, extents, cuts, volume)


def _spread_planes(image: Tensor, spreads: Sequence[Spread], dim: int) -> int:
    spread = spreads[dim - 2]
    return (image.shape[dim] - 1) * spread.stride + (spread.kernel - 1) * spread.dilation + 1


def _trimmed(tensor: Tensor, dim: int, begin: int, planes: int) -> Tensor:
    """So many planes from a certain one on; those before the first and after the last are zero."""
    before, after = max(0, -begin), max(0, begin + planes - tensor.shape[dim])
    if before or after:
        missing = [0] * 6
        missing[2 * (4 - dim) : 2 * (4 - dim) + 2] = before, after
        tensor = F.pad(tensor, missing)
    return tensor.narrow(dim, begin + before, planes)


def _call(func: Callable[..., Any], args: Any, kwargs: Any) -> Call:
    call = bind(func, args, kwargs)
    if call is None:
        raise refuse(func.__name__, "it pads unevenly, or takes no batch")
    if isinstance(call.weight, ShardedVolume) or not isinstance(call.image, ShardedVolume):
        raise refuse(func.__name__, "the weight is a volume")
    return call


def _three(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 3 if len(values) == 1 else values
