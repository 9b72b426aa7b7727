"""Prediction with a run's best weights, on as many devices as wanted."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lamp3d.data.augment import label_swap
from lamp3d.data.preprocess import PreparedScan, PreprocessConfig, largest_shape
from lamp3d.errors import ConfigError, LampError, PlanError, ScanError
from lamp3d.experiment.run import Run
from lamp3d.graph import trace
from lamp3d.nets import Network, UShape
from lamp3d.parallel import Engine, launch
from lamp3d.plan import Plan, make_plan
from lamp3d.plan.hardware import device_memory, device_type, has_fast_bf16
from lamp3d.plan.inference import Sharing, numbers_at_once, share_out
from lamp3d.plan.slabs import Slabs
from lamp3d.predict import Predictor, check_window, single_parts
from lamp3d.scan import read_scan
from lamp3d.sides import Shape3, largest_padded, sides_or_none
from lamp3d.train import load_weights
from lamp3d.volume import read_grid, write_nifti

Window = Shape3 | Literal["whole"] | None
"""Sides of a sliding window, or whole volumes; None: as the run's configuration says."""

Files = tuple[Path, ...]
"""Of one scan, as `lamp3d.scan.read_scan` takes them."""


@dataclass(frozen=True)
class Prediction:
    """A label map that was written, and what it cost the devices that had a part in it."""

    path: Path
    seconds: float
    peak_bytes: tuple[int, ...]


@dataclass(frozen=True)
class _Part:
    """What one rank has to say of one scan."""

    wrote: bool
    seconds: float
    peak_bytes: int
    problem: LampError | None = None


def predict(
    run: Run,
    scans: Mapping[str, Files],
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
        scans: NIfTI files or DICOM folders, one with all channels or one a channel; by the names of their label maps.
        out: the folder.
        window: sides of a sliding window, or "whole" volumes; None: as the run's configuration says.
        devices: worker processes.
        mirror: average over the scan's mirror images; None: as the run's configuration says.
        overwrite: whether label maps that are there already may be replaced.

    Raises:
        ConfigError: the run has no weights, it has not seen mirror images, its network cannot take such windows, a
            scan is absent, or a label map is there already or would replace a scan.
        ScanError: scans cannot be read or prepared; all others are done.
        PlanError: a scan is larger than the devices have memory for; all others are done.
    """
    if not run.best.exists():
        raise ConfigError(f"{run.folder} has no checkpoint yet; train first.")
    mirror = run.config.predict.mirror if mirror is None else mirror
    settings = _predictor_settings(run, mirror)
    targets = [out / f"{name}.nii.gz" for name in scans]
    sources = {file.resolve() for files in scans.values() for file in files}
    if lost := [str(target) for target in targets if target.resolve() in sources]:
        raise ConfigError(f"the label map of {lost[0]} would replace the scan itself; choose another --out.")
    if not overwrite and (there := [str(target) for target in targets if target.exists()]):
        raise ConfigError(f"{', '.join(there[:3])} exists already; add --overwrite, or choose another --out.")
    if absent := [str(file) for files in scans.values() for file in files if not file.exists()]:
        raise ConfigError(f"no scan at {', '.join(absent[:3])}.")
    out.mkdir(parents=True, exist_ok=True)
    network, usual = run.network().eval(), _plan_to_predict_like(run)
    sides = window_sides(run, window)
    check_window(sides, network)
    sharing = None
    if sides is None:
        sharing = _sharing(network, usual, run.config.preprocess, list(scans.values()), devices, mirror)
        settings["most_voxels"] = sharing.most_voxels
        Console().print(f"{sharing}.", highlight=False, soft_wrap=True)
    plan = _inference_plan(network, usual, devices, sides, len(scans), sharing)
    pairs = list(zip(scans.values(), targets, strict=True))
    results = launch(_predict_worker, devices, (run.folder, plan, pairs, {"window": sides, **settings}))
    predictions, problems = [], []
    for index, target in enumerate(targets):
        parts = [parts[index] for parts in results if index in parts]
        if (problem := parts[0].problem) is not None:  # which all have alike
            problems.append(problem)
            continue
        (seconds,) = (part.seconds for part in parts if part.wrote)
        predictions.append(Prediction(target, seconds, tuple(part.peak_bytes for part in parts)))
    if problems:
        others = [f"All others are labelled, in {out}."] if predictions else []
        raise type(problems[0])("\n".join([*map(str, problems), *others]))
    return predictions


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


def window_sides(run: Run, window: Window) -> Shape3 | None:
    """Those of a sliding window; None for whole volumes."""
    return run.config.predict.window_shape if window is None else sides_or_none(window)


def _plan_to_predict_like(run: Run) -> Plan:
    """The last stage's; but in fp32 where bf16 is emulated, which takes fifty times as long."""
    last = run.plans()[-1]
    return last if has_fast_bf16(device_type()) else last.model_copy(update={"precision": "fp32"})


def _sharing(
    network: Network, usual: Plan, preprocess: PreprocessConfig, scans: Sequence[Files], devices: int, mirrored: bool
) -> Sharing:
    """How whole scans are best shared out, by their headers; where those say nothing, by the volumes of training."""
    grids = [grid for scan in scans if (grid := read_grid(scan[0])) is not None]
    shapes: list[tuple[int, ...]] = [largest_shape(grid, preprocess) for grid in grids] or [usual.image_shape[2:]]
    sides = largest_padded(shapes, network.divisor)
    ways = share_out(
        network, (1, usual.image_shape[1], *sides), len(scans), devices,
        precision=usual.precision, channels_last=usual.channels_last, limit=device_memory(device_type(), devices),
        mirrored=mirrored,
    )  # fmt: skip
    return ways[0]


def _inference_plan(
    network: Network, usual: Plan, devices: int, window: Shape3 | None, scans: int, sharing: Sharing | None
) -> Plan:
    """The usual plan where it is one for single volumes of this network in the same way, otherwise one of its own.

    Windows follow each other through pipelines, of which there are as many as keep all devices busy.
    """
    data = numbers_at_once(scans, devices)[-1] if sharing is None else sharing.at_once
    slabs = Slabs() if sharing is None else sharing.slabs
    if (devices, data, slabs.mesh, slabs.dims, device_type()) != (
        usual.devices, usual.data, usual.space, usual.space_dims, usual.device_type,
    ) or not _has_cells_of(usual, network):  # fmt: skip
        # There is one way to cut a network into one stage, so that a small volume shows it as well as a large one,
        # where the network takes both.
        sides = [2 * network.divisor] * 3
        if data * slabs.count < devices or not isinstance(network, UShape):
            sides = list(window or usual.image_shape[2:])
        for size, dim in zip(slabs.mesh, slabs.dims, strict=True):
            sides[dim - 2] *= size + 1  # the longest
        same_layout = usual.channels_last if usual.device_type == device_type() else None
        usual = make_plan(
            network, (data, usual.image_shape[1], *sides), devices, data=data, space=slabs.mesh or 1,
            precision=usual.precision, channels_last=same_layout, repeats=1,
            memory="unlimited",  # what a training step needs is not asked here
        )  # fmt: skip
    in_flight = 1 if window is None else 2 * devices // data
    return usual.model_copy(update={"micro_batches": in_flight, "recompute": "never"})


def _has_cells_of(plan: Plan, network: Network) -> bool:
    """Whether the network is divided in this plan: in evaluation, some are others than in training."""
    if isinstance(network, UShape):
        return True
    return [cell.name for cell in trace(network, plan.image_shape).cells] == plan.cells


def _predict_worker(
    folder: Path, plan: Plan, pairs: list[tuple[Files, Path]], settings: dict[str, Any]
) -> dict[int, _Part]:
    run = Run.open(folder)
    network = run.network()
    load_weights(network, run.best)
    engine = Engine(network.eval(), plan)
    predictor = Predictor(engine, run.config.preprocess, network.divisor, classes=1 + len(run.organs), **settings)
    importlib.import_module("monai.transforms")  # now, so that the first scan takes no longer than the others
    parts = {}
    own = range(engine.replica, len(pairs), plan.data)  # replicas share the scans
    shown = predictor.holds_result and engine.replica == 0
    with progress_bar(hidden=not shown) as progress:
        for index in progress.track(own, description="Predicting"):
            scan, target = pairs[index]
            begin = time.perf_counter()
            try:
                prepared = _prepared(predictor, scan, run.channels)
            except (ScanError, PlanError) as problem:
                parts[index] = _Part(False, time.perf_counter() - begin, engine.peak_bytes(), problem)
                continue
            labels = predictor.predict(prepared)
            if labels is not None:
                write_nifti(labels, target, overwrite=True)
            seconds = time.perf_counter() - begin
            parts[index] = _Part(predictor.holds_result, seconds, engine.peak_bytes())
    return parts


def _prepared(predictor: Predictor, scan: Files, channels: Sequence[str]) -> PreparedScan:
    volumes = read_scan(scan, channels)  # what is wrong with a file names it
    try:
        return predictor.prepare(volumes)
    except ScanError as error:
        raise ScanError(f"{scan[0]}: {error}; give a scan like those that the run was trained on") from error
    except PlanError as error:
        raise PlanError(f"{scan[0]}: {error}") from error


def progress_bar(hidden: bool = False) -> Progress:
    """Of cases or scans, one after the other."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), disable=hidden
    )
