"""Small scans and datasets for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lamp3d.volume import Volume, write_nifti

ORGANS = ("GlandLeft", "GlandRight", "Spine")
SHAPE = (20, 18, 16)
# Axes towards left, back and head, as scanners store them: index 0 is the patient's right.
AFFINE = np.array([[-2.0, 0, 0, 40], [0, -2.5, 0, 30], [0, 0, 3, -20], [0, 0, 0, 1]])


def tiny_scan(seed: int) -> tuple[Volume, Volume]:
    """A box of noisy tissue in air, with a gland on each side and a spine; everything moves a little with the seed."""
    rng = np.random.default_rng(seed)
    image = np.full(SHAPE, -1000, np.int16)
    label = np.zeros(SHAPE, np.uint8)
    image[2:18, 3:16, 1:15] = rng.integers(0, 100, (16, 13, 14))
    move = int(rng.integers(0, 2))
    label[13:16, 5 + move : 8, 4:9] = 1
    label[4:7, 5 + move : 8, 4:9] = 2
    label[9:12, 11:14, 2 : 13 + move] = 3
    image[label > 0] += 200
    return Volume(image, AFFINE), Volume(label, AFFINE)


def write_tiny_dataset(root: Path, cases: int = 5, **content: Any) -> dict[str, Any]:
    """Write scans and a dataset.json; ``content`` replaces entries of the latter, which is returned."""
    entries = []
    for i in range(cases):
        entry = {"image": f"imagesTr/case_{i}.nii.gz", "label": f"labelsTr/case_{i}.nii.gz"}
        for volume, file in zip(tiny_scan(i), entry.values(), strict=True):
            write_nifti(volume, root / file)
        entries.append(entry)
    labels = {str(value): name for value, name in enumerate(("background", *ORGANS))}
    written = {"name": "tiny", "labels": labels, "training": entries, **content}
    (root / "dataset.json").write_text(json.dumps(written))
    return written
