"""What every configuration has in common: YAML, known keys, finite numbers, and truth that is no number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from lamp3d.errors import ConfigError


def parse_yaml(text: str | bytes, where: object) -> Any:
    """What some YAML says.

    Args:
        text: as it was read.
        where: what messages call it.

    Raises:
        ConfigError: it is no YAML; in one line, with its place.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{where} is not valid YAML: {place}{problem}.") from error


@contextmanager
def told_with_its_key() -> Iterator[None]:
    """Within a validator: what lamp3d finds wrong is told like what pydantic does, with its file and key."""
    try:
        yield
    except ConfigError as error:
        raise ValueError(str(error)) from error


class Settings(BaseModel):
    """A part of a configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1, in Python's manner; who writes it means something else."""
        assert info.field_name is not None
        if _holds_truth(value) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("true and false are no values of this setting")
        return value


def _holds_truth(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_truth, value)))
