import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_surface_dice
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial import cKDTree

from lamp3d import evaluate, surfaces
from lamp3d.errors import DatasetError, ScanError
from lamp3d.evaluate import CaseResult, OrganScore, Results, dice_per_organ, evaluate_case, summarise
from lamp3d.volume import Volume

ORGANS = ("Left", "Right", "Middle")


def labels(boxes, shape=(24, 24, 24), spacing=(1.0, 1.0, 1.0)):
    """A label map with box (slices or tuples of start, stop) number k + 1 filled with k + 1."""
    data = np.zeros(shape, np.uint8)
    for label, box in boxes.items():
        for part in box if isinstance(box, list) else [box]:
            data[tuple(slice(*axis) for axis in part)] = label
    return Volume(data, np.diag([*spacing, 1.0]))


def cube(start, size=6):
    return tuple((s, s + size) for s in start)


def test_a_perfect_prediction():
    truth = labels({1: cube((2, 2, 2)), 2: cube((10, 10, 10)), 3: cube((17, 2, 3), size=1)})
    assert evaluate_case(truth, truth, ORGANS, ORGANS) == {
        organ: OrganScore(dice=1, hd95_mm=0, surface_dice=1) for organ in ORGANS
    }


@pytest.mark.parametrize(("axis", "millimetres"), [(0, 1.0), (1, 2.0), (2, 4.0)])
def test_a_shifted_cube_by_hand(axis, millimetres):
    """One voxel's shift of a cube of 6: Dice is 5/6, the surfaces are one voxel apart along that axis."""
    start = [4, 4, 4]
    truth = labels({1: cube(start)}, spacing=(1.0, 2.0, 4.0))
    start[axis] += 1
    prediction = labels({1: cube(start)}, spacing=(1.0, 2.0, 4.0))
    score = evaluate_case(prediction, truth, ORGANS, {"Left"}, tolerance_mm=3.0)["Left"]
    assert score.dice == pytest.approx(5 / 6)
    assert score.hd95_mm == pytest.approx(millimetres)
    if millimetres <= 3.0:
        assert score.surface_dice == 1
    else:
        assert 0.5 < score.surface_dice < 1


def test_hd95_takes_the_worse_direction():
    """A second cube that only the prediction has: 16 of 112 predicted surface voxels are 12 mm off, the farthest."""
    truth = labels({1: cube((1, 1, 1), size=4)})
    prediction = labels({1: [cube((1, 1, 1), size=4), cube((13, 1, 1), size=4)]})
    score = evaluate_case(prediction, truth, ORGANS, {"Left"})["Left"]
    assert score.hd95_mm == pytest.approx(12)
    assert score.dice == pytest.approx(2 / 3)
    # The same surface once in the contours and twice in the prediction, two of the three within the tolerance.
    assert score.surface_dice == pytest.approx(2 / 3)


def test_surface_dice_weighs_by_area():
    """Two plates of equal voxel count, 4 mm and 1 mm wide: missing the wide one costs more than half."""
    plates = [((2, 12), (2, 3), (2, 12)), ((2, 3), (8, 18), (2, 12))]
    spacing = (4.0, 1.0, 4.0)
    truth = labels({1: plates}, spacing=spacing)
    thin = evaluate_case(labels({1: plates[1]}, spacing=spacing), truth, ORGANS, {"Left"})["Left"]
    wide = evaluate_case(labels({1: plates[0]}, spacing=spacing), truth, ORGANS, {"Left"})["Left"]
    assert thin.dice == wide.dice == pytest.approx(2 / 3)
    assert wide.surface_dice > 0.85 > 0.5 > thin.surface_dice


def blob(seed, shape=(20, 18, 16)):
    """A random mask with a rough surface, touching no border."""
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.5)
    mask = noise > np.quantile(noise, 0.8)
    for axis in range(3):
        mask[tuple(slice(None) if k != axis else [0, 1, -2, -1] for k in range(3))] = False
    return mask


def surface_points(mask, spacing):
    """The voxels of a mask that have a neighbour outside it, in mm."""
    return np.argwhere(mask & ~binary_erosion(mask)) * spacing


@pytest.mark.parametrize("seed", range(4))
def test_hd95_is_that_of_point_sets(seed):
    """By nearest neighbours among the surface voxels instead of distance maps: the worse of both directions' 95 %."""
    spacing = np.array([1.0, 2.5, 1.5])
    one, other = blob(seed), blob(seed + 100)
    a, b = surface_points(one, spacing), surface_points(other, spacing)
    expected = max(np.percentile(cKDTree(b).query(a)[0], 95), np.percentile(cKDTree(a).query(b)[0], 95))
    affine = np.diag([*spacing, 1.0])
    prediction, truth = (Volume(mask.astype(np.uint8), affine) for mask in (one, other))
    score = evaluate_case(prediction, truth, ORGANS, {"Left"})
    assert score["Left"].hd95_mm == pytest.approx(expected, rel=1e-5)


def surface_corners(mask):
    """Voxels' corners where the surface passes, and the area of the faces there: a quarter of each of twelve."""
    window = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 1).astype(np.int8), (2, 2, 2))
    area = sum(np.abs(np.diff(window, axis=axis)).sum((3, 4, 5)) for axis in (3, 4, 5)) / 4
    return np.argwhere(area > 0), area[area > 0]


@pytest.mark.parametrize("seed", range(4))
def test_surface_dice_is_that_of_nearest_corners(seed):
    """By nearest neighbours; the areas are those of voxels' faces, MONAI's those of marching cubes: within 0.02."""
    one, other = blob(seed), np.roll(blob(seed), (1, -1, 1), (0, 1, 2)) | blob(seed + 100)
    (a, area_a), (b, area_b) = surface_corners(one), surface_corners(other)
    near_a, near_b = cKDTree(b).query(a)[0] <= 1.5, cKDTree(a).query(b)[0] <= 1.5
    expected = (area_a[near_a].sum() + area_b[near_b].sum()) / (area_a.sum() + area_b.sum())
    prediction, truth = (Volume(mask.astype(np.uint8), np.eye(4)) for mask in (one, other))
    score = evaluate_case(prediction, truth, ORGANS, {"Left"}, tolerance_mm=1.5)["Left"]
    assert 0.3 < expected < 0.95
    assert score.surface_dice == pytest.approx(expected, abs=0.02)


def test_absent_organs_follow_the_table():
    truth = labels({1: cube((2, 2, 2))})
    prediction = labels({2: cube((10, 10, 10))})
    scores = evaluate_case(prediction, truth, ORGANS, ORGANS)
    assert scores["Left"] == OrganScore(dice=0, hd95_mm=None, surface_dice=0)
    assert scores["Right"] == OrganScore(dice=0, hd95_mm=None, surface_dice=0)
    assert scores["Middle"] == OrganScore(dice=None, hd95_mm=None, surface_dice=None)
    assert list(evaluate_case(prediction, truth, ORGANS, {"Right"})) == ["Right"]


def test_grids_must_agree():
    truth = labels({1: cube((2, 2, 2))})
    with pytest.raises(ScanError, match=r"\(24, 24, 20\)"):
        evaluate_case(labels({1: cube((2, 2, 2))}, shape=(24, 24, 20)), truth, ORGANS, ORGANS)
    with pytest.raises(ScanError, match=r"up to 23\.0 mm away from the contours"):
        evaluate_case(labels({1: cube((2, 2, 2))}, spacing=(1, 1, 2)), truth, ORGANS, ORGANS)


def test_quick_dice_agrees_with_monai_and_with_the_full_evaluation():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4, 9, 10, 11, generator=generator)
    truth = torch.randint(0, 4, (1, 1, 9, 10, 11), generator=generator)
    annotated = torch.tensor([[False, True, False, True]])
    quick = dice_per_organ(logits, truth, annotated)
    monai = compute_dice(logits.argmax(1, keepdim=True), truth, include_background=False, num_classes=4)[0]
    assert quick.dtype == torch.float64
    assert math.isnan(quick[1])
    torch.testing.assert_close(quick[[0, 2]], monai[[0, 2]].double(), rtol=1e-6, atol=0)

    prediction = Volume(logits.argmax(1)[0].numpy().astype(np.uint8), np.eye(4))
    scores = evaluate_case(prediction, Volume(truth[0, 0].numpy(), np.eye(4)), ORGANS, ["Left", "Middle"])
    assert [score.dice for score in scores.values()] == quick[[0, 2]].tolist()


def test_quick_dice_of_absent_organs():
    logits = torch.zeros(3, 4, 4, 4)
    logits[1, :2] = 1
    truth = torch.zeros(4, 4, 4, dtype=torch.uint8)
    dice = dice_per_organ(logits, truth, torch.tensor([True, True, True]))
    assert dice[0] == 0
    assert math.isnan(dice[1])


def case(name, **dice):
    return CaseResult(
        name=name,
        organs={
            organ: OrganScore(dice=value, hd95_mm=2.0 if value else None, surface_dice=value)
            for organ, value in dice.items()
        },
        seconds=1.5,
        peak_bytes=(10, 20),
    )


def test_summary_and_json_round_trip(tmp_path: Path):
    cases = [case("a", Left=0.5, Right=0.0), case("b", Left=1.0, Right=None), case("c", Left=0.9)]
    results = summarise(cases, ORGANS, split="validation", settings={"window": "whole", "devices": 2})
    left, right, middle = (results.organs[organ] for organ in ORGANS)
    assert left.dice.mean == pytest.approx(0.8)
    assert (left.dice.median, left.dice.n, left.missed) == (0.9, 3, 0)
    assert (right.dice.mean, right.dice.n, right.missed) == (0, 1, 1)
    assert right.hd95_mm.mean is None
    assert (middle.dice.mean, middle.dice.n) == (None, 0)
    assert results.mean_dice == pytest.approx(0.4)
    assert results.cases[1].mean_dice == 1.0

    path = tmp_path / "run" / "results.json"
    results.save(path)
    results.save(path)
    assert Results.load(path) == results
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    assert json.loads(path.read_text())["cases"][1]["organs"]["Right"]["dice"] is None


def test_results_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(DatasetError, match="lamp3d evaluate"):
        Results.load(tmp_path / "results.json")
    (tmp_path / "results.json").write_text('{"split": 1}')
    with pytest.raises(DatasetError, match="evaluate again"):
        Results.load(tmp_path / "results.json")


def test_a_large_scan_takes_well_under_a_second_an_organ():
    centres = np.indices((128, 128, 128)) - 64
    ball = (centres**2).sum(0) < 20**2
    truth = Volume(ball.astype(np.uint8), np.diag([4.0, 4.0, 2.5, 1.0]))
    prediction = Volume(np.roll(truth.data, 1, axis=0), truth.affine)
    evaluate_case(prediction, truth, ORGANS, {"Left"})
    start = time.perf_counter()
    score = evaluate_case(prediction, truth, ORGANS, {"Left"})["Left"]
    assert time.perf_counter() - start < 20  # a guard against what takes minutes: other tests share the cores
    assert score.hd95_mm == pytest.approx(4, abs=1)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI's own, within MONAI
@pytest.mark.parametrize("at_once", [1, 1000, 1 << 22])
def test_surface_dice_is_monais_however_few_planes_are_scored_at_once(monkeypatch, at_once):
    monkeypatch.setattr(surfaces, "AT_ONCE", at_once)
    monkeypatch.setattr(evaluate, "AT_ONCE", at_once)
    spacing = (1.0, 1.5, 2.5)
    rng = np.random.default_rng(5)
    one, other = (gaussian_filter(rng.standard_normal((30, 24, 20)), 2) > 0.02 for _ in range(2))
    other[-1, 0, 0] = True  # a speck at the other end, and masks that touch the border
    affine = np.diag([*spacing, 1.0])
    prediction, truth = (Volume(mask.astype(np.uint8), affine) for mask in (one, other))
    scores = evaluate_case(prediction, truth, ["Left"], ["Left"])
    monais = compute_surface_dice(
        torch.from_numpy(one)[None, None], torch.from_numpy(other)[None, None], [2.0], include_background=True,
        spacing=spacing, use_subvoxels=True,
    )  # fmt: skip
    assert 0.1 < float(monais) < 0.95
    assert scores["Left"].surface_dice == pytest.approx(float(monais), abs=1e-6)
    assert scores["Left"].dice == pytest.approx(2 * (one & other).sum() / (one.sum() + other.sum()))
