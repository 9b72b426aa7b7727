"""Random changes: their geometry, and that left stays left."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from torch.nn import functional

from lamp3d.data import AugmentConfig
from lamp3d.data.augment import Change, draw_change, label_swap
from lamp3d.data.intensity import recoloured, widened
from lamp3d.data.sampling import elastic_shifts, sampling_grid, source_box, turned, unturned
from lamp3d.errors import ConfigError

ORGANS = ["BrainStem", "ParotidLeft", "ParotidRight"]
PAIR = (("ParotidLeft", "ParotidRight"),)


def middle(start: tuple[int, ...], size: tuple[int, ...]) -> list[float]:
    return [a + (n - 1) / 2 for a, n in zip(start, size, strict=True)]


def sampled(volume: torch.Tensor, start: tuple[int, ...], size: tuple[int, ...], matrix: np.ndarray) -> torch.Tensor:
    """What a rotated sample of a (D, H, W) volume shows."""
    box = source_box(middle(start, size), size, volume.shape, matrix)
    grid = sampling_grid(middle(start, size), size, box, matrix)
    return functional.grid_sample(volume[box][None, None], grid, align_corners=False)[0, 0]


def test_unit_matrix_reads_exactly_the_patch() -> None:
    volume = torch.rand(20, 22, 24)
    box = source_box(middle((3, 4, 5), (8, 6, 10)), (8, 6, 10), volume.shape, np.eye(3))
    assert box == (slice(3, 11), slice(4, 10), slice(5, 15))
    torch.testing.assert_close(sampled(volume, (3, 4, 5), (8, 6, 10), np.eye(3)), volume[box])


def test_quarter_turn_by_matrix_is_rot90() -> None:
    volume = torch.rand(20, 20, 20)
    matrix = Rotation.from_euler("z", 90, degrees=True).as_matrix()
    expected = torch.rot90(volume[4:12, 6:14, 5:15], 1, (1, 0))
    torch.testing.assert_close(sampled(volume, (4, 6, 5), (8, 8, 10), matrix), expected, atol=1e-4, rtol=0)


def test_source_box_loses_nothing_that_a_rotated_patch_needs() -> None:
    """Reading the box alone gives what reading the whole volume gives."""
    rng = np.random.default_rng(0)
    volume = torch.from_numpy(rng.random((30, 28, 26), dtype=np.float32))
    everything = tuple(slice(0, n) for n in volume.shape)
    for _ in range(20):
        matrix = Rotation.random(rng=rng).as_matrix() / rng.uniform(0.7, 1.4)
        start = tuple(int(n) for n in rng.integers(0, 14, 3))
        whole = functional.grid_sample(
            volume[None, None],
            sampling_grid(middle(start, (12, 10, 8)), (12, 10, 8), everything, matrix),
            align_corners=False,
        )[0, 0]
        inside = (slice(2, -2),) * 3  # beyond the scan's own border both read zeros, blended differently
        torch.testing.assert_close(
            sampled(volume, start, (12, 10, 8), matrix)[inside], whole[inside], atol=1e-4, rtol=0
        )


def test_linear_images_show_where_each_voxel_looks() -> None:
    """An image whose value is its own coordinate, sampled with a rotation and another scale per axis."""
    size, start = (9, 11, 13), (12, 10, 8)
    matrix = Rotation.from_euler("xyz", [10, -20, 30], degrees=True).as_matrix() * 0.9
    axes = [torch.arange(40.0)] * 3
    for axis, coordinate in enumerate(torch.meshgrid(*axes, indexing="ij")):
        got = sampled(coordinate, start, size, matrix)
        half = (np.array(size) - 1) / 2
        offsets = np.stack(np.meshgrid(*[np.arange(n) - h for n, h in zip(size, half, strict=True)], indexing="ij"))
        expected = start[axis] + half[axis] + np.tensordot(matrix[axis], offsets, 1)
        np.testing.assert_allclose(got.numpy(), expected, atol=2e-4)


def offsets(size: tuple[int, ...], mm: float) -> list[np.ndarray]:
    return [(np.arange(n) - (n - 1) / 2) * mm for n in size]


def test_equal_control_points_shift_everything_alike() -> None:
    nodes = np.ones((3, 8, 8, 8)) * np.array([1.0, -2.0, 0.5])[:, None, None, None]
    shifts = elastic_shifts(nodes, 16.0, offsets((5, 7, 9), 2.5))
    expected = torch.tensor([1.0, -2.0, 0.5])[:, None, None, None].expand(3, 5, 7, 9)
    torch.testing.assert_close(shifts, expected, rtol=1e-5, atol=1e-5)
    # Half a voxel of a volume whose value is its coordinate: what is read is half a voxel further.
    coordinate = torch.arange(30.0)[:, None, None].expand(30, 30, 30)
    size, centre = (6, 6, 6), [14.5, 14.5, 14.5]
    half = torch.tensor([0.5, 0, 0])[:, None, None, None].expand(3, *size)
    box = source_box(centre, size, coordinate.shape, np.eye(3), margin=(0.5, 0, 0))
    grid = sampling_grid(centre, size, box, np.eye(3), half)
    moved = functional.grid_sample(coordinate[box][None, None], grid, align_corners=False)[0, 0]
    torch.testing.assert_close(moved[:, 0, 0], torch.arange(12.0, 18.0) + 0.5, atol=1e-4, rtol=0)


def test_elastic_deformations_are_smooth_bounded_and_never_fold() -> None:
    """The largest that is allowed, by voxels of 1 mm: the Jacobian's determinant stays positive everywhere."""
    config = AugmentConfig(elastic_probability=1.0, elastic_spacing_mm=10.0, elastic_mm=4.0)
    change = draw_change(config, np.random.default_rng(3))
    assert change.nodes_mm is not None
    shifts = elastic_shifts(change.nodes_mm, 10.0, offsets((80, 80, 80), 1.0)).double().numpy()
    assert 1.5 < np.abs(shifts).max() <= 4.0
    jacobian = np.eye(3)[..., None, None, None] + np.stack([np.stack(np.gradient(shift)) for shift in shifts])
    determinant = np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1)))
    assert 0 < determinant.min() < 0.9
    part = elastic_shifts(change.nodes_mm, 10.0, [offset[20:30] for offset in offsets((80, 80, 80), 1.0)])
    np.testing.assert_allclose(part.numpy(), shifts[:, 20:30, 20:30, 20:30], atol=1e-5)
    with pytest.raises(ValidationError, match=r"elastic_mm 4\.1 could fold tissue onto itself; at most 4 goes"):
        AugmentConfig(elastic_mm=4.1, elastic_spacing_mm=10.0)


def test_source_box_outside_the_scan_is_never_empty() -> None:
    matrix = Rotation.from_euler("z", 40, degrees=True).as_matrix()
    box = source_box((31.5, 31.5, 31.5), (64, 64, 64), (5, 40, 40), matrix)
    assert all(part.stop > part.start for part in box)


def test_turned_flips_and_turns() -> None:
    sample = torch.arange(2 * 2 * 3).reshape(1, 2, 2, 3)
    assert torch.equal(turned(sample, Change(flips=(0, 2)), (2, 2, 3)), sample.flip(1, 3))
    assert torch.equal(turned(sample, Change(quarter_turns=1), (2, 2, 3)), torch.rot90(sample, 1, (1, 2)))
    oblong = torch.arange(2 * 4 * 3).reshape(1, 2, 4, 3)
    assert torch.equal(turned(oblong, Change(quarter_turns=1), (2, 4, 3)), oblong.flip(1, 2))


@pytest.mark.parametrize("size", [(4, 4, 5), (4, 6, 5)])
def test_parts_of_a_turned_sample_come_from_where_unturned_says(size: tuple[int, int, int]) -> None:
    sample = torch.arange(size[0] * size[1] * size[2]).reshape(1, *size)
    for turns, flips in itertools.product(range(4), ((), (0,), (1, 2), (0, 1, 2))):
        change = Change(flips=flips, quarter_turns=turns)
        whole = turned(sample, change, size)
        for region in ((slice(0, 1), slice(2, 4), slice(1, 5)), (slice(1, 4), slice(0, 3), slice(0, 2))):
            origin = unturned(region, size, change)
            part = turned(sample[(slice(None), *origin)], change, size)
            assert torch.equal(part, whole[(slice(None), *region)])


def test_draws_stay_in_their_ranges_and_off_is_off() -> None:
    config = AugmentConfig(flip_axes=(1,), rotate_degrees=12, scale=(0.8, 1.1), rotate90_probability=0.5)
    rng = np.random.default_rng(1)
    changes = [draw_change(config, rng) for _ in range(300)]
    matrices = [change.matrix_mm for change in changes if change.matrix_mm is not None]
    magnifications = np.array([np.linalg.det(matrix) ** (-1 / 3) for matrix in matrices])
    angles = [
        np.degrees(Rotation.from_matrix(matrix * magnification).magnitude())
        for matrix, magnification in zip(matrices, magnifications, strict=True)
    ]
    assert 110 < len(matrices) < 190
    assert 8 < max(angles) <= 12
    assert 0.8 <= magnifications.min() < 0.85
    assert 1.05 < magnifications.max() <= 1.1
    assert {change.flips for change in changes} == {(), (1,)}
    assert {change.quarter_turns for change in changes} == {0, 1, 2, 3}
    assert not any(change.mirrors for change in changes)
    assert all(draw_change(AugmentConfig.off(), rng) == Change() for _ in range(20))


def test_recoloured_is_gain_shift_and_bounded_noise() -> None:
    image = torch.rand(1, 8, 8, 8)
    rng = np.random.default_rng(2)
    all_of_it, size = (slice(0, 8),) * 3, (8, 8, 8)
    brighter = recoloured(image, Change(gain=1.1, shift=-0.05), rng, all_of_it, size)
    torch.testing.assert_close(brighter, image * 1.1 - 0.05)
    noise = recoloured(image, Change(noise=0.2), rng, all_of_it, size) - image
    assert 0.18 < noise.abs().max() <= 0.2 + 1e-6
    assert abs(noise.mean()) < 0.02


ALL_OF_IT = (slice(0, 8), slice(0, 9), slice(0, 8))


def test_blur_gamma_and_gaussian_noise() -> None:
    image = torch.rand(1, 8, 9, 8, generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(2)
    blurred = recoloured(image, Change(sigma=0.8), rng, ALL_OF_IT, (8, 9, 8))
    expected = gaussian_filter(image[0].numpy(), 0.8, mode="nearest", truncate=3)
    np.testing.assert_allclose(blurred[0].numpy(), expected, atol=1e-6)
    assert blurred.std() < 0.6 * image.std()
    darker = recoloured(image - 0.1, Change(gamma=2.0), rng, ALL_OF_IT, (8, 9, 8))
    torch.testing.assert_close(darker, (image - 0.1).clamp_min(0).square())
    noise = recoloured(image, Change(noise=0.2, noise_kind="gaussian"), rng, ALL_OF_IT, (8, 9, 8)) - image
    assert 0.17 < noise.std() < 0.23
    assert noise.abs().max() > 0.4


def test_half_the_resolution_keeps_slow_changes_and_loses_fast_ones() -> None:
    rng = np.random.default_rng(0)
    ramp = torch.arange(9.0)[None, None, :, None].expand(1, 8, 9, 8)
    coarse = recoloured(ramp, Change(coarse=(0, 1)), rng, ALL_OF_IT, (8, 9, 8))
    torch.testing.assert_close(coarse[:, :, 1:7], ramp[:, :, 1:7])
    stripes = (torch.arange(8) % 2).float()[None, :, None, None].expand(1, 8, 9, 8)
    assert (recoloured(stripes, Change(coarse=(0,)), rng, ALL_OF_IT, (8, 9, 8)) == 0.5).all()
    assert torch.equal(recoloured(stripes, Change(coarse=(2,)), rng, ALL_OF_IT, (8, 9, 8)), stripes)


@pytest.mark.parametrize("change", [Change(sigma=1.0), Change(coarse=(0, 2)), Change(sigma=0.7, coarse=(0, 1, 2))])
def test_a_widened_region_is_all_that_intensities_of_a_part_need(change: Change) -> None:
    size = (24, 15, 10)
    image = torch.rand(1, *size, generator=torch.Generator().manual_seed(1))
    rng = np.random.default_rng(0)
    whole = recoloured(image, change, rng, tuple(slice(0, n) for n in size), size)
    for region in ((slice(0, 7), slice(4, 9), slice(0, 10)), (slice(11, 18), slice(9, 15), slice(5, 6))):
        wide = widened(region, size, change)
        part = recoloured(image[(slice(None), *wide)], change, rng, wide, size)
        inner = [slice(r.start - w.start, r.stop - w.start) for r, w in zip(region, wide, strict=True)]
        torch.testing.assert_close(part[(slice(None), *inner)], whole[(slice(None), *region)])
    assert widened(region, size, Change(gamma=2.0)) == region


def test_left_right_flip_swaps_pairs() -> None:
    config = AugmentConfig(flip_axes=(0,), paired_labels=PAIR)
    assert label_swap(config, ORGANS).tolist() == [0, 1, 3, 2]


@pytest.mark.parametrize(
    ("organs", "config", "message"),
    [
        (ORGANS, {"flip_axes": (0,)}, r"\['ParotidLeft', 'ParotidRight'\] have a side and no twin in paired_labels"),
        (["Lung_L", "Lung_R"], {"flip_axes": (0,)}, "Lung_L"),
        (
            ["left eye", "right eye", "left ear"],
            {"flip_axes": (0,), "paired_labels": [("left eye", "right eye")]},
            "ear",
        ),
        (ORGANS, {"paired_labels": [("ParotidLeft", "ParotidRigth")]}, r"\['ParotidRigth'\] are not among the organs"),
        (ORGANS, {"paired_labels": [("ParotidLeft", "ParotidLeft")]}, "more than one place"),
    ],
)
def test_flips_that_would_mix_up_sides_are_refused(organs: list[str], config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        label_swap(AugmentConfig.model_validate(config), organs)


def test_flips_need_no_pairs_without_sides_or_along_other_axes() -> None:
    label_swap(AugmentConfig(flip_axes=(0, 1, 2)), ["Liver", "Tumour", "Gall_bladder"])
    label_swap(AugmentConfig(flip_axes=(1, 2)), ORGANS)


def test_configuration_is_checked() -> None:
    for bad in ({"flip": 1}, {"flip_axes": (3,)}, {"noise": -1}, {"flip_probability": 1.5}, {"scale": (1.2, 0.8)}):
        with pytest.raises(ValidationError):
            AugmentConfig.model_validate(bad)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Eye_AL", "Eye_AR"), ("Parotid L", "Parotid R"), ("Lt_Parotid", "Rt_Parotid"), ("Lung-L", "Lung-R"),
        ("ParotidL", "ParotidR"), ("Kidney_LT", "Kidney_RT"), ("l.eye", "r.eye"), ("LKidney", "RKidney"),
    ],
)  # fmt: skip
def test_sides_are_known_however_they_are_written(one: str, other: str) -> None:
    organs = ("Liver", "Rectum", "Heart", "Larynx", "Colon", one, other)
    with pytest.raises(ConfigError, match=re.escape(f"{[one, other]} have a side")):
        label_swap(AugmentConfig(flip_axes=(0,)), organs)
    swap = label_swap(AugmentConfig(flip_axes=(0,), paired_labels=((one, other),)), organs)
    assert swap.tolist() == [0, 1, 2, 3, 4, 5, 7, 6]
