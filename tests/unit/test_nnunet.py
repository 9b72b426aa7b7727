"""nnU-Net's raw layout, and splits that are drawn: by number, by fraction, kept with a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from lamp3d.data import CaseStore, PreprocessConfig, SplitConfig, read_dataset
from lamp3d.errors import DatasetError
from lamp3d.experiment import ExperimentConfig, Run
from lamp3d.volume import write_nifti
from tests.unit.tiny_dataset import ORGANS, tiny_scan, write_tiny_dataset


def write_nnunet(root: Path, cases: int = 4, tests: int = 1, **content: Any) -> None:
    """A dataset as nnU-Net wants it; ``content`` replaces entries of its dataset.json."""
    for i in range(cases + tests):
        image, label = tiny_scan(i)
        of = "Tr" if i < cases else "Ts"
        write_nifti(image, root / f"images{of}" / f"CT_{i:03d}_0000.nii.gz")
        if i < cases:
            write_nifti(label, root / f"labels{of}" / f"CT_{i:03d}.nii.gz")
    written = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0} | {organ: 1 + k for k, organ in enumerate(ORGANS)},
        "numTraining": cases,
        "file_ending": ".nii.gz",
        **content,
    }
    (root / "dataset.json").write_text(json.dumps(written), encoding="utf-8")


def test_nnunets_layout_is_read(tmp_path: Path) -> None:
    root = tmp_path / "Dataset007_Glands"
    write_nnunet(root)
    (root / "imagesTr" / "._CT_000_0000.nii.gz").write_bytes(b"what macOS leaves")
    dataset = read_dataset(root)
    assert dataset.name == "Dataset007_Glands"
    assert dataset.organs == ORGANS
    assert [case.name for case in dataset.cases] == [f"CT_{i:03d}" for i in range(5)]
    assert dataset.cases[1].label == root / "labelsTr" / "CT_001.nii.gz"
    assert dataset.cases[1].annotated == ORGANS
    assert dataset.splits["test"] == ("CT_004",)
    assert dataset.cases[4].label is None
    assert len(dataset.splits["train"]) == 3
    assert len(dataset.splits["validation"]) == 1


@pytest.mark.parametrize("where", ["beside", "preprocessed"])
def test_nnunets_first_fold_is_the_split(tmp_path: Path, where: str) -> None:
    root = tmp_path / "nnUNet_raw" / "Dataset007_Glands"
    write_nnunet(root, tests=0)
    folder = root if where == "beside" else tmp_path / "nnUNet_preprocessed" / root.name
    folder.mkdir(parents=True, exist_ok=True)
    folds = [{"train": ["CT_000", "CT_002"], "val": ["CT_001", "CT_003"]}, {"train": [], "val": []}]
    (folder / "splits_final.json").write_text(json.dumps(folds), encoding="utf-8")
    assert read_dataset(root).splits == {"train": ("CT_000", "CT_002"), "validation": ("CT_001", "CT_003")}


def test_files_that_nnunet_has_listed_may_lie_anywhere(tmp_path: Path) -> None:
    write_nnunet(tmp_path / "Dataset001_Elsewhere", cases=2, tests=0)
    listed = {
        name: {
            "images": [f"../Dataset001_Elsewhere/imagesTr/CT_00{i}_0000.nii.gz"],
            "label": f"../Dataset001_Elsewhere/labelsTr/CT_00{i}.nii.gz",
        }
        for i, name in enumerate(("one", "two"))
    }
    root = tmp_path / "Dataset002_Listed"
    root.mkdir()
    write_nnunet(root, cases=0, tests=0, numTraining=2, dataset=listed)
    dataset = read_dataset(root)
    assert [case.name for case in dataset.cases] == ["one", "two"]
    case = dataset.cases[1]
    assert case.label is not None
    assert case.images[0].resolve() == tmp_path / "Dataset001_Elsewhere" / "imagesTr" / "CT_001_0000.nii.gz"
    assert case.label.exists()
    for wrong, message in (
        ({"one": {"images": ["a", "b"], "label": "c"}}, r"2 files of \S+a, \S+b, but 1 channels \(CT\)"),
        ({"one": {"images": "a"}}, "dataset, one"),
        ({}, "should map cases"),
    ):
        write_nnunet(root, cases=0, tests=0, numTraining=1, dataset=wrong)
        with pytest.raises(DatasetError, match=message):
            read_dataset(root)


def _no_label(root: Path) -> None:
    (root / "labelsTr" / "CT_002.nii.gz").unlink()


def _no_images(root: Path) -> None:
    for path in (root / "imagesTr").iterdir():
        path.unlink()


def _broken_folds(root: Path) -> None:
    (root / "splits_final.json").write_text('{"train": []}', encoding="utf-8")


def _fold_of_others(root: Path) -> None:
    (root / "splits_final.json").write_text('[{"train": ["CT_000"], "val": ["CT_007"]}]', encoding="utf-8")


def _second_channel(root: Path) -> None:
    (root / "imagesTr" / "CT_002_0001.nii.gz").touch()


def _nothing(root: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("content", "damage", "message"),
    [
        ({"channel_names": {"0": "CT", "1": "PET"}}, _nothing, "CT_000_0001.nii.gz, which is absent"),
        ({"channel_names": {"1": "CT"}}, _nothing, r"channels \[1\] must be 0, 1, 2"),
        ({"channel_names": {}}, _nothing, "must be 0, 1, 2"),
        ({"labels": ["background", "liver"]}, _nothing, "should be mappings"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, _nothing, "have one value"),
        ({"labels": None}, _nothing, "should be mappings"),
        (
            {"labels": {"0": "background", "1": "liver"}},
            _nothing,
            "value 'background' is no number; .*: exchange",
        ),
        ({"file_ending": ".nrrd"}, _nothing, "file_ending '.nrrd'"),
        ({"file_ending": None}, _nothing, 'file_ending is missing; write there how the files end, ".nii.gz"'),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, _nothing, "whole are regions"),
        ({"labels": {"background": 0, "liver": 1, "ignore": 2}}, _nothing, "ignore label"),
        ({"numTraining": 9}, _nothing, "numTraining is 9, but imagesTr has 4"),
        ({}, _no_label, "no label map of CT_002; add CT_002.nii.gz"),
        ({}, _second_channel, r"CT_002_0001.nii.gz: channel_names has 1 channel\(s\), and not this one"),
        ({}, _no_images, "no files CASE_0000.nii.gz"),
        ({}, _broken_folds, "not a list of folds"),
        ({}, _fold_of_others, "splits_final.json: the first fold has CT_007, of which the dataset has no scan"),
    ],
)
def test_what_is_not_nnunets(
    tmp_path: Path, content: dict[str, Any], damage: Callable[[Path], None], message: str
) -> None:
    write_nnunet(tmp_path, **content)
    damage(tmp_path)
    with pytest.raises(DatasetError, match=message):
        read_dataset(tmp_path)


def test_the_decathlons_liver_task_as_it_is_downloaded(tmp_path: Path) -> None:
    root = tmp_path / "Task03_Liver"
    for i in range(7):
        image, label = tiny_scan(i)
        write_nifti(image, root / ("imagesTr" if i < 5 else "imagesTs") / f"liver_{i}.nii.gz")
        if i < 5:
            write_nifti(label, root / "labelsTr" / f"liver_{i}.nii.gz")
            (root / "imagesTr" / f"._liver_{i}.nii.gz").write_bytes(b"what macOS leaves")
    entries = [{"image": f"./imagesTr/liver_{i}.nii.gz", "label": f"./labelsTr/liver_{i}.nii.gz"} for i in range(5)]
    content = {
        "name": "Liver", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "numTraining": 5, "numTest": 2, "training": entries,
        "test": ["./imagesTs/liver_5.nii.gz", "./imagesTs/liver_6.nii.gz"],
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    dataset = read_dataset(root)
    assert dataset.splits["test"] == ("liver_5", "liver_6")
    drawn = read_dataset(root, SplitConfig(test=2, validation=1)).splits
    assert [len(drawn[split]) for split in ("train", "validation", "test")] == [2, 1, 2]
    assert {name for names in drawn.values() for name in names} == {f"liver_{i}" for i in range(5)}


def test_the_papers_split_is_drawn_from_a_seed(tmp_path: Path) -> None:
    entries = [{"image": f"liver_{i}.nii.gz", "label": f"liver_{i}.nii.gz"} for i in range(131)]
    for entry in entries:
        (tmp_path / entry["image"]).touch()
    content = {"labels": {"0": "background", "1": "liver"}, "training": entries}
    (tmp_path / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    config = SplitConfig(test=27, validation=0)
    one, again = (read_dataset(tmp_path, config).splits for _ in range(2))
    other = read_dataset(tmp_path, SplitConfig(test=27, validation=0, seed=1)).splits
    assert one == again
    assert one != other
    assert (len(one["train"]), len(one["validation"]), len(one["test"])) == (104, 0, 27)
    shares = read_dataset(tmp_path, SplitConfig(test=0.5, validation=0.1)).splits
    assert len(shares["test"]) == round(0.5 * 131)
    assert len(shares["validation"]) == round(0.1 * (131 - round(0.5 * 131)))
    with pytest.raises(DatasetError, match="leave none of 131"):
        read_dataset(tmp_path, SplitConfig(test=100, validation=31))
    with pytest.raises(ValidationError, match="less than 1"):  # all of them? or one case?
        SplitConfig(validation=1.0)


def test_a_run_keeps_its_splits_when_cases_are_added(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_tiny_dataset(root, 5)
    config = ExperimentConfig.model_validate({"train": {"curriculum": [{"patch": 32, "epochs": 1}]}})
    before = read_dataset(root, config.split)
    Run.create(tmp_path / "run", config, before, 1)
    content = json.loads((root / "dataset.json").read_text("utf-8"))
    extra = {"image": "imagesTr/case_9.nii.gz", "label": "labelsTr/case_9.nii.gz"}
    for volume, file in zip(tiny_scan(9), extra.values(), strict=True):
        write_nifti(volume, root / file)
    (root / "dataset.json").write_text(json.dumps(content | {"training": [*content["training"], extra]}), "utf-8")
    assert read_dataset(root, config.split).splits != before.splits
    assert Run.open(tmp_path / "run").read_dataset().splits == before.splits
    gone = [entry for entry in content["training"] if before.splits["validation"][0] not in entry["image"]]
    (root / "dataset.json").write_text(json.dumps(content | {"training": gone}), "utf-8")
    with pytest.raises(DatasetError, match=r"the run's cases case_. are not there any more; bring them back"):
        Run.open(tmp_path / "run").read_dataset()


def test_a_run_keeps_its_splits_when_its_dataset_is_moved(tmp_path: Path) -> None:
    root, moved = tmp_path / "data", tmp_path / "moved"
    content = write_tiny_dataset(root, 5)
    config = ExperimentConfig.model_validate({"train": {"curriculum": [{"patch": 32, "epochs": 1}]}})
    drawn = read_dataset(root, SplitConfig(seed=1))
    assert drawn.splits != read_dataset(root, config.split).splits  # as where cases had been added before the training
    run = Run.create(tmp_path / "run", config, drawn, 1)
    root.rename(moved)
    assert run.read_dataset(moved).splits == drawn.splits
    missing = drawn.splits["train"][0]
    fewer = content | {"training": [entry for entry in content["training"] if missing not in entry["image"]]}
    (moved / "dataset.json").write_text(json.dumps(fewer), "utf-8")
    with pytest.raises(
        DatasetError, match=f"lacks 1 of the run's cases, such as {missing}: case_., which it was trained"
    ):
        run.read_dataset(moved)
    own = {"train": [], "validation": list(drawn.splits["train"][1:])}
    (moved / "dataset.json").write_text(json.dumps(fewer | {"splits": own}), "utf-8")  # another's of the same names
    assert run.read_dataset(moved).splits["validation"] == drawn.splits["train"][1:]


def test_what_is_drawn_of_an_organ_that_is_not_claimed_is_background(tmp_path: Path) -> None:
    root = tmp_path / "data"
    content = write_tiny_dataset(root, 2)
    content["training"][0]["annotated"] = ["GlandLeft"]
    (root / "dataset.json").write_text(json.dumps(content), "utf-8")
    dataset = read_dataset(root)
    store = CaseStore(dataset, PreprocessConfig(), tmp_path / "cache")
    store.prepare(dataset.cases, workers=1)
    values = [set(np.unique(label)) for case in dataset.cases if (label := store.read(case)[1]) is not None]
    assert values == [{0, 1}, {0, 1, 2, 3}]
    assert math.isclose(sum(store.annotated(dataset.cases[0])), 1)
