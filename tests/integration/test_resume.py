"""A resumed training: what it keeps, what it makes anew, and what it leaves alone when it is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lamp3d.errors import ConfigError
from lamp3d.experiment import ExperimentConfig, Run, load_config, training
from lamp3d.experiment.training import _kept_plans
from lamp3d.files import claimed
from tests.integration.conftest import CHANGED, CommandLine


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run that may be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def content(run: Path) -> dict[str, bytes]:
    files = (file for file in sorted(run.rglob("*")) if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("network.filters=3", "belongs to another network"),
        ("train.curriculum=[{patch: [16, 16, 32], epochs: 9}]", "past the end of the curriculum"),
        ("preprocess.foreground_above=-400", "was trained with another preprocess.foreground_above"),
    ],
)
def test_a_refused_resume_leaves_the_run_as_it_was(
    lamp3d: CommandLine, run: Path, dataset: Path, config: Path, change: str, message: str
) -> None:
    before = content(run)
    done = lamp3d("train", dataset, *CHANGED, change, "--config", config, "--out", run, "--devices", 2, "--resume")
    assert message in done.complaint()
    assert content(run) == before


@pytest.mark.parametrize("what", ["organs", "channels"])
def test_a_resume_with_what_its_labels_do_not_mean_is_refused(
    lamp3d: CommandLine, run: Path, dataset: Path, tmp_path: Path, what: str
) -> None:
    before = content(run)
    other = Path(shutil.copytree(dataset, tmp_path / "other"))
    written = json.loads((other / "dataset.json").read_text())
    background, *organs = written["labels"].values()
    changes = {"organs": {"labels": dict(enumerate([background, *organs[::-1]]))}, "channels": {"modality": "MRI"}}
    (other / "dataset.json").write_text(json.dumps(written | changes[what]))
    done = lamp3d("train", other, "--out", run, "--devices", 2, "--resume")
    assert f"{other} has the {what} " in done.complaint()
    assert content(run) == before


def test_a_folder_is_trained_in_by_one_process(lamp3d: CommandLine, run: Path, dataset: Path) -> None:
    before = content(run)
    with claimed(run / ".lock") as mine:
        assert mine
        done = lamp3d("train", dataset, "--out", run, "--devices", 2, "--resume")
    assert "is being trained by another process" in done.complaint()
    assert content(run) == before


def test_a_run_that_another_process_began_meanwhile_is_left_as_it_is(
    dataset: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    @contextmanager
    def claimed(_: Path) -> Iterator[bool]:
        out.mkdir()
        (out / "last.safetensors").write_text("another's")
        yield True

    monkeypatch.setattr(training, "claimed", claimed)
    settings = load_config(config, ["train.curriculum=[{patch: [16, 16, 32], epochs: 1}]"])
    with pytest.raises(ConfigError, match="was trained by another process meanwhile"):
        training.train(dataset, settings, 1, out)
    assert content(out) == {"last.safetensors": b"another's"}


def test_what_is_done_stays_done_and_is_said_to(lamp3d: CommandLine, run: Path, dataset: Path) -> None:
    before = (run / "last.safetensors").read_bytes()
    about = json.loads((run / "run.json").read_text())
    about["splits"]["validation"] = []
    (run / "run.json").write_text(json.dumps(about))
    changes = ("train.curriculum.0.epochs=5", "loss.focal_weight=0.4")
    leftover = run / ".history.jsonl.0123abcd"  # of a process that was killed
    leftover.touch()
    done = lamp3d("train", dataset, *changes, "--out", run, "--devices", 2, "--resume")
    assert done.code == 0, done.err
    assert not leftover.exists()
    assert "Settings changed since the checkpoint: curriculum, loss.focal_weight; nothing is left to train" in done.out
    assert "Stages that are done stay as they are; to train longer, add another one." in done.out
    assert f"Next: lamp3d predict {run} SCAN" in done.out  # for there is nothing to evaluate
    assert (run / "last.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("place", "value", "kept"),
    [
        ("train.seed", 3, {0, 1}),
        ("train.curriculum.0.epochs", 9, {0, 1}),
        ("train.curriculum.0.learning_rate", 0.1, {0, 1}),
        ("train.curriculum.0.schedule", "gpipe", {1}),
        ("train.curriculum.1.recompute", "always", {0}),
        ("train.precision", "bf16", set()),
        ("memory", "1GB", set()),
        ("network.filters", 4, set()),
    ],
)
def test_plans_are_made_anew_where_their_settings_changed(run: Path, place: str, value: object, kept: set[int]) -> None:
    opened = Run.open(run)
    changed = opened.config.model_dump(mode="json")
    *outer, last = place.split(".")
    inner = changed
    for key in outer:
        inner = inner[int(key) if key.isdigit() else key]
    inner[last] = value
    now = Run(run, ExperimentConfig.model_validate(changed), opened.dataset, opened.organs, opened.channels)
    assert set(_kept_plans(now, 2)) == kept
    assert _kept_plans(now, 1) == {}


def test_plans_are_made_anew_on_devices_of_another_type(run: Path) -> None:
    opened = Run.open(run)
    assert set(_kept_plans(opened, 2)) == {0, 1}
    for stage, plan in enumerate(opened.plans()):
        plan.model_copy(update={"device_type": "cuda"}).save(opened.plan_path(stage))
    assert _kept_plans(opened, 2) == {}
