"""Interpolation, padding, cropping and slicing of volumes that are cut into slabs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F

from lamp3d.space.collect import collect
from lamp3d.space.layout import Layout, Range, even_bounds
from lamp3d.space.sharded import ShardedVolume, refuse, rule
from lamp3d.space.windows import settled, spread_again


@rule(F.interpolate)
def interpolate(
    input: ShardedVolume, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: bool | None = None, recompute_scale_factor: bool | None = None, antialias: bool = False,
) -> ShardedVolume:  # fmt: skip
    """``torch.nn.functional.interpolate``: nearest and trilinear."""
    if mode not in ("nearest", "trilinear") or antialias:
        raise refuse("interpolate", f"mode {mode!r} is not known; nearest and trilinear are")
    line = "linear" if mode == "trilinear" else mode
    sizes = [None] * 3 if size is None else _three(size)
    scales = [None] * 3 if scale_factor is None else _three(scale_factor)
    settings = (line, align_corners, recompute_scale_factor)
    places = [_places(*axis, *settings) for axis in zip(input.shape[2:], sizes, scales, strict=True)]
    extents = [len(of_axis) for of_axis in places]
    volume = spread_again(input, extents)
    cuts = []
    for cut in volume.placement.cuts:
        made = extents[cut.dim - 2]
        cuts.append(cut.with_bounds((0, *(bound * made // cut.extent for bound in cut.bounds[1:-1]), made)))
    if any(cut.thinnest < 1 for cut in cuts):
        volume, cuts = volume.gathered(), []
    local = volume.local
    for cut, made_cut in zip(volume.placement.cuts, cuts, strict=True):
        own = places[cut.dim - 2]
        wanted: list[Range] = [(math.floor(own[begin]), math.ceil(own[end - 1]) + 1) for begin, end in made_cut.slabs]
        here = volume.space.coordinate[cut.axis]
        planes = collect(local, volume.space, cut, wanted)
        local = _mixed(planes, cut.dim, own[slice(*made_cut.slabs[here])], wanted[here][0])
    for dim in {2, 3, 4} - {cut.dim for cut in cuts}:
        local = _mixed(local, dim, places[dim - 2], 0)
    if local is volume.local:
        local = local.clone()  # as torch does
    return settled(local, extents, cuts, volume)


@functools.cache
def _places(
    extent: int, size: int | None, scale: float | None, line: str, align_corners: bool | None, recompute: bool | None
) -> tuple[float, ...]:
    """Between which planes each new plane lies: what torch makes of the planes' own numbers, whatever its rules."""
    with unset_fake_temporarily():
        numbers = torch.arange(extent, dtype=torch.float64)[None, None]
        return tuple(F.interpolate(numbers, size, scale, line, align_corners, recompute)[0, 0].tolist())


def _mixed(planes: Tensor, dim: int, places: Sequence[float], first: int) -> Tensor:
    """New planes between the planes from number ``first`` on, along one axis."""
    if list(places) == list(range(first, first + planes.shape[dim])):
        return planes
    low = [math.floor(place) - first for place in places]
    share = [place - math.floor(place) for place in places]
    below = planes.index_select(dim, torch.tensor(low, device=planes.device))
    if not any(share):
        return below
    high = [number + (part > 0) for number, part in zip(low, share, strict=True)]
    above = planes.index_select(dim, torch.tensor(high, device=planes.device))
    weights = torch.tensor(share, device=planes.device, dtype=planes.dtype)
    return torch.lerp(below, above, weights.view([-1 if d == dim else 1 for d in range(5)]))


def _three(value: Any) -> list[Any]:
    return [value] * 3 if isinstance(value, int | float) else list(value)


@rule(F.pad)
def pad(input: ShardedVolume, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> ShardedVolume:
    """``torch.nn.functional.pad`` over space and channels; negative numbers crop."""
    amounts = [*pad, *[0] * (10 - len(pad))]
    channels = amounts[6:8]
    if any(amounts[8:]):
        raise refuse("pad", "it pads the batch")
    if not any(amounts):  # a copy, as torch makes it
        return ShardedVolume(input.local.clone(), input.placement, input.space)
    around = {dim: (amounts[2 * (4 - dim)], amounts[2 * (4 - dim) + 1]) for dim in (2, 3, 4)}
    if mode not in ("constant", "replicate") and any(any(around[cut.dim]) for cut in input.placement.cuts):
        raise refuse("pad", f"mode {mode!r} is not known along an axis that is cut")
    volume = input
    for dim, (before, after) in around.items():
        if before < 0 or after < 0:
            extent = volume.shape[dim]
            volume = crop(volume, dim, max(0, -before), extent - max(0, -after))
    local, missing, cuts = volume.local, [0] * 6, []
    extents = [n + sum(max(0, m) for m in around[dim]) for dim, n in zip((2, 3, 4), volume.shape[2:], strict=True)]
    cut_dims = {cut.dim: cut for cut in volume.placement.cuts}
    for dim in (2, 3, 4):
        before, after = (max(0, m) for m in around[dim])
        if dim in cut_dims:
            cut = cut_dims[dim]
            cuts.append(cut.with_bounds((0, *(bound + before for bound in cut.bounds[1:-1]), extents[dim - 2])))
            here = volume.space.coordinate[cut.axis]
            before, after = before * (here == 0), after * (here == len(cut.slabs) - 1)
        missing[2 * (4 - dim) : 2 * (4 - dim) + 2] = before, after
    if any(missing) or any(channels):
        local = F.pad(local, [*missing, *channels] if any(channels) else missing, mode, value)
    return settled(local, extents, sorted(cuts, key=lambda cut: cut.axis), volume)


@rule(Tensor.__getitem__)
def getitem(input: ShardedVolume, index: Any) -> ShardedVolume:
    """Slices along any axis, in steps of one over space."""
    keys = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in keys:
        place = keys.index(Ellipsis)
        keys[place : place + 1] = [slice(None)] * (5 - len(keys) + 1)
    keys += [slice(None)] * (5 - len(keys))
    if len(keys) != 5 or not all(isinstance(key, slice) for key in keys):
        raise refuse("indexing", "what it makes is no (B, C, D, H, W) volume; take slices")
    volume = input
    for dim, key in enumerate(keys[2:], 2):
        begin, end, step = key.indices(volume.shape[dim])
        if step != 1 or end <= begin:
            raise refuse("indexing", "it takes steps over space, or nothing")
        volume = crop(volume, dim, begin, end)
    if any(key != slice(None) for key in keys[:2]):
        part = ShardedVolume(volume.local[tuple(keys[:2])], volume.placement, volume.space)
        part.stands_for_view = volume.stands_for_view
        return part
    return volume


def crop(volume: ShardedVolume, dim: int, begin: int, end: int) -> ShardedVolume:
    """The planes begin … end - 1 along one axis, shared evenly again."""
    if (begin, end) == (0, volume.shape[dim]):
        return volume
    extents = list(volume.placement.extents)
    extents[dim - 2] = end - begin
    depth, height, width = extents
    cut = next((cut for cut in volume.placement.cuts if cut.dim == dim), None)
    if cut is None:
        local = volume.local.narrow(dim, begin, end - begin)
        return ShardedVolume(local, Layout((depth, height, width), volume.placement.cuts), volume.space)
    bounds = even_bounds(end - begin, len(cut.slabs))
    made = cut.with_bounds(bounds)
    if made.thinnest < 1:
        cropped = crop(volume.gathered(), dim, begin, end)
    else:
        local = collect(volume.local, volume.space, cut, [(a + begin, b + begin) for a, b in made.slabs])
        cuts = tuple(made if other == cut else other for other in volume.placement.cuts)
        cropped = ShardedVolume(local, Layout((depth, height, width), cuts), volume.space)
    cropped.stands_for_view = True
    return cropped
