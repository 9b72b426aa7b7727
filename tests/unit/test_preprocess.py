"""Preparation of scans, its inverse, and the cache of prepared cases."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import Resize
from pydantic import ValidationError
from tiny_dataset import AFFINE, ORGANS, SHAPE, tiny_scan, write_tiny_dataset
from torch.nn import functional

from lamp3d.data import Case, CaseStore, Dataset, PreprocessConfig, prepare_scan, read_dataset
from lamp3d.errors import DatasetError, ScanError
from lamp3d.volume import Volume, read_volume, write_nifti

CONFIG = PreprocessConfig(window=(-200, 400), foreground_above=-500, margin_voxels=1)


def one_hot(label: torch.Tensor) -> torch.Tensor:
    """Logits (C, D, H, W) that say exactly what a label map (1, D, H, W) says."""
    return functional.one_hot(label[0].long(), 1 + len(ORGANS)).movedim(-1, 0).float()


def test_prepared_scan_is_in_ras_cropped_and_windowed() -> None:
    image, label = tiny_scan(0)
    scan = prepare_scan(image, CONFIG, label)
    assert scan.image.shape == (1, 18, 15, 16)  # the box and a voxel around it, clamped to the scan
    assert type(scan.image) is type(scan.label) is torch.Tensor
    assert (scan.image.dtype, scan.label.dtype) == (torch.float32, torch.uint8)
    assert (scan.image.min(), scan.image.amax()) == (0, image.data.max() / 600 + 1 / 3)
    left = torch.nonzero(scan.label[0] == 1).float().mean(0)
    right = torch.nonzero(scan.label[0] == 2).float().mean(0)
    assert left[0] < right[0]  # x grows to the right
    # Every labelled voxel lies at the same place in mm as in the file.
    before = np.argwhere(label.data == 1) @ image.affine[:3, :3].T + image.affine[:3, 3]
    after = np.argwhere(scan.label[0].numpy() == 1) @ scan.affine[:3, :3].T + scan.affine[:3, 3]
    np.testing.assert_allclose(sorted(map(tuple, before)), sorted(map(tuple, after)))


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("crop", [True, False])
def test_restore_labels_inverts_orientation_and_crop_exactly(axes: tuple[int, int, int], crop: bool) -> None:
    image, label = tiny_scan(0)
    permuted = AFFINE[:, [*axes, 3]]
    image, label = (Volume(volume.data.transpose(axes), permuted) for volume in (image, label))
    scan = prepare_scan(image, CONFIG.model_copy(update={"crop_foreground": crop}), label)
    assert scan.label is not None
    restored = scan.restore_labels(one_hot(scan.label))
    np.testing.assert_array_equal(restored.data, label.data)
    np.testing.assert_array_equal(restored.affine, label.affine)
    assert restored.data.dtype == np.uint8


@pytest.mark.parametrize("spacing", [(1.0, 1.25, 1.5), (3.0, 3.0, 3.0)])
def test_resampling_keeps_the_extent_and_comes_back(spacing: tuple[float, float, float]) -> None:
    image, label = tiny_scan(0)
    scan = prepare_scan(image, CONFIG.model_copy(update={"spacing_mm": spacing}), label)
    own = prepare_scan(image, CONFIG, label)
    extent = np.array(scan.image.shape[1:]) * np.linalg.norm(scan.affine[:3, :3], axis=0)
    np.testing.assert_allclose(extent, np.array(own.image.shape[1:]) * [2, 2.5, 3])
    np.testing.assert_allclose(np.linalg.norm(scan.affine[:3, :3], axis=0), spacing, rtol=0.06)
    # The corner of the first voxel, not its centre, stays where it is.
    np.testing.assert_allclose(scan.affine @ [-0.5, -0.5, -0.5, 1], own.affine @ [-0.5, -0.5, -0.5, 1])
    assert scan.label is not None
    restored = scan.restore_labels(one_hot(scan.label))
    assert restored.data.shape == SHAPE
    both = np.count_nonzero((restored.data == label.data) & (label.data > 0))
    dice = 2 * both / (np.count_nonzero(restored.data) + np.count_nonzero(label.data))
    assert dice > (0.999 if spacing[0] < 2 else 0.8)


def test_shrinking_is_monais_but_darkens_no_end() -> None:
    rng = np.random.default_rng(0)
    config = PreprocessConfig(crop_foreground=False, spacing_mm=(2.5, 1, 4), window=((0, 1),))
    shape, affine = (40, 32, 36), np.eye(4)
    noise = rng.random(shape).astype(np.float32)
    found = prepare_scan(Volume(noise, affine), config).image
    assert found.shape == (1, 16, 32, 9)
    monais = Resize((16, 32, 9), mode="trilinear", align_corners=False, anti_aliasing=True)(
        torch.from_numpy(noise)[None]
    )
    inner = (slice(None), slice(2, -2), slice(None), slice(2, -2))
    torch.testing.assert_close(
        found[inner], monais.as_tensor()[inner], rtol=0, atol=3e-5
    )  # its weights add up to 0.9999
    flat = prepare_scan(Volume(np.full(shape, 0.5, np.float32), affine), config).image
    torch.testing.assert_close(flat, torch.full((1, 16, 32, 9), 0.5))


def test_only_scans_beyond_the_limits_are_resampled() -> None:
    image, label = tiny_scan(0)  # voxels of 2 x 2.5 x 3 mm, axes as in RAS
    own = prepare_scan(image, CONFIG, label)
    within = CONFIG.model_copy(update={"spacing_limits_mm": ((1, 2.5, 2), (2, 3, 4))})
    torch.testing.assert_close(prepare_scan(image, within, label).image, own.image, rtol=0, atol=0)
    beyond = CONFIG.model_copy(update={"spacing_limits_mm": ((4, 1, 1), (8, 1.25, 4))})
    fixed = CONFIG.model_copy(update={"spacing_mm": (4, 1.25, 3)})
    found, expected = (prepare_scan(image, config, label) for config in (beyond, fixed))
    torch.testing.assert_close(found.image, expected.image)
    np.testing.assert_allclose(found.affine, expected.affine)


def test_scans_in_hounsfield_units_are_brought_to_the_datasets_own() -> None:
    image, _ = tiny_scan(0)
    config = CONFIG.model_copy(update={"window": ((824, 1424),), "foreground_above": 524, "hu_offset": 1024})
    lifted = Volume(image.data + 1024, image.affine)
    expected = prepare_scan(image, CONFIG).image
    assert image.data.min() < -512 < lifted.data.min()
    for given in (image, lifted):
        torch.testing.assert_close(prepare_scan(given, config).image, expected)
    before = image.data.copy()
    prepare_scan(image, config)
    np.testing.assert_array_equal(image.data, before)


def test_restore_interpolates_scores_not_labels() -> None:
    """Twice too coarse and half a voxel off: the border between two classes runs where their scores cross."""
    image = Volume(np.zeros((8, 4, 4), np.float32), np.eye(4))
    config = PreprocessConfig(crop_foreground=False, spacing_mm=(2, 1, 1))
    scan = prepare_scan(image, config)
    assert scan.image.shape == (1, 4, 4, 4)
    logits = torch.zeros(2, 4, 4, 4)
    logits[1] = torch.tensor([-3.0, -1.0, 3.0, 5.0])[:, None, None]  # crosses 0 at fine voxel 3
    assert scan.restore_labels(logits).data[:, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    logits[1] = torch.tensor([-3.0, -3.0, 1.0, 1.0])[:, None, None]
    assert scan.restore_labels(logits).data[:, 0, 0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("factor", [0.001, 1000])
def test_voxels_in_other_units_are_refused_before_they_are_resampled(factor: float) -> None:
    scan = tiny_scan(0)[0]
    affine = np.diag([factor, factor, factor, 1]) @ AFFINE
    config = CONFIG.model_copy(update={"spacing_limits_mm": ((2, 2, 2), (4, 4, 4))})
    with pytest.raises(ScanError, match=r"voxels of .* mm, to be resampled to .* mm: its header has other units"):
        prepare_scan(Volume(scan.data, affine), config)


def test_scan_without_foreground_is_refused_with_its_values() -> None:
    with pytest.raises(ScanError, match=r"foreground_above=5000.0: the scan's values run from -1000.0 to"):
        prepare_scan(tiny_scan(0)[0], CONFIG.model_copy(update={"foreground_above": 5000.0}))


def test_configuration_is_checked() -> None:
    for bad in (
        {"windows": (0, 1)},
        {"window": (1, 0)},
        {"spacing_mm": (0, 1, 1)},
        {"margin_voxels": -1},
        {"hu_offset": -1},
        {"spacing_limits_mm": ((2, 2, 2), (1, 3, 3))},
        {"spacing_mm": (1, 1, 1), "spacing_limits_mm": ((1, 1, 1), (2, 2, 2))},
    ):
        with pytest.raises(ValidationError):
            PreprocessConfig(**bad)


@pytest.fixture
def store(tiny: Callable[..., Dataset], tmp_path: Path) -> CaseStore:
    return CaseStore(tiny(cases=3), CONFIG, tmp_path / "cache")


def test_store_reads_what_was_prepared(store: CaseStore) -> None:
    store.prepare(store.dataset.cases, progress=False)
    case = store.dataset.cases[1]
    image, label = tiny_scan(1)
    scan = prepare_scan(image, CONFIG, label)
    pixels, truth = store.read(case)
    assert pixels is not None
    assert truth is not None
    assert torch.equal(pixels, scan.image)
    assert torch.equal(truth, scan.label)
    assert store.shape(case) == scan.image.shape[1:]
    assert store.spacing_mm(case) == pytest.approx((2, 2.5, 3))
    assert store.minima(case).tolist() == [[[[0]]]]
    region = (slice(2, 9), slice(0, 5), slice(3, 16))
    part, nothing = store.read(case, region, label=False)
    assert nothing is None
    assert part is not None
    assert torch.equal(part, scan.image[:, *region])


def test_foreground_voxels_are_a_fixed_sample_of_annotated_organs(tmp_path: Path) -> None:
    written = write_tiny_dataset(tmp_path / "data", cases=1)
    written["training"][0]["annotated"] = ["GlandLeft", "Spine"]
    (tmp_path / "data/dataset.json").write_text(json.dumps(written))
    dataset = read_dataset(tmp_path / "data")
    store = CaseStore(dataset, CONFIG, tmp_path / "cache")
    store.prepare(dataset.cases, progress=False)
    case = dataset.cases[0]
    _, label = store.read(case, image=False)
    assert label is not None
    voxels = store.foreground_voxels(case)
    assert list(voxels) == ["GlandLeft", "Spine"]
    assert np.all(label[0].numpy()[tuple(voxels["Spine"].T)] == 3)
    assert store.annotated(case).tolist() == [False, True, False, True]


def test_prepared_once_and_again_when_something_changes(store: CaseStore) -> None:
    def files() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in store.folder.iterdir()}

    def prepare(config: PreprocessConfig) -> None:
        CaseStore(store.dataset, config, store.folder).prepare(store.dataset.cases, progress=False)

    prepare(CONFIG)
    first = files()
    prepare(CONFIG)
    assert files() == first
    prepare(CONFIG.model_copy(update={"window": ((-100, 300),)}))
    assert len(files()) == 6
    source = store.dataset.cases[0].images[0]
    later = time.time_ns() + 10**9
    os.utime(source, ns=(later, later))
    prepare(CONFIG)
    assert len(files()) == 7


def test_a_dicom_folder_whose_files_change_is_prepared_again(tmp_path: Path) -> None:
    """Its own time and size stay as they are when a file in it is written over."""
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "slice.dcm").write_bytes(b"before")
    case = Case("case", (folder,), None, ())
    dataset = Dataset("dicom", tmp_path, (), (case,), {})

    def prepared() -> Path:
        return CaseStore(dataset, CONFIG, tmp_path)._path(case)

    before = prepared()
    assert prepared() == before
    (folder / "slice.dcm").write_bytes(b"after")
    assert prepared() != before


def test_unprepared_case_is_refused(store: CaseStore) -> None:
    with pytest.raises(DatasetError, match="case_0 is not prepared"):
        store.read(store.dataset.cases[0])


def test_case_without_label_has_an_image_alone(tmp_path: Path) -> None:
    written = write_tiny_dataset(tmp_path / "data", cases=3)
    written |= {"training": written["training"][:2], "test": [written["training"][2]["image"]]}
    (tmp_path / "data/dataset.json").write_text(json.dumps(written))
    dataset = read_dataset(tmp_path / "data")
    store = CaseStore(dataset, CONFIG, tmp_path / "cache")
    store.prepare(dataset.cases, progress=False)
    image, label = store.read(dataset.cases[2])
    assert image is not None
    assert label is None
    assert store.foreground_voxels(dataset.cases[2]) == {}


def spoil(store: CaseStore, kind: str) -> None:
    """Make the second case's files wrong."""
    case = store.dataset.cases[1]
    assert case.label is not None
    image, label = tiny_scan(1)
    if kind == "shape":
        write_nifti(Volume(label.data[:-1], label.affine), case.label, overwrite=True)
    elif kind == "value":
        label.data[5, 5, 5] = 4
        write_nifti(label, case.label, overwrite=True)
    elif kind == "fraction":
        write_nifti(Volume(label.data * np.float32(0.5), label.affine), case.label, overwrite=True)
    elif kind == "place":
        write_nifti(Volume(label.data, np.diag([-1.0, -1, 1, 1]) @ label.affine), case.label, overwrite=True)
    elif kind == "nan":
        write_nifti(Volume(np.full(SHAPE, np.nan, np.float32), image.affine), case.images[0], overwrite=True)
    elif kind == "truncated":
        case.images[0].write_bytes(case.images[0].read_bytes()[:900])
    elif kind == "dark":
        write_nifti(Volume(np.full(SHAPE, -1000, np.int16), image.affine), case.images[0], overwrite=True)
    elif kind == "units":
        write_nifti(Volume(image.data + np.int16(1024), image.affine), case.images[0], overwrite=True)
    elif kind == "cut":
        label.data[0, :, :] = 3
        write_nifti(label, case.label, overwrite=True)


BAD = [
    ("shape", ScanError, r"labelsTr/case_1.nii.gz: label map of shape \(19, 18, 16\) does not fit its image"),
    ("value", DatasetError, r"labelsTr/case_1.nii.gz: holds label values \[4.0\], but dataset.json names 0 to 3"),
    ("fraction", DatasetError, r"holds label values \[0.5, 1.5\], .*; most likely its header has a scale"),
    ("place", ScanError, r"lies up to 80.0 mm away from its image"),
    ("nan", ScanError, r"imagesTr/case_1.nii.gz: 5760 of 5760 voxels are NaN"),
    ("truncated", ScanError, r"imagesTr/case_1.nii.gz: truncated or corrupt"),
    ("dark", ScanError, r"imagesTr/case_1.nii.gz: no voxel is above .*; change foreground_above"),
    ("units", DatasetError, r"is it in other units, .* \(\[\d+, \d+\] and 524\), and hu_offset: 1024"),
    ("cut", DatasetError, r"foreground crop cuts off \d+ of \d+ labelled voxels"),
]


@pytest.mark.parametrize(("kind", "error", "message"), BAD)
def test_bad_case_is_named_and_leaves_no_file(
    store: CaseStore, kind: str, error: type[Exception], message: str
) -> None:
    spoil(store, kind)
    with pytest.raises(error, match=message):
        store.prepare(store.dataset.cases, progress=False)
    assert [file.name.split("-")[0] for file in store.folder.iterdir()] == ["case_0"]


def test_workers_prepare_the_same_files_and_pass_errors_on(store: CaseStore, tmp_path: Path) -> None:
    spoil(store, "value")
    with pytest.raises(DatasetError, match=r"case_1.nii.gz: holds label values \[4.0\]"):
        store.prepare(store.dataset.cases, workers=2, progress=False)
    alone = CaseStore(store.dataset, CONFIG, tmp_path / "alone")
    alone.prepare(store.dataset.cases[:1], progress=False)
    (file,) = alone.folder.iterdir()
    assert (store.folder / file.name).read_bytes() == file.read_bytes()


@pytest.mark.openkbp
def test_openkbp_is_prepared_and_restored(openkbp: Path, tmp_path: Path) -> None:
    dataset = read_dataset(openkbp)
    cases = dataset.split("validation")[:3]
    config = PreprocessConfig(window=(824, 1424), foreground_above=200)
    store = CaseStore(dataset, config, tmp_path)
    store.prepare(cases, progress=False)
    for case in cases:
        assert case.label is not None
        truth = read_volume(case.label)
        scan = prepare_scan(read_volume(case.images[0]), config, truth)
        assert scan.label is not None
        logits = functional.one_hot(scan.label[0].long(), dataset.n_classes).movedim(-1, 0).float()
        np.testing.assert_array_equal(scan.restore_labels(logits).data, truth.data)
        assert np.prod(store.shape(case)) < truth.data.size / 2
        voxels = store.foreground_voxels(case)
        assert set(voxels) == set(case.annotated)
        if {"LeftParotid", "RightParotid"} <= set(voxels):
            assert voxels["LeftParotid"][:, 0].mean() < voxels["RightParotid"][:, 0].mean()
