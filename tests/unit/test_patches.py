"""Mini-batches: the same for the same seed, consistent between image and label, positive, padded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_dataset import ORGANS, write_tiny_dataset

from lamp3d.data import AugmentConfig, Batch, Batches, CaseStore, PreprocessConfig, read_dataset
from lamp3d.data.augment import Change
from lamp3d.errors import ConfigError

OFF = AugmentConfig.off()
PAIR = (("GlandLeft", "GlandRight"),)
ALL = AugmentConfig(
    flip_axes=(0, 1, 2),
    paired_labels=PAIR,
    affine_probability=1.0,
    elastic_probability=0.5,
    elastic_mm=4.0,
    elastic_spacing_mm=12.0,
    rotate90_probability=0.5,
    blur_probability=0.5,
    coarse_probability=0.5,
    gamma_probability=0.5,
    intensity_probability=1.0,
    noise_probability=1.0,
)
GEOMETRY = ALL.model_copy(
    update={f"{name}_probability": 0.0 for name in ("noise", "intensity", "blur", "coarse", "gamma")}
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CaseStore:
    """Five prepared cases; the fourth lacks GlandRight, the fifth has no contours at all."""
    root = tmp_path_factory.mktemp("tiny")
    written = write_tiny_dataset(root, cases=5)
    written["training"][3]["annotated"] = ["GlandLeft", "Spine"]
    written["training"][4]["annotated"] = []
    (root / "dataset.json").write_text(json.dumps(written))
    dataset = read_dataset(root)
    store = CaseStore(dataset, PreprocessConfig(window=(-200, 400)), root / "cache")
    store.prepare(dataset.cases, progress=False)
    return store


def batches(store: CaseStore, cases: slice = slice(0, 5), **settings: object) -> Batches:
    usual = {"patch": (8, 8, 8), "batch": 2, "divisor": 4, "seed": [7, 0, 1], "augment": OFF}
    return Batches(store, store.dataset.cases[cases], **{**usual, **settings})  # type: ignore[arg-type]


def assert_same(one: Batch, other: Batch) -> None:
    assert one.names == other.names
    assert torch.equal(one.annotated, other.annotated)
    for mine, theirs in ((one.images, other.images), (one.labels, other.labels)):
        assert mine is not None
        assert theirs is not None
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("patch", [(8, 8, 8), (12, 8, 16), (32, 8, 8), None])
@pytest.mark.parametrize("augment", [OFF, ALL])
def test_batches_have_the_promised_form(
    store: CaseStore, patch: tuple[int, int, int] | None, augment: AugmentConfig
) -> None:
    epoch = batches(store, patch=patch, augment=augment)
    assert len(epoch) == 3
    for i in range(len(epoch)):
        batch = epoch.read(i)
        images, labels = batch.images, batch.labels
        assert images is not None
        assert labels is not None
        if patch is None:
            assert isinstance(images, list)
            assert [tuple(image.shape) for image in images] == epoch.shapes(i)
            assert all(n % 4 == 0 for shape in epoch.shapes(i) for n in shape[2:])
            assert [label.shape for label in labels] == [image.shape for image in images]
        else:
            assert isinstance(images, torch.Tensor)
            assert [tuple(images.shape)] == epoch.shapes(i) == [(2, 1, *patch)]
            assert isinstance(labels, torch.Tensor)
            assert labels.shape == images.shape
        assert all(image.dtype == torch.float32 and torch.isfinite(image).all() for image in images)
        assert all(label.dtype == torch.int64 and label.max() <= len(ORGANS) for label in labels)
        assert (batch.annotated.shape, batch.annotated.dtype) == ((2, 4), torch.bool)
        assert len(batch.names) == 2
    voxels = [math.prod(extents) for i in range(len(epoch)) for extents in epoch.read(i).extents]
    assert epoch.share_of((1, 1, 10, 10, 10)) == sum(voxels) / len(epoch) / 1000


@pytest.mark.parametrize("patch", [(8, 8, 8), None])
def test_a_batch_is_a_pure_function_of_seed_and_index(store: CaseStore, patch: tuple[int, int, int] | None) -> None:
    one = batches(store, patch=patch, augment=ALL)
    last_first = [one.read(i) for i in reversed(range(len(one)))]
    again = batches(store, patch=patch, augment=ALL)
    for i, batch in zip(reversed(range(len(one))), last_first, strict=True):
        assert_same(batch, again.read(i))
    other = batches(store, patch=patch, augment=ALL, seed=[7, 0, 2]).read(0)
    assert other.names != one.read(0).names or not torch.equal(other.images[0], one.read(0).images[0])  # type: ignore[index]


@pytest.mark.parametrize("patch", [(8, 8, 8), None])
def test_parts_read_apart_are_the_parts_read_together(store: CaseStore, patch: tuple[int, int, int] | None) -> None:
    epoch = batches(store, patch=patch, augment=ALL)
    whole = epoch.read(1)
    images, labels = epoch.read(1, labels=False), epoch.read(1, images=False)
    assert images.labels is None
    assert labels.images is None
    assert_same(whole, Batch(images.images, labels.labels, labels.annotated, images.names, images.extents))
    bare = epoch.read(1, images=False, labels=False)
    assert bare.names == whole.names
    assert torch.equal(bare.annotated, whole.annotated)


@pytest.mark.parametrize("patch", [(12, 12, 16), (32, 8, 8), None])
@pytest.mark.parametrize("augment", [OFF, ALL])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slabs_are_the_slabs_of_what_is_read_whole(
    store: CaseStore, patch: tuple[int, int, int] | None, augment: AugmentConfig, axis: int
) -> None:
    """Rotated images to rounding, and labels but for ties between two voxels; everything else to the last bit."""
    made = batches(store, patch=patch, augment=augment)
    for number in range(3):
        for i in range(len(made)):
            whole = made.read(i)
            slab = made.read(i, part=lambda shape, k=number: third(shape, axis, k))
            assert slab.names == whole.names
            for name, tolerance in (("images", 1e-4), ("labels", 0)):
                for ours, theirs in zip(getattr(slab, name), getattr(whole, name), strict=True):
                    shape = tuple(theirs.shape[-3:])
                    expected = theirs[(..., *third((shape[0], shape[1], shape[2]), axis, number))]
                    assert ours.shape == expected.shape
                    apart = (ours - expected).abs() > (tolerance if augment is ALL else 0)
                    assert apart.float().mean() < 0.01


def third(shape: tuple[int, int, int], axis: int, number: int) -> tuple[slice, slice, slice]:
    """One of three slabs."""
    slices = [slice(0, n) for n in shape]
    slices[axis] = slice(shape[axis] * number // 3, shape[axis] * (number + 1) // 3)
    return slices[0], slices[1], slices[2]


def test_every_case_comes_as_often_as_asked(store: CaseStore) -> None:
    epoch = batches(store, batch=5, patches_per_case=3)
    names = [name for i in range(len(epoch)) for name in epoch.read(i, images=False).names]
    assert sorted(names) == sorted([f"case_{i}" for i in range(5)] * 3)
    assert names != sorted(names)
    with pytest.raises(IndexError):
        epoch.read(3)


def test_last_batch_is_filled_up(store: CaseStore) -> None:
    epoch = batches(store, batch=4)
    assert [len(epoch.read(i, images=False).names) for i in range(len(epoch))] == [4, 4]
    assert epoch.read(1, images=False).names[1:] == epoch.read(0, images=False).names[:3]
    assert len(batches(store, batch=12).read(0).names) == 12


def test_patches_are_positive_and_show_all_organs_in_time(store: CaseStore) -> None:
    epoch = batches(store, cases=slice(0, 3), batch=3, patches_per_case=20)
    seen = set()
    for i in range(len(epoch)):
        labels = epoch.read(i, images=False).labels
        assert labels is not None
        assert all(label.any() for label in labels)
        seen |= set(torch.cat([label.unique() for label in labels]).tolist())
    assert seen == {0, 1, 2, 3}


def test_a_share_of_the_patches_lies_anywhere(store: CaseStore) -> None:
    """In the first case, whose patches of 4³ show an organ by chance far less often than by choice."""
    shares = []
    for positive_fraction in (1.0, 0.5, 0.0):
        settings = {"patch": (4, 4, 4), "batch": 60, "patches_per_case": 60, "positive_fraction": positive_fraction}
        labels = batches(store, cases=slice(0, 1), **settings).read(0, images=False).labels
        assert isinstance(labels, torch.Tensor)
        shares.append(labels.flatten(1).any(1).float().mean().item())
    assert shares[0] == 1
    assert shares[0] > shares[1] + 0.1 > shares[2] + 0.2


def test_left_stays_left_under_every_change(store: CaseStore) -> None:
    """Of whole scans: whatever was flipped, turned or deformed, the left gland is the one at smaller x."""
    mild = GEOMETRY.model_copy(update={"rotate90_probability": 0.0, "flip_axes": (0,), "elastic_probability": 1.0})
    epoch = batches(store, cases=slice(0, 3), patch=None, batch=3, patches_per_case=6, augment=mild)
    flipped = 0
    for i in range(len(epoch)):
        for label in epoch.read(i, images=False).labels or ():
            left, right = ((label[0, 0] == value).nonzero()[:, 0].float() for value in (1, 2))
            assert left.mean() + 3 < right.mean()
            flipped += 1
    assert flipped == 18


def test_patch_without_change_is_the_scan_itself(store: CaseStore) -> None:
    case = store.dataset.cases[0]
    pixels, truth = store.read(case)
    assert pixels is not None
    assert truth is not None
    batch = batches(store, cases=slice(0, 1), patch=(8, 8, 8), batch=1).read(0)
    assert isinstance(batch.images, torch.Tensor)
    windows = pixels[0].unfold(0, 8, 1).unfold(1, 8, 1).unfold(2, 8, 1)
    hits = (windows == batch.images[0, 0]).flatten(3).all(-1).nonzero()
    assert len(hits) == 1
    d, h, w = hits[0].tolist()
    assert torch.equal(batch.labels[0], truth[:, d : d + 8, h : h + 8, w : w + 8].long())  # type: ignore[index]


def test_small_scans_are_padded_at_the_end(store: CaseStore) -> None:
    case = store.dataset.cases[0]
    pixels, truth = store.read(case)
    assert pixels is not None
    assert truth is not None
    d, h, w = pixels.shape[1:]
    whole = batches(store, cases=slice(0, 1), patch=None, batch=1, divisor=16).read(0)
    patch = batches(store, cases=slice(0, 1), patch=(32, 32, 32), batch=1, divisor=16).read(0)
    for batch in (whole, patch):
        assert torch.equal(batch.images[0].reshape(1, *batch.images[0].shape[-3:])[:, :d, :h, :w], pixels)  # type: ignore[index]
        assert torch.equal(batch.labels[0].reshape(1, *batch.labels[0].shape[-3:])[:, :d, :h, :w], truth.long())  # type: ignore[index]
        assert batch.images[0].sum() == pytest.approx(pixels.sum().item(), rel=1e-5)  # type: ignore[index]


def test_image_and_label_move_together(store: CaseStore) -> None:
    """Organs are 200 HU brighter than what surrounds them, in every orientation."""
    augment = GEOMETRY.model_copy(update={"scale": (1.0, 1.0)})
    for patch in ((12, 12, 12), None):
        epoch = batches(store, cases=slice(0, 3), patch=patch, batch=3, patches_per_case=4, augment=augment)
        for i in range(len(epoch)):
            batch = epoch.read(i)
            assert batch.images is not None
            assert batch.labels is not None
            for image, label in zip(batch.images, batch.labels, strict=True):
                assert image[label > 0].median() > 0.6
                assert image[label == 0].median() < 0.55


def test_flip_swaps_names_and_annotations(store: CaseStore) -> None:
    flip = OFF.model_copy(update={"flip_axes": (0,), "flip_probability": 1.0, "paired_labels": PAIR})
    plain = batches(store, cases=slice(3, 4), patch=None, batch=1).read(0)
    mirrored = batches(store, cases=slice(3, 4), patch=None, batch=1, augment=flip).read(0)
    assert plain.annotated.tolist() == [[False, True, False, True]]
    assert mirrored.annotated.tolist() == [[False, False, True, True]]
    d, h, w = store.shape(store.dataset.cases[3])
    before, after = plain.labels[0][0, 0, :d, :h, :w], mirrored.labels[0][0, 0, :d, :h, :w]  # type: ignore[index]
    swapped = torch.tensor([0, 2, 1, 3])[before]
    assert torch.equal(after, swapped.flip(0))
    # Left is still on the left: what means left lies at smaller x than the middle, what means right at larger x.
    assert (before == 1).nonzero()[:, 0].float().mean() < (d - 1) / 2 < (after == 2).nonzero()[:, 0].float().mean()
    assert not (before == 2).any()  # drawn, but not claimed


def test_rotation_is_done_in_mm(store: CaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter turn about x, of voxels of 2.5 x 3 mm: five voxels of 3 mm along z become six of 2.5 mm along y."""
    quarter = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    monkeypatch.setattr("lamp3d.data.patches.draw_change", lambda *_: Change(matrix_mm=quarter))
    epoch = batches(store, cases=slice(0, 1), patch=None, batch=1)
    _, truth = store.read(store.dataset.cases[0], image=False)
    assert truth is not None
    labels = epoch.read(0, images=False).labels
    assert labels is not None
    before = [len(axis.unique()) for axis in (truth[0] == 1).nonzero().T]
    after = [len(axis.unique()) for axis in (labels[0][0, 0] == 1).nonzero().T]
    assert before[2] == 5
    assert after == [before[0], 6, round(before[1] * 2.5 / 3)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": (8, 6, 8)}, "patch of 8x6x8: each side must be a multiple of 4, .* take 8x4x8 or 8x8x8"),
        ({"cases": slice(0, 0)}, "no cases"),
        ({"batch": 0}, "must be at least 1"),
        ({"augment": AugmentConfig(flip_axes=(0,))}, "no twin in paired_labels"),
    ],
)
def test_what_cannot_be_sampled_is_refused(store: CaseStore, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        batches(store, **settings)  # type: ignore[arg-type]


@pytest.mark.openkbp
def test_openkbp_patches(openkbp: Path, tmp_path: Path) -> None:
    dataset = read_dataset(openkbp)
    cases = dataset.split("train")[:4]
    store = CaseStore(dataset, PreprocessConfig(window=(824, 1424), foreground_above=200), tmp_path)
    store.prepare(cases, progress=False)
    augment = AugmentConfig(flip_axes=(0,), paired_labels=(("LeftParotid", "RightParotid"),), affine_probability=1.0)
    epoch = Batches(store, cases, patch=(64, 64, 64), batch=4, divisor=16, seed=[0], augment=augment)
    batch = epoch.read(0)
    assert isinstance(batch.images, torch.Tensor)
    assert batch.images.shape == (4, 1, 64, 64, 64)
    assert batch.labels is not None
    left, right = (1 + dataset.organs.index(organ) for organ in ("LeftParotid", "RightParotid"))
    for label, annotated in zip(batch.labels, batch.annotated, strict=True):
        assert label.any()
        assert set(label.unique().tolist()) - {0} <= set(annotated.nonzero().flatten().tolist())
        where = [(label[0] == value).nonzero()[:, 0].float() for value in (left, right)]
        if all(len(places) > 50 for places in where):
            assert where[0].mean() < where[1].mean()
