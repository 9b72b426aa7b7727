"""Where a changed sample looks in its scan: flips and turns undone, rotation, scaling and elastic deformation.

Each function also serves a part of a sample, so that a process reads no more of a scan than its own part needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor
from torch.nn import functional

from lamp3d.data.augment import Change, Region


def source_box(
    centre: Sequence[float],
    size: Sequence[int],
    shape: Sequence[int],
    matrix: npt.NDArray[np.float64],
    margin: npt.ArrayLike = 0.0,
) -> Region:
    """The part of a scan that a rotated, scaled and deformed sample looks at.

    Args:
        centre: where the middle of the sample looks, in the scan's voxels.
        size: (D, H, W) of the sample.
        shape: (D, H, W) of the scan; the part is clamped to it and never empty.
        matrix: (3, 3), offset from the sample's centre in voxels -> offset in the scan in voxels.
        margin: how far its voxels may be shifted along each axis before that, in voxels.
    """
    middle = np.asarray(centre)
    reach = np.abs(matrix) @ ((np.asarray(size) - 1) / 2 + np.asarray(margin))
    low = np.clip(np.floor(middle - reach).astype(int), 0, np.asarray(shape) - 1)
    high = np.clip(np.ceil(middle + reach).astype(int) + 1, low + 1, shape)
    d, h, w = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return d, h, w


def sampling_grid(
    centre: Sequence[float],
    size: Sequence[int],
    box: Sequence[slice],
    matrix: npt.NDArray[np.float64],
    shifts: Tensor | None = None,
) -> Tensor:
    """Where each voxel of a rotated, scaled and deformed sample looks in its `source_box`, for ``grid_sample``.

    Args:
        centre: where the middle of the sample looks, in the scan's voxels.
        size: (D, H, W) of the sample.
        box: the part of the scan that was read.
        matrix: (3, 3), offset from the middle in voxels -> offset in the scan in voxels.
        shifts: (3, D, H, W), added to the offsets before that, in voxels.

    Returns:
        (1, D, H, W, 3) float32, in ``grid_sample``'s units with ``align_corners=False``.
    """
    size_out = np.asarray(size)
    size_in = np.array([part.stop - part.start for part in box])
    middle = np.asarray(centre) - [part.start for part in box]
    # A unit of grid_sample is half the volume's width, and its last axis comes first.
    theta = np.empty((3, 4))
    theta[:, :3] = (matrix * size_out[None, :] / size_in[:, None])[::-1, ::-1]
    theta[:, 3] = ((2 * middle + 1) / size_in - 1)[::-1]
    grid = functional.affine_grid(torch.from_numpy(theta)[None].float(), [1, 1, *size], align_corners=False)
    if shifts is not None:
        units = torch.from_numpy((2 * matrix / size_in[:, None])[::-1].copy()).float()
        grid += torch.einsum("ij,jdhw->dhwi", units, shifts)
    return grid


def elastic_shifts(
    nodes_mm: npt.NDArray[np.float64], node_spacing_mm: float, offsets_mm: Sequence[npt.NDArray[np.float64]]
) -> Tensor:
    """The smooth shift of each voxel: the cubic B-spline of a lattice of control points that repeats periodically.

    Args:
        nodes_mm: (3, N, N, N), the control points' shifts along each axis; no voxel shifts further than the largest.
        node_spacing_mm: their distance.
        offsets_mm: where the voxels lie along each axis, from the sample's centre.

    Returns:
        (3, D, H, W) float32 in mm.
    """
    shifts = torch.from_numpy(nodes_mm).float()
    nodes = np.eye(nodes_mm.shape[-1])
    for axis, offsets in enumerate(offsets_mm, start=1):
        # A control point's share in each voxel; the spline is a product over the axes, so one after the other will do.
        place = [offsets / node_spacing_mm]
        shares = [map_coordinates(node, place, order=3, mode="grid-wrap", prefilter=False) for node in nodes]
        weights = torch.from_numpy(np.stack(shares, axis=1)).float()
        shifts = torch.tensordot(weights, shifts, dims=([1], [axis])).movedim(0, axis)
    return shifts


def turned(part: Tensor, change: Change, size: Sequence[int]) -> Tensor:
    """Mirror a part (1, d, h, w) of a sample of some size (D, H, W), and turn it in the axial plane."""
    if change.flips:
        part = part.flip([1 + axis for axis in change.flips])
    turns = _turns(change, size)
    return torch.rot90(part, turns, (1, 2)) if turns else part


def _turns(change: Change, size: Sequence[int]) -> int:
    if change.quarter_turns and size[0] != size[1]:
        return 2  # a quarter turn would change the shape
    return change.quarter_turns


def unturned(region: Region, size: Sequence[int], change: Change) -> Region:
    """From which part of a sample of this size :func:`turned` makes a part of what it makes."""
    depth, height, width = region
    for turn in range(_turns(change, size)):  # undo one: rows become columns, counted from the other end
        extent = size[turn % 2]
        depth, height = height, slice(extent - depth.stop, extent - depth.start)
    parts = [depth, height, width]
    for axis in change.flips:
        parts[axis] = slice(size[axis] - parts[axis].stop, size[axis] - parts[axis].start)
    depth, height, width = parts
    return depth, height, width
