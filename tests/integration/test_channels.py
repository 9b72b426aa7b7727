"""Scans of two channels, a file each as nnU-Net has them, from training on two devices to a report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from lamp3d.evaluate import Results
from lamp3d.experiment import Run
from lamp3d.volume import Volume, read_volume, write_nifti
from tests.integration.conftest import CommandLine

AFFINE = np.diag([3.0, 3.0, 3.0, 1.0])
CONFIG = """\
network: {kind: unet, filters: 4}
train:
  precision: fp32
  optimizer: adamw
  curriculum:
    - {patch: [32, 16, 16], batch: 2, epochs: 12, patches_per_case: 8, learning_rate: 1.0e-2}
    - {patch: whole, batch: 1, epochs: 2, space: 2}
"""


def write_nnunet(root: Path) -> Path:
    """Bodies with a lump that only the second channel shows, in units that are other ones in every scan."""
    for i in range(5):
        rng = np.random.default_rng(i)
        shape = (32, 28, 24)
        centre = rng.integers(9, 15, 3)
        distance = np.linalg.norm(np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) - centre, axis=-1)
        body = np.zeros(shape, bool)
        body[2:30, 2:26, 1:23] = True
        lump = distance < 5
        plain = np.where(body, 300 + 40 * rng.standard_normal(shape), 0)
        bright = np.where(body, (1 + i) * (100 + 10 * rng.standard_normal(shape) + 80 * lump), 0)
        of = "Tr" if i < 4 else "Ts"
        for channel, data in enumerate((plain, bright)):
            write_nifti(Volume(data.astype(np.float32), AFFINE), root / f"images{of}" / f"m_{i}_000{channel}.nii.gz")
        write_nifti(Volume(lump.astype(np.uint8), AFFINE), root / f"labels{of}" / f"m_{i}.nii.gz")
    content = {
        "channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "Lump": 1}, "numTraining": 4,
        "file_ending": ".nii.gz",
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def test_two_channels_from_training_to_report(lamp3d: CommandLine, tmp_path: Path) -> None:
    dataset, run = write_nnunet(tmp_path / "Dataset009_Lumps"), tmp_path / "run"
    config = tmp_path / "lumps.yaml"
    config.write_text(CONFIG + f"cache: {json.dumps(str(tmp_path / 'cache'))}\n", encoding="utf-8")
    done = lamp3d("train", dataset, "--config", config, "--out", run, "--devices", 2)
    assert done.code == 0, done.err
    opened = Run.open(run)
    assert opened.channels == ("T1", "T2")
    assert opened.config.preprocess.window == (None, None)
    assert [plan.image_shape[1] for plan in opened.plans()] == [2, 2]
    assert math.prod(opened.plans()[1].space) == 2

    done = lamp3d("evaluate", run, dataset, "--split", "test", "--devices", 2)
    assert done.code == 0, done.err
    (case,) = Results.load(run / "results.json").cases
    assert case.name == "m_4"
    assert case.organs["Lump"].dice is not None
    assert case.organs["Lump"].dice > 0.8  # the second channel is read; the first one shows nothing
    assert (run / "predictions" / "test" / "m_4.nii.gz").exists()
    done = lamp3d("report", run)
    assert done.code == 0, done.err
    assert 'alt="m_4"' in (run / "report.html").read_text(encoding="utf-8")

    files = [dataset / "imagesTs" / f"m_4_000{channel}.nii.gz" for channel in range(2)]
    together = np.stack([read_volume(file).data for file in files], axis=-1)
    nib.save(nib.Nifti1Image(together, AFFINE), tmp_path / "together.nii.gz")
    done = lamp3d(
        "predict", run, files[0], tmp_path / "together.nii.gz", "--out", tmp_path / "labels", "--window", "32x16x16"
    )
    assert done.code == 0, done.err
    labels = [read_volume(tmp_path / "labels" / f"{name}.nii.gz").data for name in ("m_4", "together")]
    assert labels[0].any()
    np.testing.assert_array_equal(*labels)

    assert "1 channel(s), wanted 2 (T1, T2); give a 4D file" in lamp3d(
        "predict", run, dataset / "labelsTs" / "m_4.nii.gz", "--out", tmp_path / "others"
    ).complaint()  # fmt: skip


@pytest.mark.parametrize("command", ["plan", "verify"])
def test_networks_of_several_channels_are_planned_and_verified(lamp3d: CommandLine, command: str) -> None:
    done = lamp3d(command, "--channels", 3, "--filters", 2, "--volume", 32, "--batch", 1, "--devices", 2, "--space", 2)
    assert done.code == 0, done.err
