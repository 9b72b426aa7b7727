"""Commands under ``torchrun``: the first rank decides and writes, the others do their part."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from lamp3d.experiment import Run
from lamp3d.train import read_history
from lamp3d.volume import read_volume
from tests.integration.conftest import CONFIG, LIMIT_SECONDS, CommandLine, environment


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A command on two ranks."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lamp3d"]
    return subprocess.run(
        [*program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
        env=environment(),
    )


def test_a_training_is_planned_once_and_goes_on(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    out = tmp_path / "run"
    arguments = ("train", dataset, "--config", tmp_path / "config.yaml", "--devices", 2, "--out", out)
    done = torchrun(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Stage 1:") == done.stdout.count("Done. Next:") == 1
    assert [plan.devices for plan in Run.open(out).plans()] == [2, 2]
    assert [(record.stage, len(record.peak_bytes)) for record in read_history(out)] == [(1, 2), (1, 2), (2, 2)]

    again = torchrun(*arguments)
    assert again.returncode != 0
    assert again.stderr.count("already holds a run") == 1


def test_label_maps_are_those_of_the_launcher(
    lamp3d: CommandLine, trained: Path, dataset: Path, tmp_path: Path
) -> None:
    scans = [dataset / "images" / f"{name}.nii.gz" for name in ("p3", "p0")]
    done = torchrun("predict", trained, *scans, "--out", tmp_path / "two", "--devices", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Labels: 1 ") == 1
    assert lamp3d("predict", trained, *scans, "--out", tmp_path / "one").code == 0
    for scan in scans:
        ours, theirs = (read_volume(tmp_path / folder / scan.name) for folder in ("two", "one"))
        assert np.mean(ours.data != theirs.data) < 1e-3


def test_other_numbers_of_devices_are_refused(trained: Path, dataset: Path, tmp_path: Path) -> None:
    done = torchrun("predict", trained, dataset / "images" / "p3.nii.gz", "--out", tmp_path)
    assert done.returncode != 0
    assert "torchrun has started 2 workers, not 1: give --devices 2." in done.stderr
