"""Solid shapes as signed distance functions, and a canvas to paint them on: what the phantom is made of.

A signed distance is in mm, negative inside. Points are arrays (3, D, H, W) in mm.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Field = npt.NDArray[np.float32]
Point = Sequence[float] | npt.NDArray[np.float64]


def ellipsoid(points: Field, centre: Point, radii: Point) -> Field:
    """Distance to an ellipsoid with axes along x, y, z (first-order, exact on its surface)."""
    inverse = 1 / np.asarray(radii, np.float32)
    offset = (points - np.asarray(centre, np.float32)[:, None, None, None]) * inverse[:, None, None, None]
    offset *= offset
    tiny = np.float32(1e-12)  # so that the centre itself, 0 / 0, lies inside
    scaled = offset.sum(0) + tiny
    steeper = np.tensordot(inverse**2, offset, 1) + tiny * inverse.min() ** 2
    norm = np.sqrt(scaled)
    distance: Field = norm * (norm - 1) / np.sqrt(steeper)
    return distance


def tube(points: Field, path: Sequence[Point], radius: float, stretch: Point = (1, 1, 1)) -> Field:
    """Distance to a round tube along a path of straight pieces.

    Args:
        points: where.
        path: corner points in mm.
        radius: of the tube in mm.
        stretch: factors along x, y, z on the tube's cross-section, which makes it oval.
    """
    factors = np.asarray(stretch, np.float32)
    squeezed = points / factors[:, None, None, None]
    corners = [np.asarray(corner, np.float32) / factors for corner in path]
    nearest: Field | None = None
    for start, end in pairwise(corners):
        along = end - start
        offset = squeezed - start[:, None, None, None]
        length2 = np.float32(along @ along)
        place = np.tensordot(along / length2, offset, 1)
        nearby = np.clip(place, 0, 1)
        # |offset - nearby * along|², multiplied out: a third of the passes over the volume
        squared: Field = np.einsum("axyz,axyz->xyz", offset, offset) + length2 * nearby * (nearby - 2 * place)
        nearest = squared if nearest is None else np.minimum(nearest, squared)
    assert nearest is not None, "a path has at least two points"
    distance: Field = np.sqrt(np.maximum(nearest, 0)) - np.float32(radius)
    return distance


def blend(shapes: Sequence[Field], width_mm: float) -> Field:
    """Union of shapes with rounded joints."""
    total = shapes[0]
    width = np.float32(width_mm)
    for shape in shapes[1:]:
        mix = np.clip(np.float32(0.5) + (shape - total) / (2 * width), 0, 1)
        total = shape + (total - shape) * mix - width * mix * (1 - mix)
    return total


def smooth_field(rng: np.random.Generator, shape: Sequence[int], waves: int) -> Field:
    """A smooth random field (D, H, W) of unit standard deviation: a cosine series of ``waves`` half-waves an axis."""
    coefficients = rng.normal(size=(waves, waves, waves)).astype(np.float32)
    coefficients[0, 0, 0] = 0
    bases = []
    for n in shape:
        place = (np.arange(n, dtype=np.float32) + np.float32(0.5)) / n
        bases.append(np.cos(np.pi * place[:, None] * np.arange(waves, dtype=np.float32)))
    field = np.einsum("abc,za->zbc", coefficients, bases[0])
    field = np.einsum("zbc,yb->zyc", field, bases[1])
    field = np.einsum("zyc,xc->zyx", field, bases[2])
    unit: Field = (field / field.std()).astype(np.float32)
    return unit


class Canvas:
    """An image in HU and its label map, painted shape over shape.

    Args:
        points: (3, D, H, W) in mm, where each voxel's centre lies in the anatomy.
        spacing_mm: of the voxels; the border of a shape is as soft as a voxel is wide, as partial volume makes it.
    """

    def __init__(self, points: Field, spacing_mm: Sequence[float]) -> None:
        self.points = points
        self.image = np.full(points.shape[1:], -1000, np.float32)
        self.label = np.zeros(points.shape[1:], np.uint8)
        self.where: tuple[slice, ...] = (slice(None),) * 3
        self._spacing_mm = spacing_mm
        self._voxel_mm = np.float32(np.mean(spacing_mm))

    def window(self, centre: Point, reach_mm: Point) -> Canvas:
        """The part of the canvas, shared with it, in which to paint shapes that reach no farther from a centre.

        Its ``where`` holds the slices that cut other (D, H, W) fields to the same part.
        """
        step = 3  # a coarse look at where the anatomy lies is enough
        reach = [mm + step * max(self._spacing_mm) for mm in reach_mm]
        coarse = self.points[:, ::step, ::step, ::step]
        inside = np.ones(coarse.shape[1:], bool)
        for axis in range(3):
            inside &= np.abs(coarse[axis] - np.float32(centre[axis])) <= reach[axis]
        bounds = [np.flatnonzero(inside.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
        part = copy.copy(self)
        part.where = tuple(slice(step * at[0], step * at[-1] + 1) if len(at) else slice(0) for at in bounds)
        part.points = self.points[(slice(None), *part.where)]
        part.image, part.label = self.image[part.where], self.label[part.where]
        return part

    def paint(self, shape: Field, hu: float | Field, organ: int = 0) -> None:
        """Fill a shape with an intensity, and with a label when it is an organ; other labels it covers are lost."""
        cover = np.clip(np.float32(0.5) - shape / self._voxel_mm, 0, 1)
        self.image += cover * (np.asarray(hu, np.float32) - self.image)
        self.label[shape < 0] = organ

    def paint_around_organs(self, shape: Field, hu: float | Field) -> None:
        """Fill a shape but for the organs that are there already."""
        self.paint(np.where(self.label != 0, np.float32(np.inf), shape), hu)
