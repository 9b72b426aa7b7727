"""Scans of several channels: read from one file or many, windowed by their names, augmented and padded alike."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from lamp3d.data import AugmentConfig, Batches, CaseStore, PreprocessConfig, prepare_scan, read_dataset
from lamp3d.errors import ConfigError, DatasetError, ScanError
from lamp3d.predict import _padded
from lamp3d.scan import read_scan, scan_files, scan_name
from lamp3d.volume import Volume, write_nifti
from tests.unit.tiny_dataset import AFFINE, SHAPE, tiny_scan, write_tiny_dataset

CT, MR = "CT", "T2 weighted"


def two_channels(seed: int) -> tuple[Volume, Volume]:
    """A CT, and another image of the same patient in units of its own."""
    ct, label = tiny_scan(seed)
    rng = np.random.default_rng(100 + seed)
    mr = np.where(ct.data > -500, 4000 + 900 * rng.standard_normal(SHAPE) + 3000.0 * label.data, 0).astype(np.float32)
    return ct, Volume(mr, AFFINE)


def write_4d(path: Path, volumes: tuple[Volume, ...], itk: bool = False) -> Path:
    data = np.stack([volume.data.astype(np.float32) for volume in volumes], axis=-1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data[:, :, :, None] if itk else data, AFFINE), path)
    return path


@pytest.mark.parametrize("itk", [False, True])
def test_one_file_and_a_file_a_channel_are_the_same_scan(tmp_path: Path, itk: bool) -> None:
    volumes = two_channels(0)
    files = tuple(tmp_path / f"p_000{channel}.nii.gz" for channel in range(2))
    for volume, file in zip(volumes, files, strict=True):
        write_nifti(volume, file)
    together = read_scan([write_4d(tmp_path / "p.nii.gz", volumes, itk)], [CT, MR])
    apart = read_scan(files, [CT, MR])
    for one, other, volume in zip(together, apart, volumes, strict=True):
        assert np.array_equal(one.data, volume.data)
        assert np.array_equal(other.data, volume.data)
        assert np.array_equal(one.affine, other.affine)


def test_files_and_names() -> None:
    first = Path("in/a_0000_0000.nii.gz")
    assert scan_files(first, 1) == (first,)
    assert scan_files(first, 3) == tuple(Path(f"in/a_0000_000{channel}.nii.gz") for channel in range(3))
    assert scan_files(Path("a.nii"), 2) == (Path("a.nii"),)
    assert scan_files(Path("a_0000"), 2) == (Path("a_0000"),)  # a DICOM folder
    assert scan_name(first) == "a_0000_0000"
    assert scan_name(*scan_files(first, 2)) == "a_0000"
    assert scan_name(Path("SCAN.NII.GZ")) == scan_name(Path("SCAN.Nii")) == "SCAN"


def test_what_is_no_scan_of_these_channels_is_refused(tmp_path: Path) -> None:
    ct, mr = two_channels(0)
    both = write_4d(tmp_path / "both.nii", (ct, mr))
    a, b, c = (tmp_path / f"{name}.nii" for name in "abc")
    write_nifti(ct, a)
    write_nifti(Volume(mr.data[:-1], mr.affine), b)
    write_nifti(Volume(mr.data, mr.affine + np.eye(4, k=3) * 20), c)
    with pytest.raises(ScanError, match=r"2 channel\(s\), wanted 1 \(CT\); give one 3D volume"):
        read_scan([both], [CT])
    with pytest.raises(ScanError, match=r"1 channel\(s\), wanted 2 \(CT, T2 weighted\); give a 4D file"):
        read_scan([a], [CT, MR])
    with pytest.raises(ScanError, match=r"b.nii: channel of shape \(19, 18, 16\) does not fit the first one"):
        read_scan([a, b], [CT, MR])
    with pytest.raises(ScanError, match=r"c.nii: channel lies up to 20.0 mm away from the first one"):
        read_scan([a, c], [CT, MR])


def test_windows_go_by_the_channels_names() -> None:
    config = PreprocessConfig()
    assert config.resolved_for(["image"]).window == ((-200, 400),)
    assert config.resolved_for(["CT"]).foreground_above == -500
    assert config.resolved_for(["ct", "PET"]).window == ((-200, 400), None)
    mr = config.resolved_for(["T1", "T2"])
    assert (mr.window, mr.foreground_above) == ((None, None), None)
    assert mr.resolved_for(["CT", "CT"]) == mr  # what is resolved stays so
    given = PreprocessConfig.model_validate({"window": [824, 1424], "foreground_above": 200})
    assert given.resolved_for(["CT", "T1"]).window == ((824, 1424),) * 2
    assert given.resolved_for(["CT"]).foreground_above == 200
    each = PreprocessConfig.model_validate({"window": [[0, 15], None]})
    assert each.resolved_for(["PET", "T1"]).window == ((0, 15), None)
    with pytest.raises(ConfigError, match=r"2 windows for 3 channel\(s\) \(a, b, c\)"):
        each.resolved_for(["a", "b", "c"])
    with pytest.raises(ValueError, match=r"window \(15.0, 0.0\) must rise"):
        PreprocessConfig.model_validate({"window": [[0, 15], [15, 0]]})
    with pytest.raises(ValueError, match=r"window \(50.0, 50.0\) must rise"):
        PreprocessConfig.model_validate({"window_percentiles": [50, 50]})


def test_each_channel_is_brought_to_zero_and_one() -> None:
    ct, mr = two_channels(0)
    prepared = prepare_scan((ct, mr), PreprocessConfig(margin_voxels=0).resolved_for([CT, MR]))
    alone = prepare_scan(ct, PreprocessConfig(margin_voxels=0))
    assert torch.equal(prepared.image[:1], alone.image)
    # Not by the library that the code uses: flipped to RAS, cropped to the box of tissue, ranked.
    box = (slice(2, 18), slice(3, 16), slice(1, 15))
    values = mr.data[box][::-1, ::-1]
    low, high = np.percentile(values, [0.5, 99.5])
    expected = np.clip((values - low) / (high - low), 0, 1)
    np.testing.assert_allclose(prepared.image[1].numpy(), expected, atol=1e-6)
    assert {float(prepared.image[1].min()), float(prepared.image[1].max())} == {0.0, 1.0}


def test_a_channel_that_shows_nothing_is_refused() -> None:
    ct, _ = two_channels(0)
    empty = Volume(np.zeros(SHAPE, np.float32), AFFINE)
    with pytest.raises(ScanError, match="channel 1 is 0 nearly everywhere"):
        prepare_scan((ct, empty), PreprocessConfig().resolved_for([CT, MR]))


def two_channel_dataset(root: Path, *, alike: bool = False, **content: object) -> None:
    written = write_tiny_dataset(root, cases=3)
    for i, entry in enumerate(written["training"]):
        ct, mr = two_channels(i)
        write_4d(root / entry["image"], (ct, ct if alike else mr))
    (root / "dataset.json").write_text(
        json.dumps(written | {"modality": {"0": CT, "1": CT if alike else MR}} | content)
    )


AUGMENT = AugmentConfig.model_validate(
    {
        "rotate_degrees": 15, "scale": [0.9, 1.1], "affine_probability": 1, "elastic_probability": 1,
        "flip_axes": [0], "paired_labels": [["GlandLeft", "GlandRight"]], "gamma_probability": 1,
        "blur_probability": 1, "coarse_probability": 1, "intensity_probability": 1, "noise_probability": 0,
    }
)  # fmt: skip

NO_CHANGE = AugmentConfig(affine_probability=0, intensity_probability=0, noise_probability=0)


@pytest.mark.parametrize("patch", [(8, 8, 8), None])
def test_channels_are_augmented_alike(tmp_path: Path, patch: tuple[int, int, int] | None) -> None:
    write_tiny_dataset(tmp_path / "one", cases=3)
    two_channel_dataset(tmp_path / "two", alike=True)
    read = []
    for name in ("one", "two"):
        dataset = read_dataset(tmp_path / name)
        store = CaseStore(dataset, PreprocessConfig(), tmp_path / "cache")
        store.prepare(dataset.cases, progress=False)
        batches = Batches(store, dataset.cases, patch=patch, batch=1, divisor=8, seed=(1,), augment=AUGMENT)
        read.append([batches.read(i) for i in range(len(batches))])
        channels = len(dataset.channels)
        assert [shape[1] for i in range(len(batches)) for shape in batches.shapes(i)] == [channels] * len(batches)
    for one, two in zip(*read, strict=True):
        (image,), (images,) = one.images, two.images  # type: ignore[misc]
        expected = image if patch is None else image[None]
        found = images if patch is None else images[None]
        assert found.shape[1] == 2
        torch.testing.assert_close(found[:, :1], expected)
        torch.testing.assert_close(found[:, 1:], expected)
        (label,), (labels,) = one.labels, two.labels  # type: ignore[misc]
        assert torch.equal(label, labels)


def test_each_channel_is_padded_with_its_own_minimum(tmp_path: Path) -> None:
    two_channel_dataset(tmp_path / "two")
    dataset = read_dataset(tmp_path / "two")
    config = PreprocessConfig.model_validate({"window": [[-2000, 400], [-1000, 9000]]})
    store = CaseStore(dataset, config, tmp_path / "cache")
    store.prepare(dataset.cases, progress=False)
    case = dataset.cases[0]
    image, _ = store.read(case, label=False)
    assert image is not None
    minima = store.minima(case)
    assert minima.flatten().tolist() == pytest.approx([1000 / 2400, 0.1])
    (whole,) = Batches(
        store, [case], patch=None, batch=1, divisor=32, seed=(0,), augment=NO_CHANGE
    ).read(0).images or ()  # fmt: skip
    assert torch.equal(whole[0, :, -1, -1, -1], minima.flatten())
    padded = _padded(image, whole.shape[2:])
    torch.testing.assert_close(padded, whole[0])


def test_a_dataset_says_what_its_channels_are(tmp_path: Path) -> None:
    two_channel_dataset(tmp_path / "named")
    dataset = read_dataset(tmp_path / "named")
    assert dataset.channels == (CT, MR)
    two_channel_dataset(tmp_path / "gap", modality={"0": CT, "2": MR})
    with pytest.raises(DatasetError, match=r"channels \[0, 2\] must be 0, 1, 2"):
        read_dataset(tmp_path / "gap")
    two_channel_dataset(tmp_path / "few", modality={"0": CT})
    dataset = read_dataset(tmp_path / "few")
    with pytest.raises(ScanError, match=r"case_0.nii.gz: 2 channel\(s\), wanted 1 \(CT\)"):
        CaseStore(dataset, PreprocessConfig(), tmp_path / "cache").prepare(dataset.cases[:1], progress=False)
