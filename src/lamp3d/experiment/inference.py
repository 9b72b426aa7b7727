"""Prediction and evaluation with a run's best weights, on as many devices as wanted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lamp3d.data import Case, Dataset
from lamp3d.data.augment import label_swap
from lamp3d.errors import ConfigError, DatasetError
from lamp3d.evaluate import CaseResult, Results, evaluate_case, summarise
from lamp3d.experiment.run import Run
from lamp3d.parallel import Engine, launch
from lamp3d.plan import Plan, make_plan
from lamp3d.plan.hardware import device_type
from lamp3d.predict import Predictor, single_parts
from lamp3d.train import Checkpoint, load_weights
from lamp3d.volume import read_volume, scan_name, write_nifti

Window = tuple[int, int, int] | None


@dataclass(frozen=True)
class Prediction:
    """A label map that was written, and what it cost."""

    path: Path
    seconds: float
    peak_bytes: tuple[int, ...]


def predict(
    run: Run,
    scans: Sequence[Path],
    out: Path,
    *,
    window: Window = None,
    devices: int = 1,
    mirror: bool | None = None,
    overwrite: bool = False,
) -> list[Prediction]:
    """Write the label map of every scan, on the scan's own grid, to ``out``.

    Args:
        run: whose best weights predict.
        scans: NIfTI files or DICOM folders.
        out: the folder; label maps are named after the scans.
        window: sides of a sliding window; None: whole volumes.
        devices: worker processes.
        mirror: average over the scan's mirror images; None: as the run's configuration says.
        overwrite: whether label maps that are there already may be replaced.

    Raises:
        ConfigError: the run has no weights, it has not seen mirror images, two scans have one name, or a label map is
            there already.
        ScanError: a scan cannot be read; those before it are done.
    """
    if not run.best.exists():
        raise ConfigError(f"{run.folder} has no checkpoint yet; train first.")
    mirror = run.config.predict.mirror if mirror is None else mirror
    settings = _predictor_settings(run, mirror)
    targets = [out / f"{scan_name(scan)}.nii.gz" for scan in scans]
    if len(set(targets)) < len(targets):
        raise ConfigError("several scans have the same name; predict them into different folders.")
    if not overwrite and (there := [str(target) for target in targets if target.exists()]):
        raise ConfigError(f"{', '.join(there[:3])} exists already; add --overwrite, or choose another --out.")
    for scan in scans:
        if not scan.exists():
            raise ConfigError(f"no scan at {scan}.")
    out.mkdir(parents=True, exist_ok=True)
    plan = _inference_plan(run, devices, window)
    pairs = list(zip(scans, targets, strict=True))
    results = launch(_predict_worker, devices, (run.folder, plan, pairs, {"window": window, **settings}))
    return next(result for result in results if result is not None)


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

    Args:
        run: whose best weights predict.
        dataset_root: folder in Decathlon layout with the organs that the run was trained on.
        split: "validation", "test", …
        window: sides of a sliding window; None: whole volumes.
        devices: worker processes.
        mirror: average over the scans' mirror images; None: as the run's configuration says.
        tolerance_mm: of the surface Dice.

    Raises:
        DatasetError: another dataset's organs, an unknown split, or cases without contours.
    """
    dataset = run.read_dataset(dataset_root)
    cases = _labelled(dataset, split, run)
    folder = run.folder / "predictions" / split
    mirror = run.config.predict.mirror if mirror is None else mirror
    predictions = predict(
        run, [case.image for case in cases], folder, window=window, devices=devices, mirror=mirror, overwrite=True
    )
    results = []
    with _progress() as progress:
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
            "window": "whole" if window is None else list(window),
            "devices": devices,
            "mirror": mirror,
            "largest_part": list(run.config.predict.largest_part),
            "tolerance_mm": tolerance_mm,
        },
    )
    summary.save(run.folder / "results.json")
    return summary


def _labelled(dataset: Dataset, split: str, run: Run) -> tuple[Case, ...]:
    if dataset.organs != run.organs:
        raise DatasetError(
            f"{dataset.root} has the organs {', '.join(dataset.organs)}, but the run was trained on "
            f"{', '.join(run.organs)}; evaluate it on a dataset with the same labels."
        )
    cases = dataset.split(split)
    if bare := [case.name for case in cases if case.label is None]:
        raise DatasetError(f"cases of split {split!r} have no contours to compare with: {', '.join(bare[:5])}.")
    return cases


def _predictor_settings(run: Run, mirror: bool) -> dict[str, Any]:
    """What a `Predictor` is told of mirror images and of organs in one piece."""
    config = run.config
    if mirror and not config.augment.flip_axes:
        raise ConfigError(f"{run.folder} was trained without flips (augment.flip_axes): predict without mirror images.")
    return {
        "mirror_axes": config.augment.flip_axes if mirror else (),
        "twins": label_swap(config.augment, run.organs) if mirror else None,
        "single_parts": single_parts(config.predict, run.organs),
    }


def _inference_plan(run: Run, devices: int, window: Window) -> Plan:
    """The last stage's plan where it is one for single volumes on as many devices, otherwise one of its own.

    A whole volume is shared by all devices; windows follow each other through a pipeline.
    """
    last = run.plans()[-1]
    space = devices if window is None else 1
    same = (last.devices, last.data, last.slabs, last.device_type) == (devices, 1, space, device_type())
    if not same:
        network = run.network()
        # There is one way to cut a network into one stage, so that a small volume shows it as well as a large one.
        sides = last.image_shape[2:] if devices > 1 else (2 * network.divisor,) * 3
        same_layout = last.channels_last if last.device_type == device_type() else None
        shape = (1, last.image_shape[1], *sides)
        last = make_plan(
            network, shape, devices, space=space, precision=last.precision, channels_last=same_layout, repeats=1,
            memory="unlimited",  # what a training step needs is not asked here
        )  # fmt: skip
    in_flight = 1 if window is None else 2 * devices
    return last.model_copy(update={"micro_batches": in_flight, "recompute": "never"})


def _predict_worker(
    folder: Path, plan: Plan, pairs: list[tuple[Path, Path]], settings: dict[str, Any]
) -> list[Prediction] | None:
    run = Run.open(folder)
    network = run.network()
    load_weights(network, run.best)
    engine = Engine(network.eval(), plan)
    predictor = Predictor(engine, run.config.preprocess, network.divisor, classes=1 + len(run.organs), **settings)
    predictions = []
    with _progress(hidden=not predictor.holds_result) as progress:
        for scan, target in progress.track(pairs, description="Predicting"):
            begin = time.perf_counter()
            labels = predictor.predict(read_volume(scan))
            if labels is not None:
                write_nifti(labels, target, overwrite=True)
            seconds = time.perf_counter() - begin
            predictions.append(Prediction(target, seconds, _peaks(engine)))
    return predictions if predictor.holds_result else None


def _peaks(engine: Engine) -> tuple[int, ...]:
    if engine.world_size == 1:
        return (engine.peak_bytes(),)
    peaks: list[int | None] = [None] * engine.world_size
    dist.all_gather_object(peaks, engine.peak_bytes())
    return tuple(peak or 0 for peak in peaks)


def _progress(hidden: bool = False) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), disable=hidden
    )
