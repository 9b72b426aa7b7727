"""A study from its file to its report: resumed, scored once on the test split, with a network of MONAI's."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from torch.distributed.elastic.multiprocessing import SignalException

from lamp3d.errors import ConfigError, DatasetError, LampError
from lamp3d.experiment import Run
from lamp3d.study import (
    driver,
    plan_study,
    read_results,
    run_study,
    score_test_split,
    time_predictions,
    write_study_report,
)
from lamp3d.study.result import read_timings
from lamp3d.train import read_history
from tests.integration.conftest import CommandLine, environment, first_epoch_is_saved, wait_until
from tests.unit.tiny_dataset import write_tiny_dataset

BASE = {
    "network": {"kind": "unet", "filters": 2},
    "augment": {"affine_probability": 0},
    "train": {
        "precision": "fp32",
        "curriculum": [{"patch": [16, 16, 32], "batch": 2, "epochs": 1, "schedule": "gpipe", "data": 1}],
    },
}
DYNUNET = {
    "network": {
        "kind": "monai",
        "name": "DynUNet",
        "arguments": {
            "kernel_size": [3, 3, 3],
            "strides": [1, 2, 2],
            "upsample_kernel_size": [2, 2],
            "filters": [2, 4, 4],
        },
        "divisor": 8,
    }
}


def write_study(folder: Path, **of_peer: Any) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE), "utf-8")
    rows = [
        {"name": "unet", "network": "U-Net-2", "input": "whole"},
        {"name": "peer", "network": "DynUNet", "input": "16³", "window": [16, 16, 16], "settings": DYNUNET | of_peer},
    ]
    study = {"title": "Tiny", "base": "base.yaml", "rows": rows, "windows": [[16, 16, 32]], "timed_cases": 1}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study), "utf-8")
    return path


def test_a_study_runs_goes_on_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    splits = {"train": ["case_0", "case_1"], "validation": ["case_2", "case_3"], "test": ["case_4"]}
    write_tiny_dataset(data, splits=splits)
    monkeypatch.setenv("LAMP3D_CACHE", str(tmp_path / "cache"))
    path = write_study(tmp_path)
    planned = {found.row.name: found for found in plan_study(path, data, 1)}
    assert planned["unet"].steps == 1
    assert planned["unet"].voxels == 2 * 16 * 16 * 32

    train, trained = driver.train, []

    def fails_once(*arguments: Any, **settings: Any) -> Any:
        trained.append(arguments[3].name)
        if arguments[3].name == "peer-0" and trained.count("peer-0") == 1:
            raise RuntimeError("the disk is full.")
        return train(*arguments, **settings)

    def is_stopped(*arguments: Any, **settings: Any) -> Any:
        raise SignalException("stopped", signal.SIGINT)

    monkeypatch.setattr(driver, "train", is_stopped)
    with pytest.raises(SignalException):
        run_study(path, data, out, 1)
    monkeypatch.setattr(driver, "train", fails_once)
    with pytest.raises(LampError, match="1 of 2 runs failed: peer-0; the others are done"):
        run_study(path, data, out, 1)
    assert "RuntimeError: the disk is full." in capsys.readouterr().out
    with pytest.raises(ConfigError, match="not finished: peer-0"):
        score_test_split(out, data, 1)
    assert "**Not finished:** peer-0." in write_study_report(out).read_text("utf-8")
    with driver.claimed(out / "runs" / "peer-0.lock"):
        run_study(path, data, out, 1)
    assert "peer-0 is being done by another process" in capsys.readouterr().out
    assert trained == ["unet-0", "peer-0"]
    run_study(path, data, out, 1)
    assert trained == ["unet-0", "peer-0", "peer-0"]

    unet = next(result for result in read_results(out / "results") if result.row == "unet")
    assert (unet.steps, unet.voxels, unet.best_epoch) == (1, planned["unet"].voxels, 1)
    assert [case.name for case in unet.cases] == ["case_2", "case_3"]
    assert unet.parameters > 1000
    assert unet.config["network"]["filters"] == 2
    time_predictions(out)
    timed = next(row for row in read_timings(out / "timings") if row.row == "unet")
    assert {(timing.window, timing.devices) for timing in timed.timings} == {("whole", 1), ("16x16x32", 1)}
    kept = (out / "study.yaml").read_text("utf-8")
    (out / "timings" / "unet.json").unlink()
    (out / "study.yaml").write_text(kept.replace("timed_devices:\n  - 1", "timed_devices: [3]"), "utf-8")
    with pytest.raises(DatasetError, match=r"has 2 validation case\(s\), but 3 devices take one each"):
        time_predictions(out)
    (out / "study.yaml").write_text(kept, "utf-8")
    report = write_study_report(out).read_text("utf-8")
    assert "Not finished" not in report
    assert "## Seconds a scan" in report
    assert "| DynUNet | 16³ | 1 |" in report

    (left_out,) = [result for result in read_results(out / "results") if result.row == "peer"]
    left_out.model_copy(update={"row": "gone"}).save(out / "results" / "gone-0.json")
    evaluate, scored = driver.evaluate, []

    def is_stopped_once(run: Run, *arguments: Any, **settings: Any) -> Any:
        scored.append(run.folder.name)
        if len(scored) == 2:
            raise SignalException("stopped", signal.SIGINT)
        return evaluate(run, *arguments, **settings)

    monkeypatch.setattr(driver, "evaluate", is_stopped_once)
    with pytest.raises(SignalException):
        score_test_split(out, data, 1)
    left_out.model_copy(update={"seed": 9}).save(out / "results" / "peer-9.json")
    with pytest.raises(ConfigError, match="looked at once"):  # for scores are known, and this run was not there then
        score_test_split(out, data, 1)
    (out / "results" / "peer-9.json").unlink()
    score_test_split(out, data, 1)
    assert scored == ["peer-0", "unet-0", "unet-0"]
    assert [result.row for result in read_results(out / "test")] == ["peer", "unet"]
    (out / "results" / "gone-0.json").unlink()
    assert [case.name for case in read_results(out / "test")[0].cases] == ["case_4"]
    assert "## Dice (test)" in write_study_report(out).read_text("utf-8")
    with pytest.raises(ConfigError, match="looked at once"):
        score_test_split(out, data, 1)

    # Written down by a lamp3d that did not have a setting yet.
    kept = yaml.safe_load((out / "study.yaml").read_text("utf-8"))
    for config in kept["configs"].values():
        del config["preprocess"]["window_percentiles"]
    (out / "study.yaml").write_text(yaml.safe_dump(kept), "utf-8")
    run_study(path, data, out, 1)
    assert trained == ["unet-0", "peer-0", "peer-0"]

    changed = write_study(tmp_path, **{"train.seed": 5})
    with pytest.raises(ConfigError, match="holds runs of peer with other settings"):
        run_study(changed, data, out, 1)
    content = yaml.safe_load(write_study(tmp_path).read_text("utf-8"))
    path.write_text(yaml.safe_dump(content | {"tolerance_mm": 9.0}), "utf-8")
    with pytest.raises(ConfigError, match="holds runs of peer, unet with other settings"):
        run_study(path, data, out, 1)
    path.write_text(yaml.safe_dump(content | {"rows": content["rows"][:1]}), "utf-8")
    run_study(path, data, out, 1)  # without the peer, which is remembered
    changed = write_study(tmp_path, **{"train.seed": 5})
    with pytest.raises(ConfigError, match="holds runs of peer with other settings"):
        run_study(changed, data, out, 1)


def test_a_study_that_is_killed_has_the_same_scores_in_the_end(
    lamp3d: CommandLine, dataset: Path, tmp_path: Path
) -> None:
    stages = [BASE["train"]["curriculum"][0] | {"epochs": epochs} for epochs in (2, 3)]
    path = write_study(tmp_path, **{"train.curriculum": stages})
    content = yaml.safe_load(path.read_text("utf-8"))
    path.write_text(yaml.safe_dump(content | {"rows": content["rows"][1:]}), "utf-8")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = ["study", "run", str(path), str(dataset), "--out"]
    assert lamp3d(*arguments, whole).code == 0

    run = killed / "runs" / "peer-0"
    process = subprocess.Popen(
        [sys.executable, "-m", "lamp3d", *arguments, str(killed)], stdout=subprocess.DEVNULL, env=environment()
    )
    try:
        wait_until(lambda: first_epoch_is_saved(run), process)
    finally:
        process.kill()
        process.wait()
    assert 0 < len(read_history(run)) < 5
    assert not (killed / "results" / "peer-0.json").exists()

    done = lamp3d(*arguments, killed)
    assert done.code == 0, done.err
    assert len(read_history(run)) == 5
    scores = [
        [[case.organs for case in result.cases] for result in read_results(out / "results")] for out in (killed, whole)
    ]
    assert scores[0] == scores[1]
    weights, expected = (load_file(out / "runs" / "peer-0" / "last.safetensors") for out in (killed, whole))
    assert set(weights) == set(expected)
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)


def test_a_folder_without_a_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no study"):
        score_test_split(tmp_path, tmp_path, 1)


def test_a_study_without_validation_cases_is_refused_before_training(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_tiny_dataset(data, splits={"train": ["case_0", "case_1"], "validation": []})
    with pytest.raises(DatasetError, match=r"row unet: .* has no validation cases"):
        run_study(write_study(tmp_path), data, tmp_path / "out", 1)
    assert not (tmp_path / "out" / "runs").exists()


def test_windows_that_a_network_cannot_take_are_refused_before_training(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    content = yaml.safe_load(path.read_text("utf-8")) | {"windows": [[20, 20, 20]]}
    path.write_text(json.dumps(content), "utf-8")
    write_tiny_dataset(tmp_path / "data", cases=2)
    with pytest.raises(ConfigError, match=r"row unet: a window of .* must be a multiple of 16"):
        run_study(path, tmp_path / "data", tmp_path / "out", 1)
    assert not (tmp_path / "out" / "runs").exists()
