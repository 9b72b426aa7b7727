"""What a run folder holds, read for the report; every part may be missing while a run is young."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lamp3d.errors import ConfigError
from lamp3d.evaluate import Results
from lamp3d.plan import Plan
from lamp3d.train import EpochRecord, read_history


@dataclass(frozen=True)
class RunFiles:
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
    history: tuple[EpochRecord, ...]
    plans: tuple[Plan, ...]
    results: Results | None
    config: dict[str, Any]
    versions: dict[str, Any]


def read_run(folder: Path) -> RunFiles:
    """Reads a run folder.

    Raises:
        ConfigError: if it is no folder, holds nothing to report, or a file in it is damaged.
    """
    results_path = folder / "results.json"
    run = RunFiles(
        folder=folder,
        history=_history(folder),
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


def _history(folder: Path) -> tuple[EpochRecord, ...]:
    try:
        return tuple(read_history(folder))
    except ValidationError as error:
        raise ConfigError(
            f"{folder / 'history.jsonl'} holds a line that is no epoch of a run ({error}): take that line out"
        ) from error


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
