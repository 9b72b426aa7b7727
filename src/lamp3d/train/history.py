"""What a run leaves for people to look at: history.jsonl, TensorBoard, and a progress line."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from lamp3d.errors import ConfigError
from lamp3d.files import write_text
from lamp3d.train.curriculum import TrainConfig
from lamp3d.train.guard import StepCheck

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SECONDS_BETWEEN_LINES = 30.0


class EpochRecord(BaseModel):
    """One line of history.jsonl."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: int
    """Of the curriculum, from 1."""
    epoch: int
    """Within the stage, from 1."""
    step: int
    """Done since the beginning of the run, bad ones included."""
    loss: float | None
    """Mean over the epoch's good steps; None if there was none."""
    lr: float
    """Of the epoch's last step."""
    seconds_per_step: float
    """Wall time, data included and validation not."""
    volume_share: float = 1.0
    """Voxels of a mini-batch, on average, over those that the stage was planned for: whole volumes differ in size."""
    peak_bytes: list[int]
    """Peak memory by rank."""
    bad_steps: int
    """Of this epoch."""
    bad_cases: dict[str, int]
    """How often each case was in a bad step of this epoch."""
    dice: dict[str, float | None] | None = None
    """By organ, on the validation cases; None if this epoch was not validated."""
    mean_dice: float | None = None
    best_dice: float | None
    """The best mean Dice so far."""


def read_history(run: Path) -> list[EpochRecord]:
    """All epochs of a run, in order; none if there is no history."""
    return [EpochRecord.model_validate_json(line) for line in _whole_lines(run / "history.jsonl")]


class Recorder:
    """Writes nothing: the recorder of all ranks but the first."""

    def begin_epoch(self, stage: int, epoch: int, steps: int) -> None:
        """An epoch (from 1) of so many steps begins."""

    def end_step(self, step: int, check: StepCheck, lr: float) -> None:
        """A step is done; `step` counts from the beginning of the run, from 1."""

    def begin_validation(self) -> None:
        """The epoch's steps are done; the validation cases are next."""

    def end_epoch(self, record: EpochRecord) -> None:
        """An epoch and its validation are done."""

    def say(self, text: str) -> None:
        """Tell the user."""

    def close(self) -> None:
        """Write out what is left."""


class RunRecorder(Recorder):
    """Writes to the run folder, and shows a bar on a terminal or lines elsewhere.

    Args:
        run: the run's folder.
        config: settings of the run.
        epochs: lines of history.jsonl to keep: what came after the checkpoint is done again.
        step: of the checkpoint; later points of TensorBoard's curves are dropped.

    Raises:
        ConfigError: the history is shorter than that.
    """

    def __init__(self, run: Path, config: TrainConfig, *, epochs: int, step: int) -> None:
        self.config = config
        self.console = Console()
        self.history = run / "history.jsonl"
        kept = _whole_lines(self.history)[:epochs]
        if len(kept) < epochs:
            raise ConfigError(
                f"{self.history} holds {len(kept)} epochs, but the checkpoint beside it {epochs}: it has been changed. "
                "Bring the original back, or begin a new run folder."
            )
        write_text(self.history, "".join(kept))
        self.board = _summary_writer(run / "tensorboard", step)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=None, state="")
        self.bar.start()
        self.title = ""
        self.steps = self.done = 0
        self.began = self.last_line = time.monotonic()

    def begin_epoch(self, stage: int, epoch: int, steps: int) -> None:
        total = self.config.curriculum[stage].epochs
        self.title = f"stage {stage + 1}/{len(self.config.curriculum)} epoch {epoch}/{total}"
        self.steps, self.done = steps, 0
        self.began = self.last_line = time.monotonic()
        self.bar.reset(self.task, total=steps, description=self.title, state="")

    def end_step(self, step: int, check: StepCheck, lr: float) -> None:
        self.done += 1
        now = time.monotonic()
        seconds = (now - self.began) / self.done
        state = f"loss {check.loss:.4f}  {seconds:.2f} s/step  {_peaks(check.peak_bytes)}"
        self.bar.update(self.task, completed=self.done, state=state)
        if not self.console.is_terminal and now - self.last_line > SECONDS_BETWEEN_LINES:
            self.say(f"{self.title} step {self.done}/{self.steps}  {state}")
            self.last_line = now
        if check.finite:
            self.board.add_scalar("step/loss", check.loss, step)
            self.board.add_scalar("step/gradient_norm", check.gradient_norm, step)
        self.board.add_scalar("step/learning_rate", lr, step)

    def begin_validation(self) -> None:
        self.bar.update(self.task, state="validation")

    def end_epoch(self, record: EpochRecord) -> None:
        with self.history.open("a", encoding="utf-8") as file:
            file.write(record.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())  # the checkpoint that counts this line follows
        loss = "none" if record.loss is None else f"{record.loss:.4f}"
        line = (
            f"{self.title}  loss {loss}  {record.seconds_per_step:.2f} s/step  lr {record.lr:.2g}  "
            f"{_peaks(record.peak_bytes)}"
        )
        if record.bad_steps:
            line += f"  {record.bad_steps} bad steps"
        if record.mean_dice is not None:
            line += f"  Dice {record.mean_dice:.4f} (best {record.best_dice:.4f})"
        self.say(line)
        scalars = {"epoch/loss": record.loss, "epoch/mean_dice": record.mean_dice, "epoch/bad_steps": record.bad_steps}
        scalars["epoch/seconds_per_step"] = record.seconds_per_step
        scalars |= {f"dice/{organ}": value for organ, value in (record.dice or {}).items()}
        scalars |= {f"peak_gigabytes/rank_{rank}": peak / 1e9 for rank, peak in enumerate(record.peak_bytes)}
        for name, value in scalars.items():
            if value is not None:
                self.board.add_scalar(name, value, record.step)
        self.board.flush()

    def say(self, text: str) -> None:
        # As Text: brackets in names are no markup, and a long line stays one line in a log.
        self.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        self.bar.stop()
        self.board.close()


def _whole_lines(path: Path) -> list[str]:
    """Without the last one if it was cut off while it was written."""
    *lines, _ = path.read_text("utf-8").split("\n") if path.exists() else [""]
    return [f"{line}\n" for line in lines]


def _summary_writer(folder: Path, step: int) -> SummaryWriter:
    # Imported here: it takes a second, and only the first rank of a training run needs it.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=step + 1)


def _peaks(peak_bytes: list[int]) -> str:
    """Of every rank; on a CPU with what Python and its libraries take, which plans do not count."""
    of = "peak" if torch.cuda.is_available() else "process peak"
    return f"{of} {' | '.join(f'{peak / 1e9:.2f}' for peak in peak_bytes)} GB"
