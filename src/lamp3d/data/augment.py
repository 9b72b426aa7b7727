"""Random changes of a training sample: flips, rotation and scaling, quarter turns, intensity and noise.

What happens to a sample is drawn first (`draw_change`), then applied while it is read. So image and label map undergo
the same change even when they are read by different processes, each from the same seed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional

from lamp3d.errors import ConfigError

LEFT_RIGHT_AXIS = 0  # of a scan in RAS orientation
_SIDED = re.compile(r"left|right|(^|_)[lr](_|$)", re.IGNORECASE)

Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class AugmentConfig(BaseModel):
    """Which random changes training samples undergo; the defaults suit organs that have a left and a right twin.

    Args:
        flip_axes: axes (of RAS: 0 left-right, 1 back-front, 2 feet-head) that may be mirrored, each on its own.
        flip_probability: of each of these.
        paired_labels: organs that swap names in a left-right flip, e.g. ``[["ParotidLeft", "ParotidRight"]]``.
        affine_probability: of a rotation and scaling, done in mm, whatever the voxels' shape.
        rotate_degrees: largest angle of the rotation, about an axis drawn at random.
        scale: smallest and largest magnification.
        rotate90_probability: of a turn by 90, 180 or 270 degrees in the axial plane (paper §3, liver); 180 alone where
            the sample is not square.
        intensity_probability: of a change of brightness and contrast.
        intensity_shift: largest brightness change, of an image in [0, 1].
        intensity_scale: largest relative contrast change.
        noise_probability: of noise.
        noise: amplitude a of noise that is uniform in [-a, a] (paper §3: 0.2 for liver).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    flip_axes: tuple[Literal[0, 1, 2], ...] = ()
    flip_probability: Probability = 0.5
    paired_labels: tuple[tuple[str, str], ...] = ()
    affine_probability: Probability = 0.5
    rotate_degrees: float = Field(default=10.0, ge=0, le=180)
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.9, 1.1)
    rotate90_probability: Probability = 0.0
    intensity_probability: Probability = 0.5
    intensity_shift: Fraction = 0.05
    intensity_scale: Fraction = 0.1
    noise_probability: Probability = 0.5
    noise: Fraction = 0.05

    @model_validator(mode="after")
    def _scale_rises(self) -> AugmentConfig:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale {self.scale} must be (smallest, largest)")
        return self

    @classmethod
    def off(cls) -> AugmentConfig:
        """No change at all."""
        return cls(affine_probability=0.0, rotate90_probability=0.0, intensity_probability=0.0, noise_probability=0.0)


Region = tuple[slice, slice, slice]
"""Part of a volume."""


@dataclass(frozen=True)
class Change:
    """What happens to one sample.

    Args:
        flips: axes to mirror.
        quarter_turns: in the axial plane, 0 to 3.
        matrix_mm: (3, 3), offset from the sample's centre in mm -> offset in the scan to read; None reads as it is.
        gain: factor on the image.
        shift: added to the image after that.
        noise: amplitude of uniform noise.
    """

    flips: tuple[int, ...] = ()
    quarter_turns: int = 0
    matrix_mm: npt.NDArray[np.float64] | None = None
    gain: float = 1.0
    shift: float = 0.0
    noise: float = 0.0

    @property
    def mirrors(self) -> bool:
        """Whether left becomes right."""
        return LEFT_RIGHT_AXIS in self.flips


def draw_change(config: AugmentConfig, rng: np.random.Generator) -> Change:
    """Draw what happens to one sample."""
    flips = tuple(axis for axis in config.flip_axes if rng.random() < config.flip_probability)
    matrix_mm = None
    if rng.random() < config.affine_probability:
        axis = rng.normal(size=3)
        angle = math.radians(rng.uniform(-config.rotate_degrees, config.rotate_degrees))
        magnification = math.exp(rng.uniform(math.log(config.scale[0]), math.log(config.scale[1])))
        matrix_mm = Rotation.from_rotvec(angle * axis / np.linalg.norm(axis)).as_matrix() / magnification
    quarter_turns = int(rng.integers(1, 4)) if rng.random() < config.rotate90_probability else 0
    gain, shift = 1.0, 0.0
    if rng.random() < config.intensity_probability:
        gain += rng.uniform(-config.intensity_scale, config.intensity_scale)
        shift += rng.uniform(-config.intensity_shift, config.intensity_shift)
    noise = config.noise if rng.random() < config.noise_probability else 0.0
    return Change(flips, quarter_turns, matrix_mm, gain, shift, noise)


def label_swap(config: AugmentConfig, organs: Sequence[str]) -> Tensor:
    """The label (n_classes,) int64 that every label becomes in a left-right flip.

    Raises:
        ConfigError: a pair names an unknown organ or one organ twice, or left-right flips are on while an organ whose
            name has a side is in no pair.
    """
    swap = torch.arange(1 + len(organs))
    members = [organ for pair in config.paired_labels for organ in pair]
    if unknown := sorted(set(members) - set(organs)):
        raise ConfigError(f"paired_labels: {unknown} are not among the organs {list(organs)}; spell them as those are")
    if len(set(members)) < len(members):
        raise ConfigError(f"paired_labels {list(config.paired_labels)}: an organ is in more than one place")
    for one, other in config.paired_labels:
        i, j = 1 + organs.index(one), 1 + organs.index(other)
        swap[i], swap[j] = j, i
    alone = [organ for organ in organs if _SIDED.search(organ) and organ not in members]
    if alone and LEFT_RIGHT_AXIS in config.flip_axes and config.flip_probability > 0:
        raise ConfigError(
            f"flip_axes has {LEFT_RIGHT_AXIS}, the left-right axis, but {alone} have a side and no twin in "
            "paired_labels; add the pairs to paired_labels, or take the axis out of flip_axes"
        )
    return swap


def source_box(
    centre: Sequence[float], size: Sequence[int], shape: Sequence[int], matrix: npt.NDArray[np.float64]
) -> tuple[slice, slice, slice]:
    """The part of a scan that a rotated and scaled sample looks at.

    Args:
        centre: where the middle of the sample looks, in the scan's voxels.
        size: (D, H, W) of the sample.
        shape: (D, H, W) of the scan; the part is clamped to it and never empty.
        matrix: (3, 3), offset from the sample's centre in voxels -> offset in the scan in voxels.
    """
    middle = np.asarray(centre)
    reach = np.abs(matrix) @ ((np.asarray(size) - 1) / 2)
    low = np.clip(np.floor(middle - reach).astype(int), 0, np.asarray(shape) - 1)
    high = np.clip(np.ceil(middle + reach).astype(int) + 1, low + 1, shape)
    d, h, w = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return d, h, w


def sampling_grid(
    centre: Sequence[float], size: Sequence[int], box: Sequence[slice], matrix: npt.NDArray[np.float64]
) -> Tensor:
    """Where each voxel of a rotated and scaled sample looks in its `source_box`, for ``grid_sample``.

    Args:
        centre: where the middle of the sample looks, in the scan's voxels.
        size: (D, H, W) of the sample.
        box: the part of the scan that was read.
        matrix: (3, 3), offset from the middle in voxels -> offset in the scan in voxels.

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
    return functional.affine_grid(torch.from_numpy(theta)[None].float(), [1, 1, *size], align_corners=False)


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


def recoloured(image: Tensor, change: Change, rng: np.random.Generator, region: Region, size: Sequence[int]) -> Tensor:
    """Change the intensities of a region (1, d, h, w) of an image (1, D, H, W), and add its part of the noise."""
    if change.gain != 1.0 or change.shift != 0.0:
        image = image * change.gain + change.shift
    if change.noise:
        uniform = torch.from_numpy(rng.random((1, *size), dtype=np.float32))[(slice(None), *region)]
        image = image + (2 * uniform - 1) * change.noise
    return image
