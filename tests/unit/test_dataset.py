"""The Decathlon layout, and every way in which a dataset.json can contradict itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_dataset import ORGANS, write_tiny_dataset

from lamp3d.data import Dataset, read_dataset
from lamp3d.errors import DatasetError
from lamp3d.volume import read_volume


def test_plain_decathlon_dataset(tiny: Callable[..., Dataset]) -> None:
    dataset = tiny(cases=10)
    assert (dataset.name, dataset.organs, dataset.n_classes) == ("tiny", ORGANS, 4)
    assert all(case.annotated == ORGANS for case in dataset.cases)
    train, validation = dataset.split("train"), dataset.split("validation")
    assert (len(train), len(validation)) == (8, 2)
    assert {case.name for case in train + validation} == {f"case_{i}" for i in range(10)}
    assert read_dataset(dataset.root) == dataset


def test_split_does_not_depend_on_the_order_of_the_file(tiny: Callable[..., Dataset], tmp_path: Path) -> None:
    dataset = tiny(cases=10)
    content = json.loads((dataset.root / "dataset.json").read_text())
    content["training"].reverse()
    (dataset.root / "dataset.json").write_text(json.dumps(content))
    assert read_dataset(dataset.root).splits == dataset.splits


def test_splits_annotated_and_test_scans(tmp_path: Path) -> None:
    written = write_tiny_dataset(tmp_path, cases=4)
    entries = written["training"]
    entries[0]["annotated"] = ["Spine", "GlandLeft"]
    written |= {"training": entries[:3], "test": [entries[3]["image"]]}
    (tmp_path / "dataset.json").write_text(json.dumps(written))
    dataset = read_dataset(tmp_path)
    assert dataset.cases[0].annotated == ("GlandLeft", "Spine")
    assert [case.label for case in dataset.split("test")] == [None]
    written["splits"] = {"train": ["case_0", "case_2"], "validation": ["case_1"], "test": ["case_3"]}
    (tmp_path / "dataset.json").write_text(json.dumps(written))
    assert [case.name for case in read_dataset(tmp_path).split("train")] == ["case_0", "case_2"]
    with pytest.raises(DatasetError, match="no split 'tests'; it has train, validation, test"):
        read_dataset(tmp_path).split("tests")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {"0": "background", "2": "Spine"}}, r"labels \[0, 2\] must be 0 \(background\), 1, 2"),
        ({"labels": {"0": "background", "1": "Spine", "2": "Spine"}}, "used twice: Spine"),
        ({"labels": {"0": "background"}}, r"labels \{0: 'background'\} name no organ; add those"),
        ({"labels": {"background": 0}}, "labels.background"),
        ({"labels": {str(value): f"part {value}" for value in range(257)}}, "256 organs; at most 255 are supported"),
        ({"training": []}, "`training` lists no cases; list those"),
        ({"training": [{"image": "imagesTr/absent.nii.gz"}]}, r"lists .*absent\.nii\.gz, which is absent"),
        ({"training": [{"label": "labelsTr/case_0.nii.gz"}]}, r"training\.0\.image is missing"),
        ({"test": [{"label": "labelsTr/case_0.nii.gz"}]}, r"json: test\.0\.image is missing; see"),
        ({"training": [{"image": "imagesTr/case_0.nii.gz", "annotated": ["Splin"]}]}, r"\['Splin'\] are not among"),
        ({"training": [{"image": "imagesTr/case_0.nii.gz"}] * 2}, "listed twice: case_0"),
        ({"training": [{"image": "imagesTr/case_0.nii.gz", "name": "../scan"}]}, r"case '\.\./scan': files are called"),
        ({"splits": {"train": ["case_9"]}}, "unknown cases: case_9"),
        ({"splits": {"train": ["case_0"], "validation": ["case_0"]}}, "more than one split place: case_0"),
        ({"splits": {"train": ["case_0"], "val": ["case_1"]}}, "split 'val'; did you mean 'validation'"),
        ({"splits": {"Training": ["case_0"]}}, "split 'Training'; did you mean 'train'"),
        (
            {"training": [{"image": "imagesTr/case_0.nii.gz"}]},
            "a label: case_0; add their label maps, or list them under",
        ),
    ],
)
def test_contradictions_are_refused(tiny: Callable[..., Dataset], change: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        tiny(cases=2, **change)


@pytest.mark.parametrize("content", [b'{"name": "x",', b"\xff\xfe\x00", b"[]", b""])
def test_broken_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(DatasetError, match=r"dataset\.json"):
        read_dataset(tmp_path)


def test_absent_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file; give the folder of a dataset"):
        read_dataset(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DatasetError, match="no such file; give the folder of a dataset"):
        read_dataset(tmp_path / "notes.txt")


@pytest.mark.openkbp
def test_openkbp_is_read_and_its_left_is_the_patients_left(openkbp: Path) -> None:
    dataset = read_dataset(openkbp)
    assert (len(dataset.split("train")), len(dataset.split("validation"))) == (170, 33)
    assert any(case.annotated != dataset.organs for case in dataset.cases)
    case = dataset.split("validation")[0]
    assert {"LeftParotid", "RightParotid"} <= set(case.annotated)
    assert case.label is not None
    label = read_volume(case.label)

    def centre_mm(organ: str) -> np.ndarray:
        voxel = np.argwhere(label.data == 1 + dataset.organs.index(organ)).mean(0)
        return (label.affine @ [*voxel, 1])[:3]

    assert centre_mm("LeftParotid")[0] < centre_mm("Brainstem")[0] < centre_mm("RightParotid")[0]
    assert centre_mm("SpinalCord")[2] < centre_mm("Brainstem")[2]  # the head is up
    assert centre_mm("SpinalCord")[1] < centre_mm("Mandible")[1] if "Mandible" in case.annotated else True
