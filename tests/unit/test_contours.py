"""Contours that are unlike the others are pointed out, and only those."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_dataset import AFFINE, ORGANS, SHAPE, write_tiny_dataset

from lamp3d.data import CaseStore, PreprocessConfig, read_dataset, unseen_organs, unusual_contours
from lamp3d.volume import Volume, write_nifti

VOXEL_ML = 2 * 2.5 * 3 / 1000


def store_of(root: Path, sizes: dict[str, list[int]], **content: object) -> CaseStore:
    """A dataset whose organs have so many voxels, case by case."""
    cases = len(next(iter(sizes.values())))
    write_tiny_dataset(root, cases, **content)
    for i in range(cases):
        label, free = np.zeros(SHAPE, np.uint8), np.stack(np.indices(SHAPE)[:, 2:18, 3:16, 1:15]).reshape(3, -1)
        for value, organ in enumerate(ORGANS, start=1):
            own, free = np.split(free, [sizes.get(organ, [5] * cases)[i]], axis=1)
            label[tuple(own)] = value
        write_nifti(Volume(label, AFFINE), root / f"labelsTr/case_{i}.nii.gz", overwrite=True)
    dataset = read_dataset(root)
    store = CaseStore(dataset, PreprocessConfig(crop_foreground=False), root / "cache")
    store.prepare(dataset.cases, progress=False)
    return store


def test_a_slip_is_pointed_out_the_farthest_first(tmp_path: Path) -> None:
    spine = [100, 110, 90, 100, 105, 95, 100, 100, 2000]
    gland = [20, 22, 18, 20, 2, 20, 20, 19, 21]
    store = store_of(tmp_path, {"Spine": spine, "GlandLeft": gland})
    found = unusual_contours(store, store.dataset.cases)
    assert [(contour.case, contour.organ) for contour in found] == [("case_8", "Spine"), ("case_4", "GlandLeft")]
    assert found[0].ml == pytest.approx(2000 * VOXEL_ML)
    assert found[0].usual_ml == pytest.approx(100 * VOXEL_ML)
    assert str(found[1]) == "GlandLeft of case_4, 0.03 ml where 0.3 are usual"


def test_sizes_that_differ_by_nature_are_not(tmp_path: Path) -> None:
    tumour = [4, 9, 30, 60, 100, 250, 500, 900, 1500, 2500]
    store = store_of(tmp_path, {"Spine": tumour})
    assert unusual_contours(store, store.dataset.cases) == []


def test_few_cases_and_what_is_not_annotated_say_nothing(tmp_path: Path) -> None:
    store = store_of(tmp_path / "few", {"Spine": [100] * 6 + [2000]})
    assert unusual_contours(store, store.dataset.cases) == []
    entries: list[dict[str, object]] = [
        {"image": f"imagesTr/case_{i}.nii.gz", "label": f"labelsTr/case_{i}.nii.gz"} for i in range(9)
    ]
    entries[8] |= {"annotated": ["GlandLeft", "GlandRight"]}
    store = store_of(tmp_path / "many", {"Spine": [100] * 8 + [2000]}, training=entries)
    assert store.organ_ml(store.dataset.cases[0])["Spine"] == pytest.approx(100 * VOXEL_ML)
    assert unusual_contours(store, store.dataset.cases) == []


def test_absent_organs_have_no_size(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"Spine": [100] * 8 + [0]})
    assert "Spine" not in store.organ_ml(store.dataset.cases[8])
    assert unusual_contours(store, store.dataset.cases) == []


def test_organs_that_no_case_shows_are_found(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"GlandLeft": [0, 0], "Spine": [0, 9]})
    assert unseen_organs(store, store.dataset.cases) == ["GlandLeft"]
    assert unseen_organs(store, store.dataset.cases[:1]) == ["GlandLeft", "Spine"]
