"""Means over seeds, intervals over patients.

A score is the mean over organs of the mean over patients, as in `lamp3d.evaluate`, averaged over seeds where a network
was trained several times. How far it would move with other patients is found by drawing patients anew, with
replacement (bootstrap): patients, not organs or seeds, are what an evaluation wants to speak of.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lamp3d.errors import ConfigError
from lamp3d.evaluate import CaseResult

Score = Literal["dice", "hd95_mm", "surface_dice"]
RESAMPLES = 2000
COVERAGE = 0.95
_SEED = 2020


@dataclass(frozen=True)
class Estimate:
    """A mean, its spread over seeds, and its interval over patients; None: there is nothing to tell it from.

    Attributes:
        mean: over seeds, patients and maybe organs.
        deviation: of the seeds' means, n - 1 in the denominator.
        low, high: the middle 95 % of what other draws of patients give.
    """

    mean: float | None
    deviation: float | None
    low: float | None
    high: float | None


def scores(runs: Sequence[Sequence[CaseResult]], organs: Sequence[str], score: Score) -> NDArray[np.float64]:
    """The cases' scores in one table.

    Args:
        runs: of every seed the cases, in any order.
        organs: columns of the table.
        score: which one.

    Returns:
        (seeds, patients, organs); NaN where an organ is not annotated or has no such score.

    Raises:
        ConfigError: the runs have not scored the same patients.
    """
    names = [case.name for case in runs[0]]
    table = np.full((len(runs), len(names), len(organs)), np.nan)
    for seed, cases in enumerate(runs):
        by_name = {case.name: case for case in cases}
        if differing := sorted(set(names) ^ set(by_name)):
            raise ConfigError(
                f"runs that are compared have scored different cases ({', '.join(differing[:3])}); "
                "evaluate all of them on the same split of the same dataset."
            )
        for patient, name in enumerate(names):
            for column, organ in enumerate(organs):
                found = by_name[name].organs.get(organ)
                value = None if found is None else getattr(found, score)
                table[seed, patient, column] = np.nan if value is None else value
    return table


def spread(table: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """Of (seeds, patients, organs): the mean, and the standard deviation of the seeds' means."""
    means = _of_seeds(table)
    known = means[~np.isnan(means)]
    mean = float(known.mean()) if len(known) else None
    return mean, float(known.std(ddof=1)) if len(known) > 1 else None


def estimate(table: NDArray[np.float64]) -> Estimate:
    """Of (seeds, patients, organs)."""
    mean, deviation = spread(table)
    if mean is None:
        return Estimate(None, None, None, None)
    return Estimate(mean, deviation, *_middle(_of_draws(table), _patients(table)))


def difference(table: NDArray[np.float64], control: NDArray[np.float64]) -> Estimate:
    """Of a row to its control: the same patients are drawn for both."""
    assert table.shape[1:] == control.shape[1:]
    (mean, _), (of_control, _) = spread(table), spread(control)
    if mean is None or of_control is None:
        return Estimate(None, None, None, None)
    drawn, patients = _of_draws(table) - _of_draws(control), min(_patients(table), _patients(control))
    return Estimate(mean - of_control, None, *_middle(drawn, patients))


def _patients(table: NDArray[np.float64]) -> int:
    """How many have a score."""
    return int(np.count_nonzero(~np.isnan(table).all(axis=(0, 2))))


def _middle(drawn: NDArray[np.float64], patients: int) -> tuple[float | None, float | None]:
    if patients < 2:
        return None, None  # all draws are alike
    low, high = np.nanquantile(drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def _of_draws(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over seeds, of every draw of patients."""
    patients = table.shape[1]
    draws = np.random.default_rng(_SEED).integers(0, patients, (RESAMPLES, patients))
    return _mean(_of_seeds(table[:, draws]), axis=0)


def _of_seeds(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of (seeds, ..., patients, organs) every seed's mean over organs of the means over patients."""
    return _mean(_mean(table, axis=-2), axis=-1)


def _mean(table: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an organ that no patient of a draw has
        means: NDArray[np.float64] = np.nanmean(table, axis=axis)
    return means
