"""What a study compares: rows, each one experiment with several seeds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, field_validator, model_validator

from lamp3d.errors import ConfigError
from lamp3d.experiment import ExperimentConfig
from lamp3d.experiment.config import parse_config
from lamp3d.explain import explained
from lamp3d.settings import Settings, parse_yaml

Window = tuple[PositiveInt, PositiveInt, PositiveInt]


class Row(Settings):
    """One experiment.

    Args:
        name: of its files.
        network, input: what tables call them; rows of one network stand together.
        settings: keys of the experiment configuration, such as ``network.filters``, and what they are in this row.
        seeds: of the runs; None: the study's.
        window: sides of the sliding window that it is evaluated with; None: as its settings say (``predict.window``).
        windows: of sliding-window predictions that are timed; None: the study's.
        control_of: another row's name: the two have seen the same number of voxels, and are compared in pairs.
    """

    name: str
    network: str
    input: str
    settings: dict[str, Any] = Field(default={})
    seeds: tuple[NonNegativeInt, ...] | None = None
    window: Window | None = None
    windows: tuple[Window, ...] | None = None
    control_of: str | None = None

    @field_validator("name")
    @classmethod
    def _is_of_files(cls, name: str) -> str:
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"files are named by {name!r}; take letters, digits, -, _ and . for it")
        return name


class StudyConfig(Settings):
    """A study.

    Args:
        title: of its report.
        base: the experiment configuration that rows change, relative to the study's file.
        rows: what is compared.
        seeds: of every row that names none.
        windows: of sliding-window predictions that are timed beside whole volumes, for every row that names none.
        timed_devices: numbers of devices that predictions are timed on.
        timed_cases: of the validation split that are predicted for that, the first ones.
        tolerance_mm: of the surface Dice.
    """

    title: str
    base: Path
    rows: tuple[Row, ...] = Field(min_length=1)
    seeds: tuple[NonNegativeInt, ...] = (0,)
    windows: tuple[Window, ...] = ()
    timed_devices: tuple[PositiveInt, ...] = (1,)
    timed_cases: PositiveInt = 5
    tolerance_mm: float = Field(default=2.0, gt=0)

    @model_validator(mode="after")
    def _names_are_known(self) -> StudyConfig:
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise ValueError("two rows have one name")
        for row in self.rows:
            if row.control_of is not None and (row.control_of not in names or row.control_of == row.name):
                raise ValueError(f"{row.name} is a control of {row.control_of!r}, which is no other row")
        return self

    def runs(self) -> list[tuple[Row, int]]:
        """Every row with every seed: first all rows with their first seed, so that there is something to see early."""
        pairs = [(position, row, seed) for row in self.rows for position, seed in enumerate(row.seeds or self.seeds)]
        return [(row, seed) for _, row, seed in sorted(pairs, key=lambda pair: pair[0])]

    def windows_of(self, row: Row) -> tuple[Window, ...]:
        """The windows that a row's predictions are timed with."""
        return self.windows if row.windows is None else row.windows


def run_name(row: str, seed: int) -> str:
    """What the files of a run are called."""
    return f"{row}-{seed}"


def saved_study(out: Path) -> StudyConfig:
    """The study whose results a folder holds.

    Raises:
        ConfigError: it holds none.
    """
    return read_saved(out)[0]


def read_saved(out: Path) -> tuple[StudyConfig, dict[str, Any]]:
    """The study whose results a folder holds, and the experiment configuration of every row that it has had, by name.

    Raises:
        ConfigError: it holds none.
    """
    path = out / "study.yaml"
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
        return StudyConfig.model_validate(content["study"]), dict(content["configs"])
    except FileNotFoundError:
        raise ConfigError(f"{out} holds no study (no study.yaml): give the --out of `lamp3d study run`.") from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path} is not what `lamp3d study run` leaves in its --out: give that folder, and to a study that is run "
            "one of its own, without the study's file in it."
        ) from None


def load_study(path: Path) -> tuple[StudyConfig, dict[str, ExperimentConfig]]:
    """Read a study, and the experiment configuration of every row (with the seed 0).

    Raises:
        ConfigError: a file is absent or not YAML, or a key or a value is not known; the message names the row.
    """
    try:
        content = parse_yaml(path.read_bytes(), path) or {}
        study = StudyConfig.model_validate(content)
    except FileNotFoundError:
        raise ConfigError(f"no study at {path}; experiments/openkbp/study.yaml is one to start from.") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {explained(error, StudyConfig, content)}") from error
    base = path.parent / study.base
    if not base.exists():
        raise ConfigError(f"{path}: no configuration at {base}; `base` is relative to the study's file.")
    text = base.read_bytes()
    configs = {}
    for row in study.rows:
        changes = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in row.settings.items()]
        configs[row.name] = parse_config(text, f"{path}, row {row.name}", changes)
    return study, configs
