"""Running a study: one run after another, each resumable, each leaving one JSON file."""

from __future__ import annotations

import shutil
import subprocess
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from torch.distributed.elastic.multiprocessing import SignalException

from lamp3d.data import read_dataset
from lamp3d.errors import ConfigError, DatasetError, LampError
from lamp3d.experiment import ExperimentConfig, Run, evaluate, forecast, predict, train
from lamp3d.experiment.config import parse_config
from lamp3d.experiment.planning import voxels_seen
from lamp3d.files import claimed, write_text
from lamp3d.nets import Network
from lamp3d.plan.hardware import device_name, device_type
from lamp3d.predict import check_window
from lamp3d.study.config import Row, StudyConfig, Window, load_study, read_saved, run_name, saved_study
from lamp3d.study.result import PredictionTimes, RowTimings, RunResult, read_results, unfinished
from lamp3d.train import read_history

VALIDATION, TEST = "validation", "test"

Say = Callable[[str], object]


@dataclass(frozen=True)
class RowForecast:
    """What one run of a row will take.

    Attributes:
        row: it.
        seeds: how many runs it has.
        steps, voxels: of one run.
        seconds: of one run's steps, predicted for this machine.
    """

    row: Row
    seeds: int
    steps: int
    voxels: int
    seconds: float


def plan_study(path: Path, dataset: Path, devices: int) -> list[RowForecast]:
    """What every row of a study will take; scans are prepared, nothing is trained.

    Raises:
        LampError: a configuration or the dataset is not what it should be, or a plan does not fit.
    """
    study, configs = load_study(path)
    found = []
    for row in study.rows:
        stages = forecast(dataset, configs[row.name], devices)
        steps, voxels = sum(stage.steps for stage in stages), sum(stage.voxels for stage in stages)
        seeds = len(row.seeds or study.seeds)
        found.append(RowForecast(row, seeds, steps, voxels, sum(stage.seconds for stage in stages)))
    return found


def run_study(path: Path, dataset: Path, out: Path, devices: int, say: Say = print) -> None:
    """Do all runs of a study that are neither done nor being done by another process on the same folder.

    Weights are chosen on the validation split, and scored there; the test split is for `score_test_split`.

    Args:
        path: the study's file.
        dataset: folder of the dataset.
        out: gets ``runs/`` (run folders), ``results/`` (one JSON file a run) and ``study.yaml``.
        devices: worker processes of every run.
        say: tells how it goes.

    Raises:
        ConfigError: ``out`` holds runs of a row with other settings.
        DatasetError: the dataset cannot be read, or has no validation cases.
        LampError: some runs failed, all others are done; the message says which.
    """
    study, configs = load_study(path)
    _remember(study, configs, out)
    for row in study.rows:
        scans = read_dataset(dataset, configs[row.name].split)
        _check_windows(row, study, configs[row.name].network.outline(scans.n_classes, len(scans.channels)))
        if not scans.splits.get(VALIDATION):
            raise DatasetError(
                f"row {row.name}: {dataset} has no validation cases, which choose the weights and are compared; take "
                "some with split.validation, or name them in `splits` of dataset.json."
            )
    failed: list[str] = []
    runs = study.runs()
    for number, (row, seed) in enumerate(runs, start=1):
        name = run_name(row.name, seed)
        result = out / "results" / f"{name}.json"
        config = configs[row.name]
        config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
        with claimed(out / "runs" / f"{name}.lock") as mine:
            if result.exists():  # asked here, for another process may have come to it a moment ago
                continue
            if not mine:
                say(f"Run {number} of {len(runs)}: {name} is being done by another process")
                continue
            say(f"Run {number} of {len(runs)}: {name}")
            try:
                _run(study, row, seed, config, dataset, out / "runs" / name, devices).save(result)
            except LampError as error:
                failed.append(name)
                say(f"{name} failed: {error}")
            except SignalException:  # whoever stops the study stops it
                raise
            except Exception:  # a night's other runs are worth more than an early end
                failed.append(name)
                say(f"{name} failed, which is a fault of lamp3d's or of the machine:\n{traceback.format_exc()}")
    if failed:
        raise LampError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; the others are done.")


def score_test_split(out: Path, dataset: Path, devices: int) -> None:
    """Score all runs on the test split, once; what was interrupted goes on, with the same runs.

    Raises:
        ConfigError: it was done before, or begun with other runs; or some runs are not finished.
    """
    tested = out / TEST
    begun = tested / ".unfinished"  # with the runs that are to be scored: none comes in when others have been seen
    study, results = saved_study(out), read_results(out / "results")
    windows = {row.name: row.window for row in study.rows}
    results = [result for result in results if result.row in windows]  # others have been left out of the study
    names = "\n".join(result.name for result in results)
    if any(tested.glob("*.json")) and not (begun.exists() and begun.read_text("utf-8") == names):
        raise ConfigError(f"{tested} is there: test cases are looked at once, when everything is decided.")
    if missing := unfinished(study, results):
        raise ConfigError(f"not finished: {', '.join(missing)}. Test cases are looked at once: run the study first.")
    write_text(begun, names)
    for result in results:
        target = tested / f"{result.name}.json"
        if target.exists():
            continue
        run = Run.open(out / "runs" / result.name)
        scored = evaluate(
            run, dataset, TEST, window=windows[result.row], devices=devices, tolerance_mm=study.tolerance_mm
        )
        result.model_copy(update={"split": TEST, "cases": scored.cases}).save(target)
    begun.unlink()


def time_predictions(out: Path, say: Say = print) -> None:
    """Time every row's predictions, in every way that the study names, by the first of its runs that is done.

    A machine that does nothing else is wanted, hence not a part of the runs. Rows that were timed are not timed again.

    Args:
        out: the study's folder; gets ``timings/``, one JSON file a row.
        say: tells how it goes.

    Raises:
        ConfigError: ``out`` holds no study.
        DatasetError: there are fewer validation cases than devices to time.
        ScanError: a scan cannot be read.
    """
    study = saved_study(out)
    for row in study.rows:
        target = out / "timings" / f"{row.name}.json"
        if target.exists():
            continue
        names = [run_name(row.name, seed) for seed in row.seeds or study.seeds]
        done = [
            name for name in names if (out / "results" / f"{name}.json").exists() and (out / "runs" / name).exists()
        ]
        if not done:
            say(f"{row.name} has no run that is done")
            continue
        say(f"Timing {row.name}")
        _timings(study, row, Run.open(out / "runs" / done[0])).save(target)


def _remember(study: StudyConfig, configs: dict[str, ExperimentConfig], out: Path) -> None:
    """Keep the study with its results, and refuse to mix them with those of another one."""
    path = out / "study.yaml"
    now = {name: config.model_dump(mode="json") for name, config in configs.items()}
    written: dict[str, Any] = {}
    if path.exists():
        saved, written = read_saved(out)
        # As read, so that a setting that has come to lamp3d since then counts as left at its default.
        before = {name: parse_config(yaml.safe_dump(config), str(path)) for name, config in written.items()}
        scored, to_score = _how_scored(saved), _how_scored(study)
        begun = {run.name.rpartition("-")[0] for folder in ("runs", "results") for run in (out / folder).glob("*")}
        changed = [
            name
            for name in sorted(begun & set(before) & set(configs))
            if before[name] != configs[name] or scored.get(name, to_score[name]) != to_score[name]
        ]
        if changed:
            raise ConfigError(
                f"{out} holds runs of {', '.join(changed)} with other settings; choose another --out, or give the rows "
                "new names."
            )
    # Rows that are in the study no more are remembered: they may come back.
    text = yaml.safe_dump({"study": study.model_dump(mode="json"), "configs": written | now}, sort_keys=False)
    write_text(path, text)


def _how_scored(study: StudyConfig) -> dict[str, tuple[object, ...]]:
    return {row.name: (row.window, study.tolerance_mm) for row in study.rows}


def _check_windows(row: Row, study: StudyConfig, network: Network) -> None:
    for window in (row.window, *study.windows_of(row)):
        try:
            check_window(window, network)
        except ConfigError as error:
            raise ConfigError(f"row {row.name}: {error}") from None


def _run(
    study: StudyConfig, row: Row, seed: int, config: ExperimentConfig, dataset: Path, folder: Path, devices: int
) -> RunResult:
    run = train(dataset, config, devices, folder, resume=(folder / "last.safetensors").exists())
    scored = evaluate(run, dataset, VALIDATION, window=row.window, devices=devices, tolerance_mm=study.tolerance_mm)
    history = read_history(folder)
    steps = [epoch.step - before for epoch, before in zip(history, [0, *(e.step for e in history)], strict=False)]
    best = max((e for e in history if e.mean_dice is not None), key=lambda e: e.mean_dice or 0.0, default=None)
    own = run.read_dataset()
    cases, store = own.split("train"), run.store(own)
    return RunResult(
        row=row.name,
        network=row.network,
        input=row.input,
        seed=seed,
        control_of=row.control_of,
        split=VALIDATION,
        config=run.config.model_dump(mode="json"),
        versions=yaml.safe_load((folder / "versions.json").read_text("utf-8")),
        commit=_commit(),
        parameters=run.parameters,
        steps=history[-1].step,
        bad_steps=sum(epoch.bad_steps for epoch in history),
        voxels=sum(voxels_seen(stage, store, cases) for stage in config.train.curriculum),
        train_seconds=sum(n * epoch.seconds_per_step for n, epoch in zip(steps, history, strict=True)),
        best_epoch=None if best is None else 1 + history.index(best),
        best_dice=None if best is None else best.mean_dice,
        organs=own.organs,
        cases=scored.cases,
    )


def _timings(study: StudyConfig, row: Row, run: Run) -> RowTimings:
    """Predictions of the same validation cases in every way; one before them warms every device up."""
    dataset = run.read_dataset()
    cases, first = dataset.split(VALIDATION), max(study.timed_devices)
    if len(cases) < first:
        raise DatasetError(
            f"{dataset.root} has {len(cases)} validation case(s), but {first} devices take one each to warm up: lower "
            "timed_devices in the study, or take more cases with split.validation."
        )
    timings = []
    windows: list[Window | Literal["whole"]] = ["whole", *study.windows_of(row)]
    for devices in study.timed_devices:
        scans = {case.name: case.images for case in cases[first - devices : first + study.timed_cases]}
        for window in windows:
            target = run.folder / "predictions" / "timed"
            found = predict(run, scans, target, window=window, devices=devices, overwrite=True)
            timings.append(
                PredictionTimes(
                    window=window if window == "whole" else "x".join(map(str, window)),
                    devices=devices,
                    seconds=tuple(prediction.seconds for prediction in found[devices:] or found),
                    peak_bytes=max(peak for prediction in found for peak in prediction.peak_bytes),
                )
            )
    return RowTimings(
        row=row.name,
        network=row.network,
        input=row.input,
        device=device_name(device_type()),
        timings=tuple(timings),
    )


def _commit() -> str | None:
    """That of lamp3d's own repository; None where it is not in one, be it installed within somebody else's."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=here.parent, capture_output=True, text=True, check=False).stdout.strip()

    if shutil.which("git") is None or not git("ls-files", here.name):
        return None
    return git("rev-parse", "HEAD") or None
