"""The phantom: nine organs in their places, different patients, the same files for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from lamp3d.data import make_phantom, read_dataset, write_phantom_dataset
from lamp3d.data.anatomy import ORGANS
from lamp3d.data.shapes import Canvas, blend, ellipsoid, tube
from lamp3d.errors import DatasetError
from lamp3d.volume import Volume, read_volume

# Smallest and largest volume in cm³ that a patient may have.
SIZES = {
    "BrainStem": (8, 35),
    "Chiasm": (0.2, 2),
    "Mandible": (20, 90),
    "OpticNerve": (0.2, 1.6),
    "Parotid": (8, 40),
    "Submandibular": (3, 15),
}


def centre_mm(label: Volume, organ: str) -> np.ndarray:
    voxel = np.argwhere(label.data == 1 + ORGANS.index(organ)).mean(0)
    return (label.affine @ [*voxel, 1])[:3]


@pytest.mark.parametrize("seed", range(4))
def test_organs_have_their_sizes_places_and_densities(seed: int) -> None:
    image, label = make_phantom(seed)
    assert image.data.dtype == np.int16
    assert label.data.dtype == np.uint8
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    for value, organ in enumerate(ORGANS, start=1):
        low, high = next(size for name, size in SIZES.items() if organ.startswith(name))
        volume_cm3 = np.count_nonzero(label.data == value) * np.prod(label.spacing_mm) / 1000
        assert low < volume_cm3 < high, organ
    for organ in ("OpticNerve", "Parotid", "Submandibular"):
        assert centre_mm(label, f"{organ}Left")[0] < centre_mm(label, f"{organ}Right")[0] - 20
    eye, jaw, stem = (centre_mm(label, organ) for organ in ("OpticNerveLeft", "Mandible", "BrainStem"))
    assert jaw[2] + 20 < min(stem[2], eye[2])  # the jaw is below
    assert stem[1] + 20 < min(jaw[1], eye[1])  # the brain stem is behind

    def density(organ: str) -> float:
        return float(np.median(image.data[label.data == 1 + ORGANS.index(organ)]))

    assert density("Mandible") > 300
    assert -80 < density("ParotidLeft") < 40 < density("SubmandibularLeft") < 120
    assert 10 < density("BrainStem") < 70
    assert np.median(image.data[:4]) < -900  # air around the head
    assert 0.15 < np.mean(image.data > -300) < 0.75


def test_phantoms_repeat_and_differ() -> None:
    one, again, other = (make_phantom(seed, (36, 36, 40), (6, 6, 6)) for seed in (1, 1, 2))
    for a, b in zip(one, again, strict=True):
        np.testing.assert_array_equal(a.data, b.data)
    assert np.mean(one[1].data != other[1].data) > 0.002
    assert np.linalg.norm(centre_mm(one[1], "Mandible") - centre_mm(other[1], "Mandible")) > 0.5


def test_small_fields_of_view_cut_the_head() -> None:
    image, label = make_phantom(0, (10, 12, 9), (3, 3, 3))
    assert image.data.shape == label.data.shape == (10, 12, 9)


def test_dataset_is_complete_and_repeats(tmp_path: Path) -> None:
    recipe = {"train": 4, "validation": 2, "seed": 3, "missing_fraction": 0.5}
    write_phantom_dataset(tmp_path / "a", **recipe)  # type: ignore[arg-type]
    write_phantom_dataset(tmp_path / "b", **recipe)  # type: ignore[arg-type]
    dataset = read_dataset(tmp_path / "a")
    assert dataset.organs == ORGANS
    assert (len(dataset.split("train")), len(dataset.split("validation"))) == (4, 2)
    for file in (tmp_path / "a").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
    incomplete = [case for case in dataset.cases if case.annotated != ORGANS]
    assert incomplete
    assert {case.name for case in incomplete} <= set(dataset.splits["train"])
    for case in dataset.cases:
        assert case.label is not None
        label = read_volume(case.label)
        assert nib.aff2axcodes(label.affine) == ("L", "P", "S")
        assert {ORGANS[value - 1] for value in np.unique(label.data) if value} == set(case.annotated)
        if {"ParotidLeft", "ParotidRight"} <= set(case.annotated):
            assert centre_mm(label, "ParotidLeft")[0] < centre_mm(label, "ParotidRight")[0]


def test_dataset_is_written_once_and_replaces_no_other(tmp_path: Path) -> None:
    write_phantom_dataset(tmp_path, train=1, validation=0, seed=0)
    before = (tmp_path / "dataset.json").stat().st_mtime_ns
    write_phantom_dataset(tmp_path, train=1, validation=0, seed=0)
    assert (tmp_path / "dataset.json").stat().st_mtime_ns == before
    with pytest.raises(DatasetError, match="holds another dataset already"):
        write_phantom_dataset(tmp_path, train=1, validation=0, seed=1)
    (tmp_path / "dataset.json").write_text(json.dumps({"name": "mine"}))
    with pytest.raises(DatasetError, match="holds another dataset already"):
        write_phantom_dataset(tmp_path, train=1, validation=0, seed=0)


def grid(n: int = 41, spacing_mm: float = 1.0) -> np.ndarray:
    axis = (np.arange(n) - (n - 1) / 2) * spacing_mm
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij")).astype(np.float32)


def test_shapes_have_their_volumes_and_distances() -> None:
    points = grid()
    ball = ellipsoid(points, (1, 2, 3), (10, 10, 10))
    exact = np.linalg.norm(points - np.array([1, 2, 3])[:, None, None, None], axis=0) - 10
    np.testing.assert_allclose(ball, exact, atol=1e-3)
    egg = ellipsoid(points, (0, 0, 0), (6, 9, 12))
    assert np.count_nonzero(egg < 0) == pytest.approx(4 / 3 * np.pi * 6 * 9 * 12, rel=0.04)
    stick = tube(points, [(-8, 0, 0), (0, 0, 0), (8, 0, 0)], 5.3)
    assert np.count_nonzero(stick < 0) == pytest.approx(np.pi * 5.3**2 * 16 + 4 / 3 * np.pi * 5.3**3, rel=0.03)
    assert stick[20, 20 + 9, 20] == pytest.approx(3.7, abs=1e-3)
    oval = tube(points, [(-8, 0, 0), (8, 0, 0)], 5, (1, 1, 2))
    assert (oval[20, 20, 20 + 9] < 0, oval[20, 20, 20 + 11] < 0, oval[20, 20 + 6, 20] < 0) == (True, False, False)
    both = blend([ball, stick], 2)
    assert np.all(both <= np.minimum(ball, stick) + 1e-4)


def test_canvas_window_paints_what_the_canvas_paints() -> None:
    whole, part = (Canvas(grid(), (1.0, 1.0, 1.0)) for _ in range(2))
    whole.paint(ellipsoid(whole.points, (5, -6, 7), (4, 5, 6)), 40, organ=2)
    window = part.window((5, -6, 7), (4, 5, 6))
    assert window.image.size < part.image.size / 8
    window.paint(ellipsoid(window.points, (5, -6, 7), (4, 5, 6)), 40, organ=2)
    np.testing.assert_allclose(part.image, whole.image, rtol=1e-5)
    np.testing.assert_array_equal(part.label, whole.label)
    window.paint_around_organs(ellipsoid(window.points, (5, -6, 7), (5, 5, 7)), 1000)
    assert np.all(part.image[part.label == 2] < 41)
    assert np.any(part.image > 100)
