"""Timings that were measured once, kept on disk: by network, shape, device and versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from lamp3d.files import cache_root, write_text
from lamp3d.plan.profile import CellSeconds, Timing

FORMAT = 3


def remembered(key: Mapping[str, Any], measure: Callable[[], Timing], *, fresh: bool = False) -> Timing:
    """A timing from the disk, or measured and written there.

    However far its passes lie apart: a run that is repeated has to find the same plan, or its numbers differ.

    Args:
        key: all that the timing depends on, beside torch's version.
        measure: does it.
        fresh: measure even if it is known.
    """
    text = json.dumps({**key, "torch": torch.__version__, "format": FORMAT}, sort_keys=True, default=str)
    path = cache_root() / "timings" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    if not fresh and (known := _read(path)) is not None:
        return known
    timing = measure()
    content = {"key": json.loads(text), "uncertainty": timing.uncertainty, "cells": [astuple(c) for c in timing.cells]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content))
    except OSError:
        pass  # a home that cannot be written to: it is measured again next time
    return timing


def _read(path: Path) -> Timing | None:
    try:
        content = json.loads(path.read_text("utf-8"))
        return Timing(tuple(CellSeconds(*map(float, cell)) for cell in content["cells"]), content["uncertainty"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, or damaged: it is measured again
