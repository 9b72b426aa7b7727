"""Random changes of a training sample: flips, rotation and scaling, elastic deformation, quarter turns, intensities.

What happens to a sample is drawn first (`draw_change`), then applied while it is read. So image and label map undergo
the same change even when they are read by different processes, each from the same seed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator, model_validator
from scipy.spatial.transform import Rotation
from torch import Tensor

from lamp3d.errors import ConfigError
from lamp3d.settings import Settings

LEFT_RIGHT_AXIS = 0  # of a scan in RAS orientation
ELASTIC_NODES = 8  # along each axis, then the same ones again: far enough apart that nobody sees it
LARGEST_ELASTIC = 0.4  # of the nodes' distance: a cubic B-spline of smaller shifts never folds (Choi and Lee, 2000)
_SIDED = re.compile(r"left|right|(^|[\s_.-])(l|r|lt|rt)([\s_.-]|$)", re.IGNORECASE)
_SIDE_AT_AN_END = re.compile(r"^[lr]|[lr]t?$", re.IGNORECASE)

Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class AugmentConfig(Settings):
    """Which random changes training samples undergo; the defaults suit organs that have a left and a right twin.

    Args:
        flip_axes: axes (of RAS: 0 left-right, 1 back-front, 2 feet-head) that may be mirrored, each on its own.
        flip_probability: of each of these.
        paired_labels: organs that swap names in a left-right flip, e.g. ``[["ParotidLeft", "ParotidRight"]]``.
        affine_probability: of a rotation and scaling, done in mm, whatever the voxels' shape.
        rotate_degrees: largest angle of the rotation, about an axis drawn at random.
        scale: smallest and largest magnification.
        elastic_probability: of a smooth random deformation, done in mm (paper §3: head and neck, as in AnatomyNet).
        elastic_mm: largest shift along each axis of the control points that it is made from; their cubic B-spline
            shifts less in between.
        elastic_spacing_mm: distance of the control points.
        rotate90_probability: of a turn by 90, 180 or 270 degrees in the axial plane (paper §3, liver); 180 alone where
            the sample is not square.
        blur_probability: of a Gaussian blur.
        blur_sigma: its smallest and largest standard deviation, in voxels.
        coarse_probability: of an image as if it were scanned at half the resolution along one axis or more.
        gamma_probability: of a gamma correction, image ** gamma.
        gamma: smallest and largest.
        intensity_probability: of a change of brightness and contrast.
        intensity_shift: largest brightness change, of an image in [0, 1].
        intensity_scale: largest relative contrast change.
        noise_probability: of noise.
        noise: amplitude a of noise that is uniform in [-a, a] (paper §3: 0.2 for liver), or the largest standard
            deviation of Gaussian noise.
        noise_kind: "uniform" or "gaussian".
    """

    flip_axes: tuple[Literal[0, 1, 2], ...] = ()
    flip_probability: Probability = 0.5
    paired_labels: tuple[tuple[str, str], ...] = ()
    affine_probability: Probability = 0.5
    rotate_degrees: float = Field(default=10.0, ge=0, le=180)
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.9, 1.1)
    elastic_probability: Probability = 0.0
    elastic_mm: float = Field(default=6.0, ge=0)
    elastic_spacing_mm: float = Field(default=32.0, gt=0)
    rotate90_probability: Probability = 0.0
    blur_probability: Probability = 0.0
    blur_sigma: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 1.0)
    coarse_probability: Probability = 0.0
    gamma_probability: Probability = 0.0
    gamma: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.7, 1.5)
    intensity_probability: Probability = 0.5
    intensity_shift: Fraction = 0.05
    intensity_scale: Fraction = 0.1
    noise_probability: Probability = 0.5
    noise: Fraction = 0.05
    noise_kind: Literal["uniform", "gaussian"] = "uniform"

    @field_validator("flip_axes")
    @classmethod
    def _once_each(cls, axes: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(axes)) < len(axes):
            raise ValueError("should name each axis once")
        return axes

    @model_validator(mode="after")
    def _ranges_rise(self) -> AugmentConfig:
        for name in ("scale", "blur_sigma", "gamma"):
            smallest, largest = getattr(self, name)
            if smallest > largest:
                raise ValueError(f"{name} {(smallest, largest)} must be (smallest, largest)")
        return self

    @model_validator(mode="after")
    def _never_folds(self) -> AugmentConfig:
        limit = LARGEST_ELASTIC * self.elastic_spacing_mm
        if self.elastic_mm > limit:
            raise ValueError(
                f"elastic_mm {self.elastic_mm:g} could fold tissue onto itself; at most {limit:g} goes with "
                f"elastic_spacing_mm {self.elastic_spacing_mm:g}"
            )
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
        nodes_mm: (3, N, N, N), how far the control points of an elastic deformation shift along each axis; they repeat
            periodically, one lies in the sample's centre. The shift comes before the matrix. None: no deformation.
        node_spacing_mm: the control points' distance.
        sigma: of a Gaussian blur, in voxels; 0 is none.
        coarse: axes along which the resolution is halved.
        gamma: exponent of the image.
        gain: factor on the image.
        shift: added to the image after that.
        noise: amplitude of uniform noise, or standard deviation of Gaussian noise.
        noise_kind: which of the two.
    """

    flips: tuple[int, ...] = ()
    quarter_turns: int = 0
    matrix_mm: npt.NDArray[np.float64] | None = None
    nodes_mm: npt.NDArray[np.float64] | None = None
    node_spacing_mm: float = 1.0
    sigma: float = 0.0
    coarse: tuple[int, ...] = ()
    gamma: float = 1.0
    gain: float = 1.0
    shift: float = 0.0
    noise: float = 0.0
    noise_kind: Literal["uniform", "gaussian"] = "uniform"

    @property
    def resamples(self) -> bool:
        """Whether voxels look between the scan's voxels."""
        return self.matrix_mm is not None or self.nodes_mm is not None

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
    if config.noise_kind == "gaussian":
        noise *= rng.random()
    nodes_mm, node_spacing_mm = None, 1.0
    if rng.random() < config.elastic_probability:
        nodes_mm = rng.uniform(-config.elastic_mm, config.elastic_mm, (3, *[ELASTIC_NODES] * 3))
        node_spacing_mm = config.elastic_spacing_mm
    sigma = float(rng.uniform(*config.blur_sigma)) if rng.random() < config.blur_probability else 0.0
    coarse: tuple[int, ...] = ()
    if rng.random() < config.coarse_probability:
        coarse = tuple(sorted(int(axis) for axis in rng.permutation(3)[: rng.integers(1, 4)]))
    gamma = float(rng.uniform(*config.gamma)) if rng.random() < config.gamma_probability else 1.0
    return Change(
        flips=flips, quarter_turns=quarter_turns, matrix_mm=matrix_mm,
        nodes_mm=nodes_mm, node_spacing_mm=node_spacing_mm,
        sigma=sigma, coarse=coarse, gamma=gamma,
        gain=gain, shift=shift, noise=noise, noise_kind=config.noise_kind,
    )  # fmt: skip


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
    # Where a letter alone says it, as in ParotidL, it is a side if there is another organ that differs in that letter.
    stems = {organ: _SIDE_AT_AN_END.sub("", organ) for organ in organs}
    sided = Counter(stem for organ, stem in stems.items() if stem != organ)
    alone = [o for o in organs if o not in members and (_SIDED.search(o) or sided[stems[o]] > 1)]
    if alone and LEFT_RIGHT_AXIS in config.flip_axes and config.flip_probability > 0:
        raise ConfigError(
            f"flip_axes has {LEFT_RIGHT_AXIS}, the left-right axis, but {alone} have a side and no twin in "
            "paired_labels; add the pairs to paired_labels, or take the axis out of flip_axes"
        )
    return swap
