"""The real dataset beside the repository, where it is there."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def openkbp() -> Path:
    root = Path(__file__).resolve().parents[1].parent / "shared" / "openkbp"
    if not (root / "dataset.json").exists():
        pytest.skip(f"the real head-and-neck CTs are not at {root}")
    return root
