"""What a study keeps of every run: one small JSON file each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from lamp3d.errors import ConfigError
from lamp3d.evaluate import CaseResult
from lamp3d.files import write_text
from lamp3d.intervals import Score, scores
from lamp3d.study.config import StudyConfig, run_name

Kind = TypeVar("Kind", bound="_OfRow")


class PredictionTimes(BaseModel):
    """Predictions of the same scans in one way.

    Attributes:
        window: "whole", or the sides of the sliding window.
        devices: workers.
        seconds: of every scan, reading and writing included; the first scan, which warms up, is left out.
        peak_bytes: the most that any of the workers held.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    window: str
    devices: int
    seconds: tuple[float, ...]
    peak_bytes: int


class _OfRow(BaseModel):
    """What is kept of a row, in a file of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    row: str
    network: str
    input: str

    def save(self, path: Path) -> None:
        """Write it, all or nothing."""
        write_text(path, self.model_dump_json(indent=1) + "\n")


class RunResult(_OfRow):
    """One run.

    Attributes:
        row, network, input, seed: which it is.
        control_of: the row that it is a control of.
        split: that was scored.
        config: the resolved experiment configuration.
        versions: of the software, and of the machine.
        commit: of the checkout, if it was one.
        parameters: of the network.
        steps: of the optimizer; ``bad_steps`` of them changed nothing.
        voxels: that it has seen, padding not counted.
        train_seconds: of the steps, validation not included.
        best_epoch, best_dice: on the validation split, which chose the weights.
        organs: in the order of their labels.
        cases: the scores of every case.
    """

    seed: int
    control_of: str | None
    split: str
    config: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    parameters: int
    steps: int
    bad_steps: int
    voxels: int
    train_seconds: float
    best_epoch: int | None
    best_dice: float | None
    organs: tuple[str, ...]
    cases: tuple[CaseResult, ...]

    @property
    def name(self) -> str:
        """What its files are called."""
        return run_name(self.row, self.seed)


class RowTimings(_OfRow):
    """How long the predictions of a row's network take.

    Attributes:
        row, network, input: which it is.
        device: what they ran on.
        timings: one a way to predict.
    """

    device: str
    timings: tuple[PredictionTimes, ...]


def read_results(folder: Path) -> list[RunResult]:
    """All results in a folder, by row and seed.

    Raises:
        ConfigError: a file is not a result.
    """
    results = [_read(path, RunResult) for path in folder.glob("*.json")]
    return sorted(results, key=lambda result: (result.row, result.seed))


def read_timings(folder: Path) -> list[RowTimings]:
    """The timings of all rows in a folder.

    Raises:
        ConfigError: a file holds none.
    """
    return [_read(path, RowTimings) for path in sorted(folder.glob("*.json"))]


def _read(path: Path, kind: type[Kind]) -> Kind:
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(f"{path} is not a result of this version: {error}") from error


def unfinished(study: StudyConfig, results: Sequence[RunResult]) -> list[str]:
    """Names of the runs that have no result."""
    there = {result.name for result in results}
    return [name for row, seed in study.runs() if (name := run_name(row.name, seed)) not in there]


def by_row(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """The runs of every row, in the order of first appearance."""
    rows: dict[str, list[RunResult]] = {}
    for result in results:
        rows.setdefault(result.row, []).append(result)
    return rows


def scores_of(runs: Sequence[RunResult], score: Score) -> NDArray[np.float64]:
    """(seeds, patients, organs) of one row; NaN where an organ is not annotated or has no such score.

    Raises:
        ConfigError: the runs have not scored the same patients.
    """
    return scores([run.cases for run in runs], runs[0].organs, score)
