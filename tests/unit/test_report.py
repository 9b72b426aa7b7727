import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from lamp3d.errors import ConfigError, DatasetError, ScanError
from lamp3d.evaluate import CaseResult, Results, evaluate_case, summarise
from lamp3d.plan import DevicePlan, Plan, StagePlan
from lamp3d.report import overlay_picture, plan_picture, write_report
from lamp3d.report.figures import learning_curves
from lamp3d.train import EpochRecord, read_history
from lamp3d.volume import Volume, write_nifti

ORGANS = ("BrainStem", "ParotidLeft", "ParotidRight", "Chiasm")
CASES = ("p1", "p2", "p3", "p4", "p5")


def head(seed: int, spacing=(6.0, 5.0, 7.0)) -> tuple[Volume, Volume]:
    """An ellipsoidal head with ellipsoidal organs, in RAS; the patient's left parotid is at smaller x."""
    shape = (36, 40, 30)
    generator = np.random.default_rng(seed)
    grid = np.moveaxis(np.indices(shape), 0, -1) * spacing - (np.array(shape) - 1) * np.array(spacing) / 2

    def ellipsoid(centre, radii):
        return (((grid - centre) / radii) ** 2).sum(-1) < 1

    def place(*centre):
        return np.array(centre) + generator.normal(0, 2, 3)

    data = np.full(shape, -1000.0)
    data[ellipsoid((0, 0, 0), (80, 92, 98))] = 40
    skull = ellipsoid((0, 0, 30), (68, 80, 62)) & ~ellipsoid((0, 0, 30), (62, 74, 56))
    data[skull] = 900
    labels = np.zeros(shape, np.uint8)
    labels[ellipsoid(place(0, -10, 0), (14, 14, 30))] = 1
    labels[ellipsoid(place(-62, -5, -25), (12, 18, 28))] = 2
    labels[ellipsoid(place(62, -5, -25), (12, 18, 28))] = 3
    labels[ellipsoid(place(0, 10, 18), (9, 6, 5))] = 4
    data[labels == 1] += 12
    data[(labels == 2) | (labels == 3)] -= 45
    affine = np.diag([*spacing, 1.0])
    return Volume((data + generator.normal(0, 15, shape)).astype(np.int16), affine), Volume(labels, affine)


def make_plan(micro_batches: int) -> Plan:
    stages = tuple(
        StagePlan(
            rank=rank, first_cell=7 * rank, last_cell=7 * rank + 6, cells=tuple(f"level{k}.conv" for k in range(7)),
            forward_seconds=0.08 + 0.01 * rank, backward_seconds=0.17, weight_seconds=0.0,
            parameter_bytes=4_000_000 * (rank + 1), sent_bytes=12_000_000 * (1 - rank),
        )
        for rank in range(2)
    )  # fmt: skip
    return Plan(
        network="UNet", input_shape=(micro_batches, 1, 48, 48, 48), devices=2, device_type="cpu",
        micro_batches=micro_batches, schedule="gpipe", recompute="never", precision="fp32", channels_last=False,
        memory_limit_bytes=2_000_000_000, stages=stages, step_seconds=1.3, bubble=0.2,
        per_device=tuple(DevicePlan(saved_bytes=5 * 10**8, peak_bytes=peak) for peak in (900_000_000, 700_000_000)),
    )  # fmt: skip


def write_history(run: Path) -> None:
    """Two stages of nine epochs, every second one validated, the chiasm unknown at first."""
    best = 0.0
    with (run / "history.jsonl").open("w") as file:
        for i in range(18):
            dice = {organ: 0.9 - 0.1 * k - 0.8 * math.exp(-(i + 1) / (4 + k)) for k, organ in enumerate(ORGANS)}
            mean = sum(dice.values()) / len(dice)
            best = max(best, mean)
            record = EpochRecord(
                stage=1 + i // 9, epoch=1 + i % 9, step=20 * (i + 1), loss=3 * math.exp(-i / 6) if i else None, lr=1e-3,
                seconds_per_step=0.5 + i // 9, volume_share=0.5 if i < 9 else 1,
                peak_bytes=[800_000_000, 700_000_000], bad_steps=i == 3, bad_cases={"p2": 1} if i == 3 else {},
                dice={**dice, ORGANS[-1]: None if i < 4 else mean} if i % 2 else None,
                mean_dice=mean if i % 2 else None, best_dice=best,
            )  # fmt: skip
            file.write(record.model_dump_json() + "\n")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    entries = []
    for seed, name in enumerate(CASES):
        image, label = head(seed)
        write_nifti(image, root / "imagesTr" / f"{name}.nii.gz")
        write_nifti(label, root / "labelsTr" / f"{name}.nii.gz")
        annotated = ORGANS if seed % 2 else ORGANS[:3]
        paths = {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"}
        entries.append({**paths, "annotated": annotated})
    labels = {"0": "background"} | {str(k + 1): organ for k, organ in enumerate(ORGANS)}
    content = {"name": "Heads", "labels": labels, "training": entries, "splits": {"train": [], "validation": CASES}}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory) -> Path:
    """A finished run whose predictions are the contours, shifted more from case to case."""
    run = tmp_path_factory.mktemp("runs") / "heads-unet16"
    (run / "plans").mkdir(parents=True)
    for stage, micro_batches in enumerate((6, 1)):
        make_plan(micro_batches).save(run / "plans" / f"stage-{stage + 1}.json")
    write_history(run)
    (run / "config.yaml").write_text("network:\n  kind: unet\n  filters: 16\ntrain:\n  precision: fp32\n  seed: 0\n")
    (run / "versions.json").write_text('{"lamp3d": "0.1.0", "torch": "2.13.0", "seed": 0}')
    cases = []
    for seed, name in enumerate(CASES):
        _, truth = head(seed)
        prediction = Volume(np.roll(truth.data, seed, axis=2), truth.affine)
        write_nifti(prediction, run / "predictions" / "validation" / f"{name}.nii.gz")
        annotated = ORGANS if seed % 2 else ORGANS[:3]
        scores = evaluate_case(prediction, truth, ORGANS, annotated)
        cases.append(CaseResult(name=name, organs=scores, seconds=0.4 + seed / 10, peak_bytes=(10**8, 2 * 10**8)))
    settings = {"dataset": str(dataset), "tolerance_mm": 2.0, "window": "whole", "checkpoint": "best.safetensors"}
    summarise(cases, ORGANS, split="validation", settings=settings).save(run / "results.json")
    return run


def test_the_page_is_complete_and_self_contained(run: Path):
    path = write_report(run)
    page = path.read_text()
    assert path == run / "report.html"
    # Charts: scores, curves, and two of each of the two plans. Pictures: best, median and worst case.
    assert page.count("data:image/svg+xml;base64,") == 6
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    assert "src=" not in page.replace('src="data:', "")
    for text in ("heads-unet16", "mean Dice", "p1", "p5", "UNet", "2.13.0", "filters: 16", "ParotidLeft", "resident"):
        assert text in page
    ranked = sorted(Results.load(run / "results.json").cases, key=lambda case: case.mean_dice, reverse=True)
    for rank, place in (("best", 0), ("median", 2), ("worst", 4)):
        assert f'<span class="tag">{rank}</span><b>{ranked[place].name}</b>' in page
    assert "None" not in page
    assert write_report(run).read_text() == page


def test_a_prediction_for_the_largest_volume_is_scaled_to_the_mean(run: Path):
    assert re.findall(r'<td>([\d.]+)</td>\s*<td class="wrap">800', write_report(run).read_text()) == ["0.65", "1.3"]


def test_a_run_without_evaluation_shows_its_training(run: Path, tmp_path: Path):
    (tmp_path / "history.jsonl").write_text((run / "history.jsonl").read_text())
    page = write_report(tmp_path).read_text()
    assert page.count("data:image/svg+xml") == 1
    assert "Scores by organ" not in page


def test_a_plan_is_told_in_full(run: Path, tmp_path: Path):
    """Its mesh, of which the pictures show one pipeline, and the cells in its blocks."""
    (tmp_path / "history.jsonl").write_text((run / "history.jsonl").read_text())
    blocks = (("level0.conv", "level1.conv"), ("level3.conv",))
    plan = make_plan(4).model_copy(update={"data": 2, "devices": 4, "recompute": blocks})
    plan.save(tmp_path / "plans" / "stage-0.json")
    page = " ".join(write_report(tmp_path).read_text().split())
    assert "2 replicas × 2 cpu, of which the first pipeline is shown; gpipe" in page
    assert "recompute 3 cells in 2 blocks" in page
    assert "of which" not in write_report(run).read_text()


def test_one_is_no_plural_and_none_is_a_score(run: Path, tmp_path: Path):
    epoch = read_history(run)[0].model_copy(update={"dice": {"A": 0.0}, "mean_dice": 0.0})
    (tmp_path / "history.jsonl").write_text(epoch.model_dump_json() + "\n")
    page = write_report(tmp_path).read_text()
    assert "1 epoch in 1 curriculum stage</p>" in page
    assert "<b>0.000</b><span>best validation Dice</span><small>in 1 epoch</small>" in page


def test_pictures_scroll_where_the_window_is_too_narrow_to_read_them(run: Path):
    page = write_report(run).read_text()
    assert page.count('<div class="scroll"><img') == page.count("data:image/svg+xml")
    assert ".scroll img, .scan img { min-width" in page


def test_missing_scans_leave_a_note_in_place_of_the_picture(run: Path, tmp_path: Path):
    (tmp_path / "results.json").write_text((run / "results.json").read_text())
    page = write_report(tmp_path).read_text()
    assert page.count("No picture:") == 3
    with pytest.raises(DatasetError, match=r"dataset\.json: no such file"):
        write_report(tmp_path, dataset=tmp_path / "absent")


def test_a_dataset_that_has_moved_is_told_where_it_is(run: Path, dataset: Path, tmp_path: Path):
    results = json.loads((run / "results.json").read_text())
    results["settings"]["dataset"] = str(tmp_path / "before")
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    assert write_report(tmp_path / "run").read_text().count("If the dataset has moved: lamp3d report RUN DATASET") == 3
    assert write_report(tmp_path / "run", dataset=dataset).read_text().count("data:image/png") == 3


def test_another_datasets_pictures_are_not_drawn(run: Path, dataset: Path, tmp_path: Path):
    """Where the organs have another order, their colours would be wrong."""
    shutil.copytree(dataset, tmp_path / "turned")
    content = json.loads((dataset / "dataset.json").read_text())
    content["labels"] |= {"1": ORGANS[1], "2": ORGANS[0]}
    (tmp_path / "turned" / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="were evaluated"):
        write_report(run, dataset=tmp_path / "turned")


def test_settings_are_said_in_words(run: Path, tmp_path: Path):
    settings = {"mirror": False, "largest_part": [], "window": [64, 64, 32], "checkpoint_epochs": None}
    results = Results.load(run / "results.json")
    summarise(results.cases, ORGANS, split="validation", settings=settings).save(tmp_path / "results.json")
    page = write_report(tmp_path).read_text()
    for name, value in (
        ("mean over mirror images", "no"), ("only the largest part of", "none"), ("epochs trained", "–"),
        ("prediction window (voxels)", "64 × 64 × 32"),
    ):  # fmt: skip
        assert f"{name}</dt><dd>{value}</dd>" in page


def test_a_step_is_forward_and_backward_and_the_sum_of_gradients(run: Path, tmp_path: Path):
    """One number is no other: the time line ends before the gradients are summed."""
    (tmp_path / "history.jsonl").write_text((run / "history.jsonl").read_text())
    plan = make_plan(1)
    seconds = plan.time_line().seconds
    plan.model_copy(update={"step_seconds": seconds + 0.25, "reduce_seconds": 0.25}).save(
        tmp_path / "plans" / "stage-0.json"
    )
    page = " ".join(write_report(tmp_path).read_text().split())
    assert f"predicted {seconds + 0.25:.3g} s a step, of which 0.25 s to sum the gradients" in page
    assert plan_picture(plan).axes[0].get_title("left").startswith(f"Forward and backward, predicted: {seconds:.3g} s")
    assert "sum the gradients" not in write_report(run).read_text()


def test_names_are_escaped(run: Path, tmp_path: Path):
    results = json.loads((run / "results.json").read_text())
    results["cases"][0]["name"] = "<script>alert(1)</script>"
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "<script>" not in write_report(tmp_path).read_text()


def test_what_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"neither history\.jsonl nor"):
        write_report(tmp_path)
    (tmp_path / "history.jsonl").write_text('{"stage": 0}\n')
    with pytest.raises(ConfigError, match="no epoch of a run"):
        write_report(tmp_path)


def views(figure):
    """The pixel arrays of the axial, coronal and sagittal view, rows from bottom to top."""
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


def test_overlay_hangs_any_grid_like_a_radiologist():
    """The same head on a flipped, transposed grid gives the same views; the patient's right is on the left."""
    image, truth = head(0)
    bright = image.data.copy()
    bright[truth.data == 3] = 3000  # the right parotid
    image = Volume(bright, image.affine)
    permutation = np.array([[0, 0, -1, 29], [-1, 0, 0, 35], [0, 1, 0, 0], [0, 0, 0, 1]], float)
    turned = [
        Volume(v.data[::-1, :, ::-1].transpose(2, 0, 1), v.affine @ np.linalg.inv(permutation)) for v in (image, truth)
    ]
    straight = overlay_picture(image, truth, truth, ORGANS)
    for a, b in zip(views(straight), views(overlay_picture(*turned, turned[1], ORGANS)), strict=True):
        np.testing.assert_array_equal(a, b)

    axial, coronal, sagittal = views(straight)
    columns = np.flatnonzero((axial > 2000).any(axis=0))
    assert columns.size
    assert columns.max() < axial.shape[1] / 2
    skull = (coronal > 600) & (coronal < 2000)
    assert skull[coronal.shape[0] // 2 :].sum() > 1.5 * skull[: coronal.shape[0] // 2].sum()
    for axes, (width, height) in zip(straight.axes, ((6, 5), (6, 7), (5, 7)), strict=True):
        x0, x1, y0, y1 = axes.images[0].get_extent()
        rows, columns = np.asarray(axes.images[0].get_array()).shape
        assert ((x1 - x0) / columns, (y1 - y0) / rows) == (width, height)
        assert (*axes.get_xlim(), *axes.get_ylim()) == (x0, x1, y0, y1)  # else the views' scales would differ
    assert sagittal.shape[0] == coronal.shape[0]


def test_overlay_without_labels_and_with_foreign_ones(tmp_path: Path):
    image, truth = head(1)
    overlay_picture(image, None, None, ORGANS, window=(-160, 240), title="p2").savefig(tmp_path / "bare.png")
    assert (tmp_path / "bare.png").stat().st_size > 10_000
    empty = Volume(np.zeros_like(truth.data), truth.affine)
    overlay_picture(image, truth, empty, ORGANS)
    overlay_picture(image, empty, truth, ORGANS)
    with pytest.raises(ScanError, match="the contours of shape"):
        overlay_picture(image, Volume(truth.data[1:], truth.affine), None, ORGANS)
    elsewhere = truth.affine.copy()
    elsewhere[0, 3] += 20
    with pytest.raises(ScanError, match=r"the prediction lies up to 20\.0 mm away"):
        overlay_picture(image, truth, Volume(truth.data, elsewhere), ORGANS)


@pytest.mark.parametrize(("voxel_mm", "bar"), [(2.0, "10 mm"), (14.0, "50 mm"), (0.1, "1 mm")])
def test_the_scale_bar_fits_the_scan(voxel_mm: float, bar: str):
    image = np.arange(18.0**3).reshape(18, 18, 18)
    axial = overlay_picture(Volume(image, np.diag([voxel_mm] * 3 + [1.0])), None, None, ORGANS).axes[0]
    assert bar in [text.get_text() for text in axial.texts]
    assert max(axial.lines[-1].get_xdata()) < axial.get_xlim()[1]


@pytest.mark.parametrize("best", [0.01, 0.504, 0.99])
@pytest.mark.parametrize("epochs", [1, 3])
def test_nothing_is_written_over_the_curves(run: Path, best: float, epochs: int):
    scores = {"dice": {"A": best}, "mean_dice": best}
    history = [epoch.model_copy(update=scores) for epoch in read_history(run)[:epochs]]
    figure = learning_curves(history, ["A"])
    figure.draw_without_rendering()
    for axes in figure.axes:
        inside, title = axes.get_window_extent(), axes._left_title.get_window_extent()
        for text in axes.texts:
            assert not text.get_window_extent().overlaps(inside)
            assert not text.get_window_extent().overlaps(title)
        assert all(tick == int(tick) for tick in axes.get_xticks())  # epochs
    legend = figure.axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["A", f"mean, best {best:.3f}"]
    assert not legend.get_window_extent().overlaps(figure.axes[1].get_window_extent())


def test_a_distance_is_said_to_be_of_the_organs_that_have_one(run: Path, tmp_path: Path):
    results = Results.load(run / "results.json")
    for case in results.cases:
        if "Chiasm" in case.organs:
            case.organs["Chiasm"] = case.organs["Chiasm"].model_copy(update={"hd95_mm": None})
    summarise(results.cases, ORGANS, split="validation", settings={}).save(tmp_path / "results.json")
    assert "mean over 3 of 4 organs" in write_report(tmp_path).read_text()
    assert "mean over organs" in write_report(run).read_text()


@pytest.mark.parametrize(("hd95_mm", "text"), [(2.0, "2.00 mm"), (34.56, "34.6 mm"), (151.84, "152 mm")])
def test_numbers_have_room_on_their_cards(run: Path, tmp_path: Path, hd95_mm: float, text: str):
    results = Results.load(run / "results.json")
    for case in results.cases:
        for name, scores in case.organs.items():
            case.organs[name] = scores.model_copy(update={"hd95_mm": hd95_mm})
    summarise(results.cases, ORGANS, split="validation", settings={}).save(tmp_path / "results.json")
    assert f"<b>{text}</b><span>HD95</span>" in write_report(tmp_path).read_text()


def test_plan_picture_draws_every_action(tmp_path: Path):
    figure = plan_picture(make_plan(micro_batches=4))
    assert len(figure.axes[0].patches) == 2 * 2 * 4
    figure.savefig(tmp_path / "plan.svg")
