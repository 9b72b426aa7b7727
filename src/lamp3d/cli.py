"""The command line: ``lamp3d demo | plan | verify | train | predict | evaluate | report | bench``."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Optional

import torch
import typer
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.distributed.elastic.multiprocessing import SignalException

from lamp3d.data import write_phantom_dataset
from lamp3d.errors import ConfigError, LampError
from lamp3d.evaluate import Results
from lamp3d.experiment import NetworkConfig, Run, evaluate, load_config, load_network, predict, train, verify
from lamp3d.plan import SCHEDULES, Plan, format_bytes, make_plan, parse_bytes
from lamp3d.report import plan_picture, time_line_picture, write_report
from lamp3d.volume import write_atomically

app = typer.Typer(
    help="Large 3D segmentation networks on whole volumes, spread over devices automatically.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()

Devices = Annotated[int, typer.Option(min=1, help="Worker processes, one a device.")]
WindowOption = Annotated[str, typer.Option(help="'whole', or the side of a sliding window, such as 64 or 64x64x32.")]
VERIFY_TOLERANCES = {"float64": 1e-10, "float32": 1e-5}
DEMO_CONFIG = Path(__file__).with_name("demo.yaml")


def main() -> None:
    """Run a command; an error that the user can put right is one message and exit status 2."""
    try:
        app()
    except LampError as error:
        _stop(str(error))
    except OSError as error:
        if error.filename is None:  # else it is about a path, such as a file where --out wants a folder
            raise
        _stop(f"{error.filename}: {error.strerror}.")
    except SignalException as error:  # what torch's launcher makes of SIGINT and SIGTERM
        name = signal.Signals(error.sigval).name
        _stop(f"stopped by {name}; a training run goes on with --resume.", 128 + error.sigval)


def _stop(message: str, status: int = 2) -> NoReturn:
    stderr = Console(stderr=True, highlight=False)
    # A worker that was killed leaves half a progress bar and a hidden cursor (nothing is written where no terminal is).
    stderr.control(Control(ControlType.SHOW_CURSOR, ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
    # As Text: brackets in a message are no markup. Unwrapped: a terminal breaks lines by itself, a log should not.
    stderr.print(Text.assemble(("error:", "bold red"), " ", message), soft_wrap=True)
    sys.exit(status)


def _say(message: str) -> None:
    console.print(Text(message), soft_wrap=True)


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
    config = load_config(DEMO_CONFIG, [f"train.seed={seed}", f"cache={json.dumps(str(out / 'cache'))}"])
    run = train(phantoms, config, devices, folder, resume=(folder / "last.safetensors").exists())
    results = evaluate(run, phantoms, "validation", devices=devices)
    console.print(_results_table(results))
    _say(f"{time.monotonic() - begin:.0f} s in all. Report: {write_report(folder)}")


Net = Annotated[str, typer.Option(help="unet, seunet, or package.module:function that gives a network.")]
Filters = Annotated[int, typer.Option(min=1, help="Channels of the first block.")]
Classes = Annotated[int, typer.Option(min=2, help="Organs and background.")]
StemStride = Annotated[int, typer.Option(min=1, max=2, help="1: full resolution; 2: half.")]
VolumeOption = Annotated[str, typer.Option(help="Voxels, such as 64 or 352x256x288.")]
Batch = Annotated[int, typer.Option(min=1, help="Cases a step.")]
Memory = Annotated[Optional[str], typer.Option(help="Limit per device, such as 16GB.")]  # noqa: UP045
MicroBatches = Annotated[Optional[int], typer.Option(min=1, help="Default: one a case.")]  # noqa: UP045
ScheduleOption = Annotated[str, typer.Option(help=f"One of {', '.join(SCHEDULES)}.")]
RecomputeOption = Annotated[Optional[str], typer.Option(help="never, always; default: if needed.")]  # noqa: UP045


@app.command()
def plan(
    net: Net = "unet",
    filters: Filters = 32,
    classes: Classes = 10,
    stem_stride: StemStride = 1,
    volume: VolumeOption = "64",
    batch: Batch = 1,
    devices: Devices = 1,
    memory: Memory = None,
    micro_batches: MicroBatches = None,
    schedule: ScheduleOption = "gpipe",
    recompute: RecomputeOption = None,
    precision: Annotated[Literal["auto", "fp32", "bf16"], typer.Option()] = "auto",
    json_path: Annotated[Optional[Path], typer.Option("--json", help="Write the plan here.")] = None,  # noqa: UP045
    picture: Annotated[Optional[Path], typer.Option(help="Draw the time line of a step here.")] = None,  # noqa: UP045
) -> None:
    """Does it fit, how is it split, what does it cost? Measured on this machine, cell by cell."""
    limit = None if memory is None else parse_bytes(memory)  # before the profiling, which takes a while
    make, shape = _network(net, filters, classes, stem_stride, volume)
    found = _make_plan(
        make(), (batch, 1, *shape), devices, micro_batches, schedule, recompute, precision=precision, memory=limit
    )
    console.print(found.table())
    if json_path is not None:
        found.save(json_path)
        _say(f"Plan: {json_path}")
    if picture is not None:
        plan_picture(found).savefig(picture, dpi=150)
        _say(f"Picture: {picture}")


@app.command("verify")
def verify_command(
    net: Net = "unet",
    filters: Filters = 4,
    classes: Classes = 10,
    stem_stride: StemStride = 1,
    volume: VolumeOption = "32",
    batch: Batch = 4,
    devices: Devices = 2,
    micro_batches: MicroBatches = None,
    schedule: ScheduleOption = "gpipe",
    recompute: RecomputeOption = None,
    plan_path: Annotated[Optional[Path], typer.Option("--plan", help="A plan in JSON to check instead.")] = None,  # noqa: UP045
    dtype: Annotated[Literal["float64", "float32"], typer.Option(help="In which to compute.")] = "float64",
    timeline: Annotated[Optional[Path], typer.Option(help="Draw predicted and measured time lines here.")] = None,  # noqa: UP045
) -> None:
    """One step on one device and on the plan's: prints how far output, loss and gradients are apart."""
    make, shape = _network(net, filters, classes, stem_stride, volume)
    if plan_path is None:
        found = _make_plan(make(), (batch, 1, *shape), devices, micro_batches, schedule, recompute, precision="fp32")
    else:
        found = Plan.load(plan_path)
    console.print(found.table())
    reports = verify(make, found, dtype)
    tolerance = VERIFY_TOLERANCES[dtype]
    table = Table(title=f"One device against {found.devices}, in {dtype}")
    for column in ("largest relative difference of", "", "parameter"):
        table.add_column(column, justify="left" if column else "right")
    gradients = {n: d for report in reports for n, d in report.differences.items() if n not in ("output", "loss")}
    worst = max(gradients, key=lambda name: gradients[name])
    rows = {key: max(r.differences[key] for r in reports if key in r.differences) for key in ("output", "loss")}
    for key, difference in rows.items():
        table.add_row(key, f"{difference:.1e}", "")
    table.add_row(f"the {len(gradients)} gradients", f"{gradients[worst]:.1e}", worst)
    console.print(table)
    for rank, report in enumerate(reports):
        sent, peak = format_bytes(report.bytes_sent), format_bytes(report.peak_bytes)
        _say(f"device {rank}: {sent} sent in a step, peak memory of its process {peak}")
    if timeline is not None:
        lines = {"predicted": found.time_line(), "measured": reports[0].line}
        time_line_picture(lines).savefig(timeline, dpi=150)
        trace = timeline.with_suffix(".json")
        write_atomically(trace, lambda temporary: temporary.write_text(json.dumps(reports[0].line.chrome_trace())))
        _say(f"Time lines: {timeline}; for chrome://tracing: {trace}")
    if not max(*rows.values(), gradients[worst]) <= tolerance:
        _stop(f"the largest difference is beyond {tolerance:g}.", 1)
    _say(f"All within {tolerance:g}.")


def _network(
    net: str, filters: int, classes: int, stem_stride: int, volume: str
) -> tuple[Callable[[], nn.Module], tuple[int, int, int]]:
    """A function that makes the network, with its weights seeded, and the volume's sides."""
    torch.manual_seed(0)
    shape = _sides(volume)
    if ":" in net:
        return partial(load_network, net), shape
    settings = NetworkConfig.model_validate({"kind": net, "filters": filters, "stem_stride": stem_stride})
    network = settings.build(classes)
    if any(side % network.divisor for side in shape):
        near = "x".join(str(-(-side // network.divisor) * network.divisor) for side in shape)
        raise ConfigError(f"the sides of {volume} must be multiples of {network.divisor}; take {near}.")
    return partial(settings.build, classes), shape


def _make_plan(
    network: nn.Module,
    shape: tuple[int, ...],
    devices: int,
    micro_batches: int | None,
    schedule: str,
    recompute: str | None,
    **settings: Any,
) -> Plan:
    if recompute not in (None, "never", "always"):
        raise ConfigError(f"--recompute {recompute!r} is neither never nor always.")
    with console.status("Profiling the network's cells"):
        return make_plan(
            network,
            shape,
            devices,
            micro_batches=micro_batches,
            schedule=schedule,
            recompute=recompute,  # type: ignore[arg-type]
            **settings,
        )


@app.command("train")
def train_command(
    dataset: Annotated[Path, typer.Argument(help="Folder in Decathlon layout.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...")] = None,  # noqa: UP045
    config: Annotated[Optional[Path], typer.Option(help="YAML file.")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="Run folder; default: runs/NAME of the config.")] = None,  # noqa: UP045
    devices: Devices = 1,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out.")] = False,
    timeline: Annotated[Optional[Path], typer.Option(help="Draw a step of every stage here (.png).")] = None,  # noqa: UP045
) -> None:
    """Train through the curriculum; leaves a run folder that predict, evaluate and report take."""
    if config is None:
        if not (resume and out is not None):
            raise ConfigError("give --config FILE, or --resume with --out RUN; experiments/ has files to start from.")
        config = out / "config.yaml"
    folder = out or Path("runs") / config.stem
    run = train(dataset, load_config(config, overrides or []), devices, folder, resume=resume)
    if timeline is not None:
        time_line_picture(run.time_lines()).savefig(timeline, dpi=150)
        _say(f"Time lines: {timeline}; for chrome://tracing: {folder / 'timelines'}")
    _say(f"Done. Next: lamp3d evaluate {run.folder} {dataset}; lamp3d report {run.folder}")


@app.command("predict")
def predict_command(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    scans: Annotated[list[Path], typer.Argument(help="NIfTI files or DICOM folders.")],
    out: Annotated[Path, typer.Option(help="Folder for the label maps.")],
    window: WindowOption = "whole",
    devices: Devices = 1,
    overwrite: Annotated[bool, typer.Option(help="Replace label maps that are there.")] = False,
) -> None:
    """Label maps of scans, each on its scan's own grid."""
    opened = Run.open(run)
    done = predict(opened, scans, out, window=_window(window), devices=devices, overwrite=overwrite)
    for prediction in done:
        _say(f"{prediction.path}  {prediction.seconds:.2f} s")
    names = ", ".join(f"{label} {organ}" for label, organ in enumerate(opened.organs, start=1))
    _say(f"Labels: {names}")


@app.command("evaluate")
def evaluate_command(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    dataset: Annotated[Path, typer.Argument(help="Folder in Decathlon layout.")],
    split: Annotated[str, typer.Option(help="Which cases.")] = "validation",
    window: WindowOption = "whole",
    devices: Devices = 1,
    tolerance_mm: Annotated[float, typer.Option(help="Of the surface Dice.")] = 2.0,
) -> None:
    """Predict a split and score it: Dice, HD95 and surface Dice per organ and case, in results.json."""
    results = evaluate(
        Run.open(run), dataset, split, window=_window(window), devices=devices, tolerance_mm=tolerance_mm
    )
    console.print(_results_table(results))
    _say(f"Results: {run / 'results.json'}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """One self-contained page: curves, scores, plans and pictures."""
    _say(f"Report: {write_report(run)}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context, name: Annotated[str, typer.Argument(help="Folder in benchmarks/; its options follow.")]
) -> None:
    """Run one of the repository's benchmarks (from a checkout)."""
    root = Path(__file__).parents[2]
    if not (root / "benchmarks" / name / "run.py").exists():
        known = ", ".join(sorted(path.parent.name for path in root.glob("benchmarks/*/run.py"))) or "none: no checkout"
        raise ConfigError(f"no benchmark {name!r} in {root / 'benchmarks'}; there are: {known}.")
    # A process of its own: benchmarks start workers, which import the module that was run.
    command = [sys.executable, "-m", f"benchmarks.{name}.run", *context.args]
    raise typer.Exit(subprocess.run(command, cwd=root, check=False).returncode)


def _sides(text: str) -> tuple[int, int, int]:
    try:
        sides = [int(part) for part in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) == 1:
        sides *= 3
    if len(sides) != 3 or min(sides) < 1:
        raise ConfigError(f"{text!r} is not a volume; write one number of voxels or three, such as 64 or 352x256x288.")
    return sides[0], sides[1], sides[2]


def _window(text: str) -> tuple[int, int, int] | None:
    return None if text == "whole" else _sides(text)


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
