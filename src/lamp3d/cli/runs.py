"""The commands that work on runs: demo, train, predict, evaluate, export, report; and bench."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.table import Table

from lamp3d.cli.common import DatasetFolder, Devices, app, command, console, draw, picture_option, say, sides
from lamp3d.data import write_phantom_dataset
from lamp3d.errors import ConfigError
from lamp3d.evaluate import Results
from lamp3d.experiment import ExperimentConfig, Run, evaluate, export, find_model, forecast, load_config, predict, train
from lamp3d.experiment.inference import Window
from lamp3d.report import time_line_picture, write_report
from lamp3d.scan import scan_files, scan_name

WindowOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="'whole', or the side of a sliding window, such as 64 or 64x64x32; default: as the config."),
]
MirrorOption = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option("--mirror/--no-mirror", help="Average over mirror images of the scan; default: as the run's config."),
]
DEMO_CONFIG = Path(__file__).parents[1] / "demo.yaml"
DEMO_SECONDS = 175.0
"""That the demo may take in all."""
DEMO_SECONDS_BESIDE = 45.0
"""Of these, for what no forecast of training counts: the start of the workers, validation, evaluation and report."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the phantoms and the run.")] = Path("demo"),
    devices: Devices = 2,
    seed: Annotated[int, typer.Option(help="Of the phantoms and of the training.")] = 0,
) -> None:
    """Phantom scans -> train on two devices -> predict -> evaluate -> report.html, in under three minutes."""
    begin = time.monotonic()
    phantoms, folder = out / "phantoms", out / "run"
    write_phantom_dataset(phantoms, train=24, validation=6, seed=seed)
    settings = [f"train.seed={seed}", f"cache={json.dumps(str(out / 'cache'))}"]
    resume = (folder / "last.safetensors").exists()
    config = load_config(folder / "config.yaml" if resume else DEMO_CONFIG, settings)
    if not resume:
        seconds = sum(stage.seconds for stage in forecast(phantoms, config, devices))
        config = _shortened(config, seconds, DEMO_SECONDS - DEMO_SECONDS_BESIDE - (time.monotonic() - begin))
    run = train(phantoms, config, devices, folder, resume=resume)
    results = evaluate(run, phantoms, "validation", devices=devices)
    console.print(_results_table(results))
    say(f"{time.monotonic() - begin:.0f} s in all. Report: {write_report(folder)}")


def _shortened(config: ExperimentConfig, seconds: float, limit_seconds: float) -> ExperimentConfig:
    """The demo's configuration with fewer epochs, where this machine would train for longer than is left."""
    share = max(limit_seconds, 0) / seconds
    if share >= 1:
        return config
    say(
        f"This machine would train for some {seconds:.0f} s: the demo takes {share:.0%} of the epochs, and learns less."
    )
    stages = [
        stage.model_copy(update={"epochs": max(1, round(share * stage.epochs))}) for stage in config.train.curriculum
    ]
    return config.model_copy(update={"train": config.train.model_copy(update={"curriculum": tuple(stages)})})


@app.command("train")
def train_command(
    dataset: DatasetFolder,
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="KEY=VALUE", help="Settings instead of the configuration's, such as train.seed=1."),
    ] = None,
    config: Annotated[Optional[Path], typer.Option(help="YAML file.")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="Run folder; default: runs/NAME of the config.")] = None,  # noqa: UP045
    devices: Devices = 1,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out.")] = False,
    auto_replan: Annotated[bool, typer.Option(help="If memory runs out, go on with the next safer plan.")] = False,
    timeline: Annotated[Optional[Path], picture_option("A step of every stage.")] = None,  # noqa: UP045
) -> None:
    """Train through the curriculum; leaves a run folder that predict, evaluate and report take."""
    if config is None:
        if not (resume and out is not None):
            raise ConfigError("give --config FILE, or --resume with --out RUN; experiments/ has files to start from.")
        config = out / "config.yaml"
    folder = out or Path("runs") / config.stem
    run = train(dataset, load_config(config, overrides or []), devices, folder, resume=resume, auto_replan=auto_replan)
    if timeline is not None:
        draw(time_line_picture(run.time_lines()), timeline)
        say(f"Time lines: {timeline}; for chrome://tracing: {folder / 'timelines'}")
    scored = run.splits is not None and run.splits.get("validation")
    best = command("evaluate", run.folder, dataset) if scored else f"{command('predict', run.folder)} SCAN --out FOLDER"
    say(f"Done. Next: {best}; {command('report', run.folder)}")


@app.command("predict")
def predict_command(
    paths: Annotated[
        list[Path], typer.Argument(metavar="[RUN] SCAN", help="Run folder, then NIfTI files or DICOM folders.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the label maps.")],
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Instead of a run: a model that comes with lamp3d, or the folder of an exported one."),
    ] = None,
    window: WindowOption = None,
    devices: Devices = 1,
    mirror: MirrorOption = None,
    overwrite: Annotated[bool, typer.Option(help="Replace label maps that are there.")] = False,
) -> None:
    """Label maps of scans, each on its scan's own grid."""
    run, scans = (paths[0], paths[1:]) if model is None else (find_model(model), paths)
    if not scans:
        raise ConfigError("no scans: give a run folder and at least one scan, or --model NAME and scans.")
    opened = Run.open(run)
    if model is not None and opened.config.network.kind == "own":
        raise ConfigError(
            f"{model} names code to make its network, {opened.config.network.name}, and models are not to run any: if "
            f"you trust it, {command('predict', run, 'SCAN')}."
        )
    done = predict(
        opened,
        _scans_by_name(scans, len(opened.channels)),
        out,
        window=_window(window),
        devices=devices,
        mirror=mirror,
        overwrite=overwrite,
    )
    for prediction in done:
        say(f"{prediction.path}  {prediction.seconds:.2f} s")
    names = ", ".join(f"{label} {organ}" for label, organ in enumerate(opened.organs, start=1))
    say(f"Labels: {names}")


def _scans_by_name(paths: list[Path], channels: int) -> dict[str, tuple[Path, ...]]:
    scans = [scan_files(path, channels) for path in paths]
    others = {file for files in scans for file in files[1:]}  # which a glob finds as well
    scans = [files for files in scans if files[0] not in others]
    by_name: dict[str, tuple[Path, ...]] = {}
    for files in scans:
        name = scan_name(*files)
        if name in by_name:
            first = by_name[name][0]
            raise ConfigError(f"{first} and {files[0]} would share {name}.nii.gz; predict them into different folders.")
        by_name[name] = files
    return by_name


@app.command("evaluate")
def evaluate_command(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    dataset: DatasetFolder,
    split: Annotated[str, typer.Option(help="Which cases: train, validation or test.")] = "validation",
    window: WindowOption = None,
    devices: Devices = 1,
    mirror: MirrorOption = None,
    tolerance_mm: Annotated[float, typer.Option(help="Of the surface Dice.")] = 2.0,
) -> None:
    """Predict a split and score it: Dice, HD95 and surface Dice per organ and case, in results.json."""
    results = evaluate(
        Run.open(run), dataset, split, window=_window(window), devices=devices, mirror=mirror, tolerance_mm=tolerance_mm
    )
    console.print(_results_table(results))
    say(f"Results: {run / 'results.json'}")


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    dest: Annotated[Path, typer.Argument(help="New folder.")],
    name: Annotated[str, typer.Option(help="Of the model, for its card.")],
    data: Annotated[str, typer.Option(help="What it was trained on, for its card.")],
    licence: Annotated[str, typer.Option(help="Of the weights, for its card.")],
) -> None:
    """A run made small enough to hand on: weights in half precision, settings, and a model card."""
    say(f"Model: {export(Run.open(run), dest, name=name, data=data, licence=licence)}; use it with --model.")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    dataset: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="Where the evaluated dataset is now; default: where it was."),
    ] = None,
) -> None:
    """One self-contained page: curves, scores, plans and pictures."""
    say(f"Report: {write_report(run, dataset=dataset)}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context, name: Annotated[str, typer.Argument(help="Folder in benchmarks/; its options follow.")]
) -> None:
    """Run one of the repository's benchmarks (from a checkout)."""
    root = Path(__file__).parents[3]
    if not (root / "benchmarks" / name / "run.py").exists():
        known = ", ".join(sorted(path.parent.name for path in root.glob("benchmarks/*/run.py"))) or "none: no checkout"
        raise ConfigError(f"no benchmark {name!r} in {root / 'benchmarks'}; there are: {known}.")
    # A process of its own: benchmarks start workers, which import the module that was run.
    started = [sys.executable, "-m", f"benchmarks.{name}.run", *context.args]
    raise typer.Exit(subprocess.run(started, cwd=root, check=False).returncode)


def _window(text: str | None) -> Window:
    if text is None:
        return None
    return "whole" if text == "whole" else sides(text)


def _results_table(results: Results) -> Table:
    table = Table(title=f"{len(results.cases)} cases, {results.split} split")
    table.add_column("organ")
    for column in ("cases", "Dice", "HD95 mm", "surface Dice", "missed"):
        table.add_column(column, justify="right")

    def text(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    for organ, summary in results.organs.items():
        dice, hd95, surface = summary.dice, summary.hd95_mm, summary.surface_dice
        table.add_row(
            organ, str(dice.n), text(dice.mean, 3), text(hd95.mean, 1), text(surface.mean, 3), str(summary.missed)
        )
    table.add_row("mean", "", text(results.mean_dice, 3), "", "", "")
    return table
