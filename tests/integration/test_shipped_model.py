"""The model that comes with lamp3d, as someone uses it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lamp3d.data import read_dataset
from lamp3d.evaluate import evaluate_case
from lamp3d.experiment import Run, find_model, predict
from lamp3d.train import Checkpoint
from lamp3d.volume import read_volume, write_nifti


def test_it_is_small_and_says_what_it_is() -> None:
    folder = find_model("openkbp")
    run = Run.open(folder)
    Checkpoint(run.best).check_network(run.network())
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 12e6
    card = (folder / "README.md").read_text("utf-8")
    assert "Not for clinical use" in card
    assert all(organ in card for organ in run.organs)


@pytest.mark.openkbp
def test_it_finds_the_organs_of_a_scan_that_it_was_not_trained_on(openkbp: Path, tmp_path: Path) -> None:
    run, dataset = Run.open(find_model("openkbp")), read_dataset(openkbp)
    case = next(case for case in dataset.split("validation") if len(case.annotated) == len(dataset.organs))
    assert case.label is not None
    scan = read_volume(case.images[0])
    hounsfield = tmp_path / "hounsfield.nii.gz"
    write_nifti(type(scan)(scan.data.astype(np.int16) - 1024, scan.affine), hounsfield)
    found, lifted = predict(run, {"own": case.images, "hounsfield": (hounsfield,)}, tmp_path / "labels")
    labels = read_volume(found.path)
    scores = evaluate_case(labels, read_volume(case.label), dataset.organs, case.annotated)
    dice = [score.dice for score in scores.values() if score.dice is not None]
    assert len(dice) == len(dataset.organs)
    assert np.mean(dice) > 0.7, scores
    np.testing.assert_array_equal(read_volume(lifted.path).data, labels.data)
