"""The command line from scans to a report, on phantoms and a network that are as small as can be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from lamp3d.cli import app, main, runs
from lamp3d.data.anatomy import ORGANS
from lamp3d.errors import ConfigError
from lamp3d.evaluate import Results
from lamp3d.experiment import Run
from lamp3d.experiment.initial import initial_weights
from lamp3d.files import write_atomically
from lamp3d.plan import Plan
from lamp3d.train import Checkpoint, read_history
from lamp3d.volume import read_volume
from tests.integration.conftest import CHANGED, CommandLine, environment


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_says_so_and_leaves_no_half_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, number: signal.Signals
) -> None:
    def stopped(run: Path, dataset: Path | None) -> None:
        write_atomically(run / "report.html", lambda half: os.kill(os.getpid(), number))

    monkeypatch.setattr(runs, "write_report", stopped)
    monkeypatch.setattr(sys, "argv", ["lamp3d", "report", str(tmp_path)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 128 + number
    assert f"stopped by {number.name}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_training_leaves_a_run_and_a_calm_log(trained: Path) -> None:
    run = Run.open(trained)
    assert run.organs == ORGANS
    rare = {"Chiasm": 1.5, "background": 1.5}  # one of three training cases lacks the chiasm, and so its background
    assert run.config.loss.class_weights == dict.fromkeys(ORGANS, 1.0) | rare
    assert [plan.devices for plan in run.plans()] == [2, 2]
    history = read_history(trained)
    assert [(record.stage, record.epoch) for record in history] == [(1, 1), (1, 2), (2, 1)]
    assert all(len(record.peak_bytes) == 2 and record.mean_dice is not None for record in history)
    assert json.loads((trained / "versions.json").read_text())["seed"] == "0"
    assert list((trained / "tensorboard").iterdir())

    assert (trained.parent / "train.err").read_text() == ""  # no warnings of libraries or of the launcher
    lines = (trained.parent / "train.out").read_text("utf-8").splitlines()
    assert sum(line.startswith("stage ") for line in lines) == 3
    assert f"Done. Next: lamp3d evaluate '{trained}' " in lines[-1]  # to be pasted: the folder's name has a space

    lines_by_title = run.time_lines()
    assert list(lines_by_title) == [f"stage {stage}, {kind}" for stage in (1, 2) for kind in ("predicted", "measured")]
    measured, predicted = lines_by_title["stage 1, measured"], lines_by_title["stage 1, predicted"]
    assert [[a for a, _, _ in rank] for rank in measured.actions] == [
        [a for a, _, _ in rank] for rank in predicted.actions
    ]
    assert (trained.parent / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_predictions_lie_on_the_scans_own_grid_and_do_not_depend_on_the_devices(
    lamp3d: CommandLine, trained: Path, dataset: Path, tmp_path: Path
) -> None:
    scans = [dataset / "images" / f"{name}.nii.gz" for name in ("p3", "p0")]
    for devices in (1, 2):
        done = lamp3d("predict", trained, *scans, "--out", tmp_path / str(devices), "--devices", devices)
        assert done.code == 0, done.err
        assert done.err == ""
        assert f"{tmp_path / str(devices) / 'p3.nii.gz'}  " in done.out  # a path is not broken over lines
        assert "1 BrainStem" in done.out
        assert f"{devices} scans at a time" in done.out or devices == 1
    done = lamp3d("predict", trained, scans[0], "--out", tmp_path / "slabs", "--devices", 2)
    assert "one scan at a time, each in 2 slabs" in done.out
    np.testing.assert_array_equal(*(read_volume(tmp_path / way / scans[0].name).data for way in ("1", "slabs")))
    for scan in scans:
        source = read_volume(scan)
        one, two = (read_volume(tmp_path / str(devices) / scan.name) for devices in (1, 2))
        assert one.data.dtype == np.uint8
        assert one.data.shape == source.data.shape
        np.testing.assert_array_equal(one.affine, source.affine)
        np.testing.assert_array_equal(one.data, two.data)


def test_prediction_by_a_sliding_window(lamp3d: CommandLine, trained: Path, dataset: Path, tmp_path: Path) -> None:
    scan = dataset / "images" / "p3.nii.gz"
    done = lamp3d("predict", trained, scan, "--out", tmp_path, "--window", "32x16x32")
    assert done.code == 0, done.err
    labels = read_volume(tmp_path / "p3.nii.gz")
    assert labels.data.shape == read_volume(scan).data.shape
    assert labels.data.max() <= len(ORGANS)


def test_evaluation_and_report(lamp3d: CommandLine, trained: Path, dataset: Path, tmp_path: Path) -> None:
    done = lamp3d("evaluate", trained, dataset)
    assert done.code == 0, done.err
    assert all(organ in done.out for organ in ORGANS)
    results = Results.load(trained / "results.json")
    assert [case.name for case in results.cases] == ["p3"]
    assert set(results.organs) == set(ORGANS)
    assert results.settings["devices"] == 1  # of weights that two devices trained
    assert (trained / "predictions" / "validation" / "p3.nii.gz").exists()

    done = lamp3d("report", trained)
    assert done.code == 0, done.err
    page = (trained / "report.html").read_text(encoding="utf-8")
    assert str(trained / "report.html") in done.out
    assert all(organ in page for organ in ORGANS)
    assert "data:image/png;base64," in page

    again = tmp_path / "run"
    shutil.copytree(trained, again)
    (again / "results-train.json").write_text("older scores", "utf-8")
    done = lamp3d("evaluate", again, dataset, "--split", "train")
    assert done.code == 0, done.err
    assert Results.load(again / "results.json").split == "train"
    assert Results.load(again / "results-validation.json") == results
    assert not (again / "results-train.json").exists()


def test_an_exported_model_predicts_as_its_run_does(
    lamp3d: CommandLine, trained: Path, dataset: Path, tmp_path: Path
) -> None:
    model, scan = tmp_path / "model", dataset / "images" / "p3.nii.gz"
    told = ("--name", "Tiny", "--data", "four phantoms", "--licence", "Apache-2.0")
    done = lamp3d("export", trained, model, *told)
    assert done.code == 0, done.err
    weights = [folder / "best.safetensors" for folder in (trained, model)]
    assert weights[1].stat().st_size < 0.6 * weights[0].stat().st_size
    card = (model / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# Tiny\n")
    assert all(text in card for text in ("Not for clinical use", "four phantoms", "2 epochs of patches of 16x16x32"))
    everything = "".join(
        path.read_text("utf-8") for path in model.rglob("*") if path.suffix in (".json", ".yaml", ".md")
    )
    assert str(tmp_path.parent) not in everything  # no path of the machine that trained it
    assert '"p3"' not in everything  # and no name of a scan
    of_run, of_model = (Checkpoint(folder / "best.safetensors").read("model") for folder in (trained, model))
    for key, tensor in of_run.items():
        torch.testing.assert_close(of_model[key].float(), tensor, rtol=2**-11, atol=2**-25)  # float16's rounding
    labels = []
    for arguments in ((trained, scan), ("--model", model, scan)):
        done = lamp3d("predict", *arguments, "--out", tmp_path / str(len(labels)))
        assert done.code == 0, done.err
        labels.append(read_volume(tmp_path / str(len(labels)) / scan.name).data)
    assert (labels[0] == labels[1]).mean() > 0.99

    run = shutil.copytree(trained, tmp_path / "run")
    done = lamp3d("evaluate", run, dataset)
    assert done.code == 0, done.err
    done = lamp3d("export", run, tmp_path / "scored", *told)
    assert done.code == 0, done.err
    results = Results.load(run / "results.json")
    mean = f"| **mean** | | **{results.mean_dice:.3f}** |"
    assert mean in (tmp_path / "scored" / "README.md").read_text(encoding="utf-8")  # one case: no interval
    stale = results.model_copy(update={"settings": results.settings | {"checkpoint_epochs": 99}})
    stale.save(run / "results.json")
    assert lamp3d("export", run, tmp_path / "stale", *told).code == 0
    assert "These weights were not evaluated" in (tmp_path / "stale" / "README.md").read_text(encoding="utf-8")
    assert not list(tmp_path.glob(".*"))  # nothing half-written
    assert "is not empty" in lamp3d("export", trained, model, *told).complaint()
    assert "no model 'openkpb'" in lamp3d("predict", "--model", "openkpb", scan, "--out", tmp_path / "x").complaint()
    assert (
        "was trained without flips" in lamp3d("predict", trained, scan, "--mirror", "--out", tmp_path / "x").complaint()
    )
    assert "no scans" in lamp3d("predict", trained, "--out", tmp_path / "x").complaint()


def test_training_can_begin_with_the_weights_of_another_run(
    lamp3d: CommandLine, trained: Path, dataset: Path, config: Path, tmp_path: Path
) -> None:
    stage = "train.curriculum=[{patch: [16, 16, 32], batch: 2, epochs: 1, learning_rate: 1.0e-30}]"  # moves no weight
    given = (*CHANGED, stage, f"initial_weights={trained}")
    done = lamp3d("train", dataset, *given, "--config", config, "--out", tmp_path / "run", "--devices", 2)
    assert done.code == 0, done.err
    assert f"begin as in {trained}; afresh: none." in done.out
    begun, own = Checkpoint(trained / "best.safetensors"), Checkpoint(tmp_path / "run" / "last.safetensors")
    for name, tensor in begun.read("model").items():
        torch.testing.assert_close(own.read("model", [name])[name], tensor, rtol=0, atol=0)

    # Another organ list: the layers that give the logits are fresh, the others are taken.
    run = Run.open(tmp_path / "run")
    fewer = initial_weights(replace(run, organs=run.organs[1:]))
    kept = {name for name in begun.read("model") if "logits" not in name}
    assert set(fewer) == kept
    wide = run.config.model_copy(update={"network": run.config.network.model_copy(update={"filters": 4})})
    with pytest.raises(ConfigError, match="belongs to another network"):
        initial_weights(replace(run, config=wide))
    replace(run, channels=("t1", "t2")).save_about(str(dataset), 2)
    from_it = run.config.model_copy(update={"initial_weights": str(run.folder)})
    with pytest.raises(ConfigError, match="has seen the channels t1, t2, and the scans have t2, t1"):
        initial_weights(replace(run, channels=("t2", "t1"), config=from_it))
    missing = lamp3d("train", dataset, "initial_weights=nowhere", "--config", config, "--out", tmp_path / "other")
    assert "no model 'nowhere'" in missing.complaint()


def test_a_plan_is_printed_and_saved(lamp3d: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    done = lamp3d("plan", "--filters", 2, "--volume", "32x32x16", "--batch", 3, "--devices", 2, "--json", path)
    assert done.code == 0, done.err
    assert "encoder1" in done.out
    plan = Plan.load(path)
    assert (plan.input_shape, plan.devices) == ((3, 1, 32, 32, 16), 2)
    assert "chosen" in done.out
    assert "No plan can take less than" in done.out
    again = tmp_path / "again.json"
    plan.save(again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("program", [[str(Path(sys.executable).with_name("lamp3d"))], [sys.executable, "-m", "lamp3d"]])
def test_the_programs_that_are_installed(program: list[str]) -> None:
    done = subprocess.run(
        [*program, "--help"], capture_output=True, text=True, timeout=300, check=True, env=environment()
    )
    assert all(name in done.stdout for name in ("demo", "plan", "train", "predict", "evaluate", "report", "bench"))
    assert done.stderr == ""


def _unexplained(name: str, command: Any) -> list[str]:
    inner = getattr(command, "commands", {})
    unexplained = [f"{name} {parameter.name}" for parameter in command.params if not getattr(parameter, "help", None)]
    return unexplained + [found for at, part in inner.items() for found in _unexplained(f"{name} {at}", part)]


def test_every_argument_and_option_is_explained() -> None:
    assert _unexplained("lamp3d", typer.main.get_command(app)) == []


def test_verify_shows_that_a_plan_is_exact(lamp3d: CommandLine, tmp_path: Path) -> None:
    picture, plan = tmp_path / "line.png", tmp_path / "plan.json"
    options = ("--filters", 1, "--volume", "32x16x16", "--batch", 2)
    done = lamp3d(
        "plan",
        *options,
        "--devices",
        2,
        "--pipe",
        2,
        "--schedule",
        "zero_bubble_v",
        "--precision",
        "bf16",
        "--json",
        plan,
    )
    assert done.code == 0, done.err
    done = lamp3d("verify", *options[:2], "--plan", plan, "--timeline", picture)
    assert done.code == 0, done.err
    assert "bf16 rounds too coarsely to compare" in done.out
    assert "All within 1e-10." in done.out
    assert "device 1: " in done.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    events = json.loads(picture.with_suffix(".json").read_text())["traceEvents"]
    assert {event["tid"] for event in events} == {0, 1}
    assert {event["cat"] for event in events} == {"forward", "backward_input", "backward_weight"}


def test_the_network_of_a_configuration_is_planned_for(lamp3d: CommandLine, config: Path, tmp_path: Path) -> None:
    kind = "network: {kind: monai, name: BasicUNet, arguments: {features: [4, 4, 4, 4, 4, 4]}, divisor: 16}"
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text("utf-8").replace("network: {kind: unet, filters: 2}", kind), "utf-8")
    options = ("--classes", 3, "--volume", "32x32x16", "--precision", "fp32")
    found = []
    for net in (config, other):
        done = lamp3d("plan", "--net", net, *options, "--json", tmp_path / f"{len(found)}.json")
        assert done.code == 0, done.err
        found.append(Plan.load(tmp_path / f"{len(found)}.json"))
    assert [plan.network for plan in found] == ["UNet", "BasicUNet"]
    assert "no configuration at nowhere.yaml" in lamp3d("plan", "--net", "nowhere.yaml").complaint()


def test_verify_tells_of_a_network_that_a_plan_changes(lamp3d: CommandLine) -> None:
    # Dropout draws other numbers for micro-batches than for the mini-batch.
    layers = "nn.Conv3d(1, 4, 3), nn.Dropout(), nn.Conv3d(4, 1, 1)"
    code = f"from torch import nn\n\ndef make():\n    return nn.Sequential({layers})\n"
    (lamp3d.folder / "mine.py").write_text(code)
    done = lamp3d("verify", "--net", "mine:make", "--volume", "4x5x6", "--batch", 2, "--devices", 1)
    assert done.code == 1
    assert "beyond 1e-10" in done.err
    done = lamp3d("verify", "--net", "mine:absent", "--volume", "8")
    assert done.code == 2
    assert "write it as package.module:function" in done.err
    (lamp3d.folder / "asking.py").write_text("def make(in_channels, out_channels): ...\n")
    done = lamp3d("verify", "--net", "asking:make", "--volume", "8")
    assert done.code == 2
    assert "called without arguments here" in done.err
    assert "kind: own, name: asking:make" in done.err
