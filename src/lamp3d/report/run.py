"""What a run folder holds, read for the report; every part may be missing while a run is young."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lamp3d.errors import ConfigError
from lamp3d.evaluate import Results
from lamp3d.plan import Plan


class Epoch(BaseModel):
    """One line of ``history.jsonl``."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    stage: int
    epoch: int
    loss: float | None = None
    seconds_per_step: float | None = None
    peak_bytes: tuple[int, ...] = ()
    bad_steps: int = 0
    dice: dict[str, float | None] = Field(default_factory=dict)

    @field_validator("dice", mode="before")
    @classmethod
    def _no_value_is_none(cls, dice: dict[str, float | None] | None) -> dict[str, float | None]:
        return {organ: None if v is None or math.isnan(v) else v for organ, v in (dice or {}).items()}

    @property
    def mean_dice(self) -> float | None:
        """The mean over the organs that have a Dice; None in an epoch without validation."""
        values = [value for value in self.dice.values() if value is not None]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Run:
    """The contents of a run folder.

    Attributes:
        folder: where it is.
        history: the epochs trained, in order.
        plans: the plan of every curriculum stage.
        results: the evaluation, or None before there is one.
        config: the resolved configuration, as it is in ``config.yaml``.
        versions: versions and seeds, as they are in ``versions.json``.
    """

    folder: Path
    history: tuple[Epoch, ...]
    plans: tuple[Plan, ...]
    results: Results | None
    config: dict[str, Any]
    versions: dict[str, Any]


def read_run(folder: Path) -> Run:
    """Reads a run folder.

    Raises:
        ConfigError: if it is no folder, holds nothing to report, or a file in it is damaged.
    """
    results_path = folder / "results.json"
    run = Run(
        folder=folder,
        history=_history(folder / "history.jsonl"),
        plans=tuple(Plan.load(path) for path in sorted((folder / "plans").glob("stage-*.json"), key=_stage_number)),
        results=Results.load(results_path) if results_path.exists() else None,
        config=_mapping(folder / "config.yaml"),
        versions=_mapping(folder / "versions.json"),
    )
    if not run.history and run.results is None:
        raise ConfigError(
            f"{folder} has neither history.jsonl nor results.json: give the folder of a run that has begun"
        )
    return run


def _history(path: Path) -> tuple[Epoch, ...]:
    if not path.exists():
        return ()
    try:
        return tuple(Epoch.model_validate(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines())
    except (json.JSONDecodeError, ValidationError) as error:
        raise ConfigError(f"{path} holds a line that is no epoch of a run ({error}): delete that line") from error


def _mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file (JSON is YAML) that holds a mapping; empty when it is absent."""
    if not path.exists():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} cannot be read ({error}): restore it from the run's start") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, not a mapping: restore it from the run's start")
    return content


def _stage_number(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0
