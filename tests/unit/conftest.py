"""A small dataset on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_dataset import write_tiny_dataset

from lamp3d.data import Dataset, read_dataset


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Dataset]:
    """Writes a tiny dataset and reads it."""

    def make(**content: Any) -> Dataset:
        root = tmp_path / "tiny"
        write_tiny_dataset(root, **content)
        return read_dataset(root)

    return make
