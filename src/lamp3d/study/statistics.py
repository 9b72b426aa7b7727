"""Means over seeds, intervals over patients.

A row's score is the mean over organs of the mean over patients, as in `lamp3d.evaluate`, averaged over seeds. How far
it would move with other patients is found by drawing patients anew, with replacement: patients, not organs or seeds,
are what a study wants to speak of.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lamp3d.study.result import RunResult

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


def scores(runs: Sequence[RunResult], score: Score) -> NDArray[np.float64]:
    """(seeds, patients, organs) of one row; NaN where an organ is not annotated or has no such score.

    All runs must have scored the same patients.
    """
    names = [case.name for case in runs[0].cases]
    table = np.full((len(runs), len(names), len(runs[0].organs)), np.nan)
    for seed, run in enumerate(runs):
        cases = {case.name: case for case in run.cases}
        assert sorted(cases) == sorted(names), "runs of one study score one split"
        for patient, name in enumerate(names):
            for organ, organ_name in enumerate(run.organs):
                found = cases[name].organs.get(organ_name)
                value = None if found is None else getattr(found, score)
                table[seed, patient, organ] = np.nan if value is None else value
    return table


def estimate(table: NDArray[np.float64], resamples: int = RESAMPLES) -> Estimate:
    """Of (seeds, patients, organs)."""
    seeds = np.array([_mean(of_seed) for of_seed in table])
    known = seeds[~np.isnan(seeds)]
    if not len(known):
        return Estimate(None, None, None, None)
    drawn = [_mean(table[:, patients]) for patients in _draws(table.shape[1], resamples)]
    low, high = np.nanquantile(drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    deviation = float(known.std(ddof=1)) if len(known) > 1 else None
    return Estimate(float(known.mean()), deviation, float(low), float(high))


def difference(table: NDArray[np.float64], control: NDArray[np.float64], resamples: int = RESAMPLES) -> Estimate:
    """Of a row to its control: the same patients are drawn for both."""
    assert table.shape[1:] == control.shape[1:]
    drawn = [_mean(table[:, patients]) - _mean(control[:, patients]) for patients in _draws(table.shape[1], resamples)]
    low, high = np.nanquantile(drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Estimate(_mean(table) - _mean(control), None, float(low), float(high))


def _draws(patients: int, resamples: int) -> NDArray[np.int64]:
    return np.random.default_rng(_SEED).integers(0, patients, (resamples, patients))


def _mean(table: NDArray[np.float64]) -> float:
    """Over organs of the means over patients (and seeds)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an organ that no patient of a draw has
        by_organ = np.nanmean(table.reshape(-1, table.shape[-1]), axis=0)
        return float(np.nanmean(by_organ))
