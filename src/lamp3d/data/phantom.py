"""A procedural head-and-neck CT with the paper's nine organs: data for the demo and the tests, with no download.

Patients differ in pose, in proportions (a smooth deformation), in the place, size and density of every organ, in noise,
and in whether fillings cast streaks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from lamp3d.data.anatomy import LABEL, ORGANS, Patient
from lamp3d.data.dataset import TRAIN, VALIDATION, write_dataset_json
from lamp3d.data.shapes import Canvas, Field, smooth_field
from lamp3d.errors import DatasetError
from lamp3d.volume import Volume, write_nifti

_DEFAULT_SHAPE = (72, 72, 80)
_DEFAULT_SPACING_MM = (3.0, 3.0, 3.0)


def make_phantom(
    seed: int,
    shape: tuple[int, int, int] = _DEFAULT_SHAPE,
    spacing_mm: tuple[float, float, float] = _DEFAULT_SPACING_MM,
) -> tuple[Volume, Volume]:
    """One patient's CT and label map, the same for the same arguments.

    Args:
        seed: which patient.
        shape: (D, H, W) voxels; 216 x 216 x 240 mm hold the whole head, a smaller field of view cuts it.
        spacing_mm: voxel size.

    Returns:
        Image (int16, HU) and label map (uint8, values by ``ORGANS``) in RAS orientation.
    """
    rng = np.random.default_rng(seed)
    canvas = Canvas(_points_mm(rng, shape, spacing_mm), spacing_mm)
    Patient(canvas, rng).paint()

    image = gaussian_filter(canvas.image, [0.6 / mm for mm in spacing_mm])  # the scanner's own blur
    grain = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 0.5)
    image += grain * np.float32(rng.uniform(8, 18) / grain.std())
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = [-mm * (n - 1) / 2 for n, mm in zip(shape, spacing_mm, strict=True)]
    return Volume(np.clip(np.rint(image), -1024, 3071).astype(np.int16), affine), Volume(canvas.label, affine.copy())


def _points_mm(rng: np.random.Generator, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> Field:
    """Where each voxel lies in the anatomy of a patient with this pose and these proportions, (3, D, H, W)."""
    axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing_mm, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    pose = Rotation.from_euler("xyz", rng.normal(0, (4, 3, 4)), degrees=True).as_matrix()
    size = 0.93 * rng.normal(1, 0.035) * rng.normal(1, 0.025, 3)
    shift = rng.normal(0, 3, 3) + np.array([0, 2, 4])
    points: Field = np.einsum("ij,jxyz->ixyz", (pose / size[:, None]).astype(np.float32), grid)
    points -= shift.astype(np.float32)[:, None, None, None]
    for axis in range(3):
        points[axis] += 2 * smooth_field(rng, shape, 4)
    return points


def write_phantom_dataset(root: Path, *, train: int, validation: int, seed: int, missing_fraction: float = 0.2) -> None:
    """Write phantoms as a dataset in Decathlon layout, or do nothing where this very dataset already is.

    Args:
        root: the folder.
        train: cases of the split "train".
        validation: cases of the split "validation", all with all organs annotated.
        seed: of the whole dataset.
        missing_fraction: share of the training cases that lack the contours of one to three organs.

    Raises:
        DatasetError: the folder holds another dataset.
    """
    root = Path(root)
    recipe = {"train": train, "validation": validation, "seed": seed, "missing_fraction": missing_fraction, "format": 1}
    path = root / "dataset.json"
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")).get("phantom") == recipe:
            return
        raise DatasetError(f"{root}: holds another dataset already; give an empty folder")
    seeds = np.random.SeedSequence(seed).spawn(train + validation)
    entries = [_write_case(root, i, child, missing_fraction if i < train else 0.0) for i, child in enumerate(seeds)]
    names = [Path(entry["image"]).name.removesuffix(".nii.gz") for entry in entries]
    write_dataset_json(
        root,
        name="Phantom head and neck",
        description="Procedural head-and-neck CT; 'annotated' lists the organs that a case has contours for",
        organs=ORGANS,
        training=entries,
        splits={TRAIN: names[:train], VALIDATION: names[train:]},
        phantom=recipe,
    )


def _write_case(root: Path, i: int, seed: np.random.SeedSequence, missing_fraction: float) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    image, label = make_phantom(int(rng.integers(2**31)))
    missing: set[str] = set()
    if rng.random() < missing_fraction:
        missing = {str(organ) for organ in rng.choice(ORGANS, rng.integers(1, 4), replace=False)}
        label.data[np.isin(label.data, [LABEL[organ] for organ in missing])] = 0
    entry = {"image": f"imagesTr/phantom_{i:03d}.nii.gz", "label": f"labelsTr/phantom_{i:03d}.nii.gz"}
    write_nifti(_as_scanned(image), root / entry["image"], overwrite=True)
    write_nifti(_as_scanned(label), root / entry["label"], overwrite=True)
    return {**entry, "annotated": [organ for organ in ORGANS if organ not in missing]}


def _as_scanned(volume: Volume) -> Volume:
    """The same volume with its axes towards left and back, as scanners store it."""
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    flip[:2, 3] = [volume.data.shape[0] - 1, volume.data.shape[1] - 1]
    return Volume(np.ascontiguousarray(volume.data[::-1, ::-1]), volume.affine @ flip)
