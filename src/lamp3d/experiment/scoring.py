"""Evaluation: a split predicted with a run's best weights, and scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lamp3d.data import Case, Dataset
from lamp3d.data.store import check_label
from lamp3d.errors import ConfigError, DatasetError
from lamp3d.evaluate import CaseResult, Results, evaluate_case, summarise
from lamp3d.experiment.inference import Window, predict, progress_bar, window_sides
from lamp3d.experiment.run import Run
from lamp3d.train import Checkpoint
from lamp3d.volume import read_grid, read_volume


def evaluate(
    run: Run,
    dataset_root: Path,
    split: str,
    *,
    window: Window = None,
    devices: int = 1,
    mirror: bool | None = None,
    tolerance_mm: float = 2.0,
) -> Results:
    """Predict a split with contours and score it; leaves ``predictions/SPLIT/`` and ``results.json`` in the run folder.

    Those of another split that are there are kept, as ``results-SPLIT.json``.

    Args:
        run: whose best weights predict.
        dataset_root: folder in Decathlon layout with the organs that the run was trained on.
        split: "validation", "test", …
        window: sides of a sliding window, or "whole" volumes; None: as the run's configuration says.
        devices: worker processes.
        mirror: average over the scans' mirror images; None: as the run's configuration says.
        tolerance_mm: of the surface Dice.

    Raises:
        ConfigError: the tolerance is not possible.
        DatasetError: another dataset's organs or channels, an unknown or empty split, or cases without contours.
    """
    if not 0 <= tolerance_mm < math.inf:
        raise ConfigError(f"a tolerance of {tolerance_mm} mm is not possible; give a number from 0 on.")
    dataset = run.read_dataset(dataset_root)
    cases = _labelled(dataset, split, run)
    _check_contours(cases, dataset.organs)
    folder = run.folder / "predictions" / split
    mirror = run.config.predict.mirror if mirror is None else mirror
    predictions = predict(
        run,
        {case.name: case.images for case in cases},
        folder,
        window=window,
        devices=devices,
        mirror=mirror,
        overwrite=True,
    )
    results = []
    with progress_bar() as progress:
        for case, prediction in progress.track(
            list(zip(cases, predictions, strict=True)), description="Scoring", total=len(cases)
        ):
            assert case.label is not None
            scores = evaluate_case(
                read_volume(prediction.path),
                read_volume(case.label),
                dataset.organs,
                case.annotated,
                tolerance_mm=tolerance_mm,
            )
            results.append(
                CaseResult(name=case.name, organs=scores, seconds=prediction.seconds, peak_bytes=prediction.peak_bytes)
            )
    summary = summarise(
        results,
        dataset.organs,
        split=split,
        settings={
            "dataset": str(dataset.root.resolve()),
            "checkpoint": run.best.name,
            "checkpoint_epochs": Checkpoint(run.best).progress.get("epochs"),
            "window": list(window_sides(run, window) or ()) or "whole",
            "devices": devices,
            "mirror": mirror,
            "largest_part": list(run.config.predict.largest_part),
            "tolerance_mm": tolerance_mm,
        },
    )
    _keep_other_split(run.folder / "results.json", split)
    summary.save(run.folder / "results.json")
    return summary


def _keep_other_split(path: Path, split: str) -> None:
    """The scores of another split than this one make room under its name, such as results-validation.json."""

    def named_after(split: str) -> Path:
        return path.with_stem(f"{path.stem}-{split.replace('/', '-')}")

    try:
        before = Results.load(path).split
    except DatasetError:  # there are none, or none that this version reads
        before = split
    if before != split:
        path.replace(named_after(before))
    named_after(split).unlink(missing_ok=True)  # older ones of this split, that had made room


def _labelled(dataset: Dataset, split: str, run: Run) -> tuple[Case, ...]:
    others, own = dataset.channels, run.channels
    if len(others) != len(own) or (others != own and sorted(others) == sorted(own)):
        raise DatasetError(
            f"{dataset.root} has scans of {', '.join(others)}, but the run was trained on {', '.join(own)}; evaluate "
            "it on a dataset with the same channels, in the same order."
        )
    if dataset.organs != run.organs:
        raise DatasetError(
            f"{dataset.root} has the organs {', '.join(dataset.organs)}, but the run was trained on "
            f"{', '.join(run.organs)}; evaluate it on a dataset with the same labels."
        )
    cases = dataset.split(split)
    if not cases:
        raise DatasetError(
            f"split {split!r} is empty, there is nothing to score: give another --split, write `splits` into "
            f"dataset.json, or train with a configuration that keeps cases for it, such as split: {{{split}: 0.2}}."
        )
    if bare := [case.name for case in cases if case.label is None]:
        raise DatasetError(f"cases of split {split!r} have no contours to compare with: {', '.join(bare[:5])}.")
    return cases


def _check_contours(cases: Sequence[Case], organs: tuple[str, ...]) -> None:
    """What cannot be scored is better known before everything is predicted."""
    with progress_bar() as progress:
        for case in progress.track(cases, description="Reading contours"):
            assert case.label is not None
            label, grid = read_volume(case.label), read_grid(case.images[0])
            check_label(case, label.grid if grid is None else grid, label, organs)
