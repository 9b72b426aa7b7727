"""Scores of predicted label maps, on the scan's own grid and in millimetres.

Every score is taken organ by organ and case by case, over the organs that have contours in that case and no others.
Three numbers describe an organ: the Dice coefficient, the 95th percentile of the symmetric Hausdorff distance between
the two surfaces, and the surface Dice (the share of both surfaces, by area, that lies within a tolerance of the other).

What an absent organ is worth:

===============  ====================  ======  =======  ============
contour          prediction            Dice    HD95     surface Dice
===============  ====================  ======  =======  ============
not annotated    anything              (organ not listed)
empty            empty                 null    null     null
empty            not empty             0       null     0
not empty        empty (missed)        0       null     0
===============  ====================  ======  =======  ============

A distance to nothing has no value, so HD95 is null there; the summary counts such organs as ``missed``, which keeps
a network from looking good by the distances of the organs that it did find.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.ndimage
import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from torch import Tensor

from lamp3d.errors import DatasetError
from lamp3d.files import write_text
from lamp3d.scan import check_grid
from lamp3d.surfaces import surface_scores
from lamp3d.volume import Volume

DEFAULT_TOLERANCE_MM = 2.0

AT_ONCE = 1 << 24
"""Voxels that are counted at once, so that large scans take no more memory."""


class OrganScore(BaseModel):
    """The scores of one organ in one case; None (null in JSON) is a score that has no value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dice: float | None
    hd95_mm: float | None
    surface_dice: float | None


class CaseResult(BaseModel):
    """One case: the scores of its annotated organs, and what its prediction cost.

    ``seconds`` is the wall time of the prediction, ``peak_bytes`` the peak memory of each rank.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    organs: dict[str, OrganScore]
    seconds: float | None = None
    peak_bytes: tuple[int, ...] | None = None

    @property
    def mean_dice(self) -> float | None:
        """The mean Dice over the organs that have one."""
        return _mean([score.dice for score in self.organs.values()])


class Statistic(BaseModel):
    """The mean and the median of the ``n`` values that exist."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float | None
    median: float | None
    n: int


class OrganSummary(BaseModel):
    """One organ over all cases; ``missed`` counts the cases with Dice 0 and no distance, those of the table above."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dice: Statistic
    hd95_mm: Statistic
    surface_dice: Statistic
    missed: int


class Results(BaseModel):
    """What ``results.json`` holds.

    ``mean_dice`` is the mean over organs of each organ's mean Dice over cases, so that a rarely annotated organ
    weighs as much as any other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str
    mean_dice: float | None
    organs: dict[str, OrganSummary]
    cases: tuple[CaseResult, ...]
    settings: dict[str, JsonValue]

    def save(self, path: Path) -> None:
        """Writes the results as JSON, atomically; an existing file is replaced."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Reads the file that :meth:`save` wrote.

        Raises:
            DatasetError: if it is not there or is not such a file.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise DatasetError(f"{path} does not exist: run `lamp3d evaluate` first") from None
        except ValidationError as error:
            raise DatasetError(f"{path} is not a results file of this version ({error}): evaluate again") from error


def evaluate_case(
    prediction: Volume,
    truth: Volume,
    organs: Sequence[str],
    annotated: Collection[str],
    *,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
) -> dict[str, OrganScore]:
    """Scores one label map against the contours.

    Args:
        prediction: label map (D, H, W), 0 is background and k + 1 is ``organs[k]``.
        truth: the contours, on the same grid.
        organs: the names, in the order of the labels.
        annotated: the organs that have contours in this case; only these are scored.
        tolerance_mm: how far apart two surfaces may lie and still agree, for the surface Dice.

    Returns:
        The scores by organ, in the order of ``organs``.

    Raises:
        ScanError: if the two do not lie on one grid.
    """
    check_grid("the prediction", prediction.grid, "the contours", truth.grid)
    predicted, expected = _label_tensor(prediction), _label_tensor(truth)
    dice = _dice_of_labels(predicted, expected, 1 + len(organs))
    # One pass finds every organ's bounding box, in both maps.
    boxes_predicted = scipy.ndimage.find_objects(predicted.numpy(), max_label=len(organs))
    boxes_expected = scipy.ndimage.find_objects(expected.numpy(), max_label=len(organs))

    scores = {}
    for k, organ in enumerate(organs):
        if organ not in annotated:
            continue
        hd95_mm: float | None
        surface_dice: float | None
        boxes = [box for box in (boxes_predicted[k], boxes_expected[k]) if box is not None]
        if len(boxes) == 2:
            region = _joint_box(boxes[0], boxes[1])
            hd95_mm, surface_dice = surface_scores(
                predicted[region] == k + 1, expected[region] == k + 1, truth.spacing_mm, tolerance_mm
            )
        else:
            hd95_mm, surface_dice = None, (0.0 if boxes else None)
        scores[organ] = OrganScore(dice=_or_none(float(dice[k])), hd95_mm=hd95_mm, surface_dice=surface_dice)
    return scores


def dice_per_organ(logits: Tensor, labels: Tensor, annotated: Tensor) -> Tensor:
    """The Dice of each organ of one volume from the network's output: the quick score of validation during training.

    Args:
        logits: (1, C, D, H, W) or (C, D, H, W), any float type.
        labels: the volume's labels, (1, 1, D, H, W) or fewer leading ones, any integer type, 0 to C - 1.
        annotated: (C,) or (1, C) bool; entry 0, the background, is not used.

    Returns:
        (C - 1,) float64 on the logits' device; NaN where the organ is not annotated, or neither drawn nor predicted.
    """
    n_classes = logits.shape[-4]
    dice = _dice_of_labels(logits.argmax(dim=-4), labels.to(logits.device), n_classes)
    return dice.masked_fill(~annotated.reshape(-1)[1:].to(dice.device), math.nan)


def summarise(
    cases: Sequence[CaseResult],
    organs: Sequence[str],
    *,
    split: str,
    settings: Mapping[str, JsonValue] | None = None,
) -> Results:
    """Gathers the cases' scores into what ``results.json`` holds.

    Args:
        cases: the cases of one split.
        organs: every organ of the dataset; one that no case has contours for is listed with n = 0.
        split: the split's name.
        settings: how the predictions were made (checkpoint, window, devices, tolerance, ...), kept as it is.
    """
    summary = {}
    for organ in organs:
        scores = [case.organs[organ] for case in cases if organ in case.organs]
        summary[organ] = OrganSummary(
            dice=_statistic([score.dice for score in scores]),
            hd95_mm=_statistic([score.hd95_mm for score in scores]),
            surface_dice=_statistic([score.surface_dice for score in scores]),
            missed=sum(score.dice == 0 and score.hd95_mm is None for score in scores),
        )
    return Results(
        split=split,
        mean_dice=_mean([organ.dice.mean for organ in summary.values()]),
        organs=summary,
        cases=tuple(cases),
        settings=dict(settings or {}),
    )


def _dice_of_labels(predicted: Tensor, expected: Tensor, n_classes: int) -> Tensor:
    """2 |P and T| / (|P| + |T|) of every class but the background; NaN where both are empty.

    Counting labels once costs one pass over the volume, where a one-hot Dice costs one pass a class.
    """
    both = sizes = torch.zeros(n_classes, dtype=torch.int64, device=predicted.device)
    parts = (torch.split(labels.reshape(-1), AT_ONCE) for labels in (predicted, expected))
    for p, e in zip(*parts, strict=True):
        p, e = p.long(), e.long()
        both = both + torch.bincount(p[p == e], minlength=n_classes)
        sizes = sizes + torch.bincount(p, minlength=n_classes) + torch.bincount(e, minlength=n_classes)
    return (2 * both.double() / sizes)[1:n_classes]


def _label_tensor(volume: Volume) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(volume.data, dtype=np.int16))


def _joint_box(a: tuple[slice, ...], b: tuple[slice, ...]) -> tuple[slice, ...]:
    """The smallest box around two boxes."""
    return tuple(slice(min(s.start, t.start), max(s.stop, t.stop)) for s, t in zip(a, b, strict=True))


def _statistic(values: Sequence[float | None]) -> Statistic:
    present = [value for value in values if value is not None]
    return Statistic(mean=_mean(values), median=statistics.median(present) if present else None, n=len(present))


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return math.fsum(present) / len(present) if present else None


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
