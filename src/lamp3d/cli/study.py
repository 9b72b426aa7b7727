"""The commands of studies: many runs that answer one question."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lamp3d.cli.common import DatasetFolder, Devices, app, console, say
from lamp3d.study import plan_study, run_study, score_test_split, time_predictions, write_study_report

study = typer.Typer(help="Many runs that answer one question: plan, run, time, test, report.", no_args_is_help=True)
app.add_typer(study, name="study")

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="Such as experiments/openkbp/study.yaml.")]
StudyFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="That `lamp3d study run` left.")]


@study.command("plan")
def plan_command(path: StudyFile, dataset: DatasetFolder, devices: Devices = 1) -> None:
    """What every row will take on this machine, before anything is trained."""
    table = Table(title="One run of each row, and all its seeds")
    for column in ("row", "steps", "voxels seen", "of its control's", "minutes", "seeds", "hours in all"):
        table.add_column(column, justify="left" if column == "row" else "right")
    found = plan_study(path, dataset, devices)
    voxels = {forecast.row.name: forecast.voxels for forecast in found}
    for forecast in found:
        of = forecast.row.control_of
        table.add_row(
            forecast.row.name,
            f"{forecast.steps:,}",
            f"{forecast.voxels / 1e9:.2f} G",
            "" if of is None else f"{forecast.voxels / voxels[of]:.3f} × {of}",
            f"{forecast.seconds / 60:.1f}",
            str(forecast.seeds),
            f"{forecast.seeds * forecast.seconds / 3600:.1f}",
        )
    console.print(table)
    hours = sum(forecast.seeds * forecast.seconds for forecast in found) / 3600
    say(f"Steps alone: {hours:.1f} hours. Validation, evaluation and timing come on top.")


@study.command("run")
def run_command(
    path: StudyFile,
    dataset: DatasetFolder,
    out: Annotated[Path, typer.Option(help="Folder for the runs and their results; an interrupted study goes on.")],
    devices: Devices = 1,
) -> None:
    """Train and evaluate every row with every seed; what is done is not done again.

    Start it a second time, and it does another run beside the first.
    """
    run_study(path, dataset, out, devices, say)
    say(f"Report: {write_study_report(out)}")


@study.command("time")
def time_command(out: StudyFolder) -> None:
    """Seconds and memory of every row's predictions; nothing else should run on the machine."""
    time_predictions(out, say)
    say(f"Report: {write_study_report(out)}")


@study.command("test")
def final_test(out: StudyFolder, dataset: DatasetFolder, devices: Devices = 1) -> None:
    """Score all runs on the test split: once, when everything is decided."""
    score_test_split(out, dataset, devices)
    say(f"Report: {write_study_report(out)}")


@study.command("report")
def report_command(out: StudyFolder) -> None:
    """Tables in the paper's form and its figure, from the results that there are."""
    say(f"Report: {write_study_report(out)}")
