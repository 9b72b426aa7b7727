"""What a user can get wrong, through the command line: a message that says what to do, soon, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lamp3d.train import Checkpoint, read_history
from lamp3d.volume import Volume, read_volume, write_nifti
from tests.integration.conftest import (
    CHANGED,
    LIMIT_SECONDS,
    TRAINING,
    CommandLine,
    environment,
    first_epoch_is_saved,
    wait_until,
)

Refusal = Callable[..., str]


@pytest.fixture
def refusal(lamp3d: CommandLine, config: Path, tmp_path: Path) -> Refusal:
    """Trains with what it is given, into ``run``, and returns the complaint."""

    def train(root: Path, *arguments: object) -> str:
        given = arguments if "--config" in arguments else (*arguments, "--config", config)
        return lamp3d("train", root, *given, "--out", tmp_path / "run").complaint()

    return train


@pytest.fixture
def broken(dataset: Path, trained: Path, tmp_path: Path) -> Path:
    """A dataset to be spoilt; links, so that what is not spoilt is in the cache since ``trained``."""
    root = tmp_path / "broken"
    for file in dataset.glob("*/*.nii.gz"):
        link = root / file.relative_to(dataset)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    shutil.copy(dataset / "dataset.json", root)
    return root


def test_a_truncated_scan(refusal: Refusal, broken: Path) -> None:
    scan = broken / "images" / "p1.nii.gz"
    content = scan.read_bytes()
    scan.unlink()
    scan.write_bytes(content[: len(content) // 2])
    said = refusal(broken)
    assert f"{scan}: truncated or corrupt" in said
    assert "again" in said


def test_a_label_above_the_label_list(refusal: Refusal, broken: Path) -> None:
    path = broken / "labels" / "p2.nii.gz"
    label = read_volume(path)
    label.data[3, 3, 3] = 77
    write_nifti(label, path, overwrite=True)
    said = refusal(broken)
    assert f"{path}: holds label values [77.0], but dataset.json names 0 to 9 (BrainStem" in said


def test_image_and_label_of_different_shapes(refusal: Refusal, broken: Path) -> None:
    path = broken / "labels" / "p0.nii.gz"
    label = read_volume(path)
    write_nifti(Volume(label.data[:-2], label.affine), path, overwrite=True)
    said = refusal(broken)
    assert f"{path}: label map of shape (30, 32, 32) does not fit its image" in said
    assert "of shape (32, 32, 32)" in said


def test_a_case_that_is_listed_but_absent(refusal: Refusal, broken: Path) -> None:
    scan = broken / "images" / "p3.nii.gz"
    scan.unlink()
    assert f"lists {scan}, which is absent" in refusal(broken)


def test_a_dataset_that_is_none(refusal: Refusal, tmp_path: Path) -> None:
    assert f"{tmp_path / 'dataset.json'}: no such file" in refusal(tmp_path)


def test_a_dataset_without_training_cases(refusal: Refusal, broken: Path) -> None:
    path = broken / "dataset.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"splits": {"train": [], "validation": TRAINING}}))
    assert "no cases to make mini-batches from" in refusal(broken)


def test_a_dataset_without_contours(refusal: Refusal, broken: Path) -> None:
    path = broken / "dataset.json"
    content = json.loads(path.read_text())
    entries = [entry | {"annotated": []} for entry in content["training"]]
    path.write_text(json.dumps(content | {"training": entries}))
    assert "no training case shows any organ" in refusal(broken)


def test_label_maps_without_contours(refusal: Refusal, broken: Path) -> None:
    for name in TRAINING:
        path = broken / "labels" / f"{name}.nii.gz"
        label = read_volume(path)
        label.data[:] = 0
        write_nifti(label, path, overwrite=True)
    assert "no training case shows any organ" in refusal(broken)


def test_a_split_without_cases(lamp3d: CommandLine, trained: Path, broken: Path) -> None:
    path = broken / "dataset.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"splits": {"train": TRAINING, "validation": []}}))
    said = lamp3d("evaluate", trained, broken).complaint()
    assert "split 'validation' is empty" in said
    assert "--split" in said


@pytest.mark.parametrize("file", ["config.yaml", "history.jsonl"])
def test_what_no_run_has_written_is_not_written_over(
    refusal: Refusal, dataset: Path, tmp_path: Path, file: str
) -> None:
    mine = tmp_path / "run" / file
    mine.parent.mkdir()
    mine.write_text("mine")
    assert f"no run folder (no run.json), but holds {file}, which training writes over" in refusal(dataset)
    assert mine.read_text() == "mine"


def test_an_unknown_key_in_the_configuration(refusal: Refusal, dataset: Path, config: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(config.read_text().replace("optimizer:", "optimiser:"))
    said = refusal(dataset, "--config", wrong)
    assert f"{wrong}: unknown key 'train.optimiser'; did you mean 'optimizer'?" in said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.seed", "'train.seed' is not of the form key=value"),
        ("train.curriculum.9.epochs=3", "'train.curriculum.9.epochs=3' leads nowhere"),
        ("train.sede=3", "unknown key 'train.sede'; did you mean 'seed'?"),
        ("train.seed=many", "train.seed: should be a valid integer"),
        ("train.curriculum.0.patch=20", "a patch of 20x20x20: each side must be a multiple of 16"),
    ],
)
def test_an_override_that_cannot_be(refusal: Refusal, dataset: Path, override: str, words: str) -> None:
    assert words in refusal(dataset, override)


def test_a_plan_that_cannot_fit(lamp3d: CommandLine, refusal: Refusal, dataset: Path, tmp_path: Path) -> None:
    said = lamp3d("plan", "--filters", 2, "--volume", 32, "--memory", "1MB").complaint()
    assert "does not fit 1 device of 1 MB" in said
    assert "MB a device on 1 device" in said

    said = refusal(dataset, "memory=1MB", "--devices", 2)
    assert "does not fit 2 devices of 1 MB" in said
    assert "MB a device on 2 devices" in said
    assert not (tmp_path / "run" / "last.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "DATASET", "--devices", "0"], ["--devices", "greater than or equal to 1"]),
        (["train", "DATASET"], ["give --config FILE"]),
        (["train", "DATASET", "--config", "nowhere.yaml"], ["no configuration at nowhere.yaml"]),
        (["train"], ["Missing argument", "dataset"]),
        (["tarin"], ["No such command", "tarin"]),
        (["plan", "--volume", "17"], ["multiple of 16", "32x16x16 or 32x32x32"]),
        (["plan", "--memory", "some"], ["'some' is not an amount of memory"]),
        (["plan", "--net", "resnet"], ["no network 'resnet'", "unet, seunet", "package.module:function"]),
        (["plan", "--net", "a.b:c", "--filters", "4"], ["a.b:c says itself how it is built: leave out --filters"]),
        (["plan", "--net", "a.b:c", "--classes", "4"], ["says itself how many classes it has: leave out --classes"]),
        (
            ["verify", "--plan", "p.json", "--space", "2", "--recompute", "never", "--volume", "32", "--devices", "2"],
            ["p.json says that itself: leave out --volume, --devices, --space, --recompute"],
        ),
        (["plan", "--picture", "OUT/plan.xyz"], ["plan.xyz: pictures are .png, .pdf, .svg"]),
        (["evaluate", "RUN", "DATASET", "--tolerance-mm", "nan"], ["a tolerance of nan mm is not possible"]),
        (["predict", "DATASET", "SCAN", "--out", "OUT"], ["is not a run folder (no run.json)", "with --model"]),
        (["predict", "RUN", "DATASET/dataset.json", "--out", "OUT"], ["dataset.json: neither .nii"]),
        (["predict", "RUN", "SCAN", "--out", "OUT", "--window", "20"], ["20x20x20", "multiple of 16"]),
        (["predict", "RUN", "DATASET/none.nii.gz", "--out", "OUT"], ["no scan at", "none.nii.gz"]),
        (
            ["predict", "RUN", "one/CT", "two/CT", "--out", "OUT"],
            ["one/CT and two/CT would share CT.nii.gz; predict them into different folders"],
        ),
        (["evaluate", "RUN", "DATASET", "--split", "tset"], ["no split 'tset'", "train, validation"]),
        (["report", "DATASET"], ["give the folder of a run"]),
        (["predict", "RUN", "SCAN", "--out", "RUN/run.json"], ["run.json: File exists"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_arguments_that_cannot_be(
    lamp3d: CommandLine, trained: Path, dataset: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    names = {"OUT": tmp_path, "RUN": trained, "DATASET": dataset, "SCAN": dataset / "images" / "p3.nii.gz"}
    for name, path in names.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    said = lamp3d(*arguments).complaint()
    assert all(word in said for word in words), said


def test_a_label_map_never_replaces_its_scan(lamp3d: CommandLine, trained: Path, dataset: Path, tmp_path: Path) -> None:
    scan = Path(shutil.copy(dataset / "images" / "p3.nii.gz", tmp_path))
    before = scan.read_bytes()
    said = lamp3d("predict", trained, scan, "--out", tmp_path, "--overwrite").complaint()
    assert f"the label map of {scan} would replace the scan itself; choose another --out" in said
    assert scan.read_bytes() == before


@pytest.mark.parametrize("kind", ["value", "place"])
def test_contours_that_cannot_be_scored_are_found_before_anything_is_predicted(
    lamp3d: CommandLine, trained: Path, broken: Path, tmp_path: Path, kind: str
) -> None:
    path, run = broken / "labels" / "p3.nii.gz", Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(run / "predictions", ignore_errors=True)
    label = read_volume(path)
    path.unlink()
    data, affine = label.data.copy(), label.affine.copy()
    if kind == "value":
        data[3, 3, 3] = 77
    else:
        affine[0, 3] += 20
    write_nifti(Volume(data, affine), path)
    said = lamp3d("evaluate", run, broken).complaint()
    assert f"{path}: " in said
    assert ("holds label values [77.0]" if kind == "value" else "lies up to 20.0 mm away from its image") in said
    assert not (run / "predictions").exists()


def test_a_scan_that_is_none_is_named_by_the_worker_too(lamp3d: CommandLine, trained: Path, tmp_path: Path) -> None:
    scan = tmp_path / "noise.nii.gz"
    scan.write_bytes(np.random.default_rng(0).bytes(1000))
    said = lamp3d("predict", trained, scan, "--out", tmp_path / "out", "--devices", 2).complaint()
    assert f"{scan}: truncated or corrupt" in said


@pytest.mark.parametrize("way", [(), ("--devices", 2, "--window", 32)], ids=str)
def test_scans_that_cannot_be_labelled_are_named_and_all_others_are_done(
    lamp3d: CommandLine, trained: Path, dataset: Path, tmp_path: Path, way: tuple[object, ...]
) -> None:
    air, noise, out = tmp_path / "air.nii.gz", tmp_path / "noise.nii.gz", tmp_path / "out"
    write_nifti(Volume(np.full((32, 32, 32), -1000, np.int16), np.eye(4)), air)
    noise.write_bytes(b"noise")
    scans = [air, dataset / "images" / "p2.nii.gz", noise, dataset / "images" / "p3.nii.gz"]
    said = lamp3d("predict", trained, *scans, "--out", out, *way).complaint()
    assert f"{air}: no voxel is above foreground_above=-500.0" in said
    assert "give a scan like those that the run was trained on" in said
    assert f"{noise}: truncated or corrupt" in said
    assert f"All others are labelled, in {out}." in said
    assert sorted(file.name for file in out.iterdir()) == ["p2.nii.gz", "p3.nii.gz"]


def test_nothing_is_overwritten_unasked(
    lamp3d: CommandLine, refusal: Refusal, trained: Path, dataset: Path, config: Path, tmp_path: Path
) -> None:
    before = (trained / "last.safetensors").read_bytes()
    said = lamp3d("train", dataset, "--config", config, "--out", trained).complaint()
    assert f"{trained} already holds a run; add --resume" in said
    assert (trained / "last.safetensors").read_bytes() == before

    target = tmp_path / "p3.nii.gz"
    target.write_bytes(b"mine")
    command = ("predict", trained, dataset / "images" / "p3.nii.gz", "--out", tmp_path)
    assert f"{target} exists already; add --overwrite" in lamp3d(*command).complaint()
    assert target.read_bytes() == b"mine"
    assert lamp3d(*command, "--overwrite").code == 0
    assert read_volume(target).data.shape == (32, 32, 32)


def test_a_killed_worker_costs_no_more_than_an_epoch(
    lamp3d: CommandLine, trained: Path, dataset: Path, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # With the plans of the run that it will be compared with: plans are timed, and another one may round differently.
    shutil.copytree(trained / "plans", run / "plans")
    for settings in ("run.json", "config.yaml"):  # whose the plans are
        shutil.copy(trained / settings, run / settings)
    arguments = [
        "train",
        str(dataset),
        *CHANGED,
        "--config",
        str(config),
        "--out",
        str(run),
        "--devices",
        "2",
        "--resume",
    ]
    program = [sys.executable, "-m", "lamp3d", *arguments]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(program, stdout=out, stderr=err, env=environment())
    try:
        wait_until(lambda: first_epoch_is_saved(run), process)
        time.sleep(0.3)  # into the second
        workers = _workers(process.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        killed = time.monotonic()
        code = process.wait(LIMIT_SECONDS)
    finally:
        process.kill()
    assert time.monotonic() - killed < LIMIT_SECONDS
    said = " ".join((tmp_path / "err").read_text().split())
    assert code == 2
    assert "was killed by SIGKILL" in said
    assert "--resume" in said
    assert "Traceback" not in said

    assert len(read_history(run)) == 1
    assert Checkpoint(run / "last.safetensors").progress["epochs"] == 1
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]

    done = lamp3d(*arguments)
    assert done.code == 0, done.err
    assert "Resuming" in done.out
    assert [(record.stage, record.epoch) for record in read_history(run)] == [(1, 1), (1, 2), (2, 1)]
    resumed, uninterrupted = (load_file(folder / "last.safetensors") for folder in (run, trained))
    assert resumed.keys() == uninterrupted.keys()
    for name, values in uninterrupted.items():
        np.testing.assert_array_equal(resumed[name], values, err_msg=name)


def _workers(parent: int) -> list[int]:
    """The processes that a launcher spawned; without the resource tracker that Python adds."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[1]) == parent and b"spawn_main" in command:
            found.append(int(folder.name))
    return sorted(found)
