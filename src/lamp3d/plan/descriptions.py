"""Small YAML files that describe hardware: read, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lamp3d.errors import ConfigError
from lamp3d.explain import explained
from lamp3d.settings import parse_yaml

Description = TypeVar("Description", bound=BaseModel)


def read_description(path: Path) -> Mapping[str, Any]:
    """Names and values.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        content = parse_yaml(path.read_bytes(), path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no description: it should hold names and values.")
    return content


def checked(model: type[Description], content: Mapping[str, Any], where: str) -> Description:
    """What some names and values describe.

    Raises:
        ConfigError: they do not describe a ``model``.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(
            f"{where} does not describe a {model.__name__.lower()}: {explained(error, model, content)}"
        ) from error
