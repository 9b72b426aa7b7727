"""Training through the curriculum: one engine and one optimizer a stage, checked steps, exact resume.

The run folder's ``last.safetensors`` is the one place through which weights move: it is written before the first step,
after every epoch, and at the end of a stage, and every stage begins by reading from it what its ranks hold. So a stage
whose plan cuts the network elsewhere, a resumed run, and a run resumed on another number of devices are one case.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor, nn

from lamp3d.data import Batch, Batches
from lamp3d.errors import RESUMED, ConfigError, DiskFullError, TrainingError
from lamp3d.files import room_for, write_text
from lamp3d.graph import lay_out_weights
from lamp3d.parallel import Engine
from lamp3d.plan import Plan
from lamp3d.train.checkpoint import Checkpoint, as_first_rank_says, copy_tensors, network_tensors, save_checkpoint
from lamp3d.train.curriculum import TrainConfig
from lamp3d.train.feed import on_device, prefetched
from lamp3d.train.guard import StepCheck, check_step, clip_gradients, diagnosis
from lamp3d.train.history import EpochRecord, Recorder, RunRecorder
from lamp3d.train.optimizer import WeightAverage, make_optimizer, optimizer_tensors, restore_optimizer
from lamp3d.train.state import TrainingState, resumable

LossFunction = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]


@dataclass(frozen=True)
class _Stage:
    """What this rank trains with in one stage of the curriculum."""

    engine: Engine
    kept: dict[str, Tensor]
    """Its parameters and persistent buffers; on the first rank also those that no rank's stages use."""
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None


class Trainer:
    """Trains a network on this rank's part of the plans.

    Args:
        network: whole; the first rank's initial weights count.
        plans: one for each stage of the curriculum.
        config: settings.
        loss_fn: from logits (B, C, D, H, W) and (labels, annotated) to a 0-dim tensor.
        batches: from stage and epoch (both from 0) to that epoch's mini-batches, the same on every rank.
        validate: from the engine (network in evaluation mode) to the mean Dice by organ, the same on every rank, NaN
            for an organ that no case tells of. None: no validation and no best.safetensors.
        run: folder for checkpoints and history, seen by all ranks.
        others: settings of other parts, by name, that a checkpoint keeps and a resumed run is compared by.

    Raises:
        ConfigError: plans and curriculum do not match.
    """

    def __init__(
        self,
        network: nn.Module,
        plans: Sequence[Plan],
        config: TrainConfig,
        loss_fn: LossFunction,
        batches: Callable[[int, int], Batches],
        validate: Callable[[Engine], dict[str, float]] | None,
        run: Path,
        others: Mapping[str, BaseModel] | None = None,
    ) -> None:
        if len(plans) != len(config.curriculum):
            raise ConfigError(
                f"{len(plans)} plans for a curriculum of {len(config.curriculum)} stages; make one for each."
            )
        self.network = network
        self.plans = plans
        self.config = config
        self.loss_fn = loss_fn
        self.batches = batches
        self.validate = validate
        self.run = run
        self.others = others or {}
        self.last = run / "last.safetensors"
        self.best = run / "best.safetensors"
        self.parameter_names = [name for name, _ in network.named_parameters()]
        kept = {part: settings.model_dump(mode="json") for part, settings in self.others.items()}
        self.state = TrainingState(settings=config.model_dump(mode="json") | kept)
        self.recorder = Recorder()

    def fit(self, resume: bool = False) -> None:
        """Train to the end of the curriculum.

        Args:
            resume: go on from the run folder's last checkpoint, if there is one. The result is, bit for bit, that of a
                run which was never interrupted.

        Raises:
            ConfigError: the folder holds a run already and `resume` is off, or one that cannot be gone on with.
            TrainingError: too many bad steps in a row, or a checkpoint cannot be written.
            DiskFullError: there is no room for the run.
        """
        try:
            with room_for(self.run):
                self._fit(resume)
        except DiskFullError as error:
            raise DiskFullError(f"{error} What was saved before is intact: go on from there {RESUMED}.") from error

    def _fit(self, resume: bool) -> None:
        self._open_run(resume)
        with closing(self.recorder):
            try:
                while self.state.stage < len(self.plans):
                    self._train_stage()
            except KeyboardInterrupt:
                self.state = TrainingState.model_validate(Checkpoint(self.last).progress)
                place = self.state.where(len(self.plans))
                self.recorder.say(f"Interrupted. {self.last} holds {place}; go on from there {RESUMED}.")
                raise

    def _open_run(self, resume: bool) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        begun = as_first_rank_says(self.last.exists())
        if begun and not resume:
            raise ConfigError(f"{self.run} already holds a training run: resume it, or choose another folder.")
        first = not dist.is_initialized() or dist.get_rank() == 0
        if not begun:
            initial = network_tensors(self.network) if first else {}
            save_checkpoint(self.last, _within("model", initial), self.state.model_dump())
        settings = self.state.settings
        self.state = resumable(Checkpoint(self.last), self.network, self.config, self.others)
        if first:
            self.recorder = RunRecorder(self.run, self.config, epochs=self.state.epochs, step=self.state.step)
        changed = self.state.changed(self.config, self.others)
        done = self.state.stage >= len(self.plans)
        if begun:
            self.recorder.say(f"Resuming {self.last}: {self.state.where(len(self.plans))}.")
        if begun and (done or self.state.done_otherwise(self.config)):
            self.recorder.say("Stages that are done stay as they are; to train longer, add another one.")
        if changed:
            self.recorder.say(
                f"Settings changed since the checkpoint: {', '.join(changed)}; "
                + ("nothing is left to train with the new ones." if done else "the new ones apply from here.")
            )
        self.state.settings = settings

    def _train_stage(self) -> None:
        stage = self._begin_stage()
        index = self.state.stage
        while self.state.stage == index:
            record = self._train_epoch(stage)
            self._save_time_line(stage.engine)
            with nullcontext() if stage.average is None else stage.average.applied():
                record, improved = self._validate(stage.engine, record)
                if improved or (self.validate is None and stage.average is not None):
                    save_checkpoint(self.best, _within("model", stage.kept), self.state.model_dump())
            self.recorder.end_epoch(record)
            self._save_last(stage)

    def _begin_stage(self) -> _Stage:
        """A new engine and optimizer, filled from the last checkpoint (without an optimizer where a stage begins)."""
        # As it came: not in evaluation mode, which hides a training BatchNorm from the engine; without the cells of the
        # last stage on the device; and in no memory format that a resumed run would not find it in.
        lay_out_weights(self.network.train().cpu(), channels_last=False)
        torch.cuda.empty_cache()
        engine = Engine(self.network, self.plans[self.state.stage])
        names = network_tensors(self.network)
        kept = {name: t for name, t in {**engine.parameters, **engine.buffers}.items() if name in names}
        if engine.rank == 0:  # what no stage uses belongs to the network all the same
            root = engine.graph.root
            used = {id(tensor) for tensor in (*root.parameters(), *root.buffers())}  # tied ones have several names
            kept |= {name: tensor for name, tensor in names.items() if id(tensor) not in used}
        checkpoint = Checkpoint(self.last)
        copy_tensors(kept, checkpoint.read("model", kept))
        optimizer = make_optimizer(engine.parameters, self.config)
        restore_optimizer(optimizer, engine.parameters, checkpoint.read("optimizer"))
        average = None
        if self.config.ema_decay is not None:
            average = WeightAverage(engine.parameters, self.config.ema_decay)
            if checkpoint.has("ema"):
                copy_tensors(average.values, checkpoint.read("ema", average.values))
        return _Stage(engine, kept, optimizer, average)

    def _train_epoch(self, stage: _Stage) -> EpochRecord:
        state = self.state
        epochs = self.config.curriculum[state.stage].epochs
        batches = self.batches(state.stage, state.epoch)
        self.recorder.begin_epoch(state.stage, state.epoch + 1, len(batches))
        self.network.train()
        losses: list[float] = []
        bad_cases: Counter[str] = Counter()
        bad_before = state.bad_steps
        peaks = [0] * stage.engine.world_size
        began = time.monotonic()
        with closing(prefetched(batches, stage.engine)) as stream:
            for i, batch in enumerate(stream):
                lr = self.config.learning_rate(state.stage, (state.epoch + (i + 1) / len(batches)) / epochs)
                # Dropout must repeat after a resume; each rank has its own, but for those that share volumes.
                torch.manual_seed(_seed(self.config.seed, state.stage, state.epoch, i, stage.engine.random_stream))
                check = self._train_step(stage, batch, lr)
                peaks = [max(pair) for pair in zip(peaks, check.peak_bytes, strict=True)]
                if check.finite:
                    losses.append(check.loss)
                else:
                    bad_cases.update(batch.names)
                self.recorder.end_step(state.step, check, lr)
        stage.optimizer.zero_grad()  # validation has better use for the memory
        seconds = time.monotonic() - began
        state.epoch += 1
        state.epochs += 1
        return EpochRecord(
            stage=state.stage + 1,
            epoch=state.epoch,
            step=state.step,
            loss=sum(losses) / len(losses) if losses else None,
            lr=lr,
            seconds_per_step=seconds / len(batches),
            volume_share=batches.share_of(self.plans[state.stage].image_shape),
            peak_bytes=peaks,
            bad_steps=state.bad_steps - bad_before,
            bad_cases=dict(bad_cases),
            best_dice=state.best_dice,
        )

    def _train_step(self, stage: _Stage, batch: Batch, lr: float) -> StepCheck:
        """One step that either all ranks make or none; too many in a row that none makes end the training."""
        state, engine = self.state, stage.engine
        buffers = {name: buffer.clone() for name, buffer in engine.buffers.items()}
        stage.optimizer.zero_grad()
        loss = engine.step(*on_device(batch, engine), self.loss_fn)
        check = check_step(engine, self.parameter_names, loss)
        state.step += 1
        if check.finite:
            if self.config.clip_norm is not None:
                clip_gradients(engine.parameters, check.gradient_norm, self.config.clip_norm)
            for group in stage.optimizer.param_groups:
                group["lr"] = lr
            stage.optimizer.step()
            if stage.average is not None:
                stage.average.update(state.step - state.bad_steps - 1)
            state.bad_in_a_row = []
            return check
        copy_tensors(engine.buffers, buffers)  # running statistics have seen the bad values
        state.bad_steps += 1
        state.bad_in_a_row.append(list(batch.names))
        self.recorder.say(f"Step {state.step} changed nothing ({check}; cases {', '.join(batch.names)}).")
        if len(state.bad_in_a_row) >= self.config.max_bad_steps:
            when = f"epoch {state.epoch + 1}, step {state.step}"
            names = [name for step in state.bad_in_a_row for name in step]
            raise TrainingError(diagnosis(self.config, state.stage, engine.plan.precision, when, check, names))
        return check

    def _validate(self, engine: Engine, record: EpochRecord) -> tuple[EpochRecord, bool]:
        """The record with this epoch's scores, if it is one that is validated, and whether they are the best."""
        state = self.state
        if self.validate is None or not self.config.validates(state.stage, state.epoch - 1):
            return record, False
        self.network.eval()
        self.recorder.begin_validation()
        dice = {organ: value if math.isfinite(value) else None for organ, value in self.validate(engine).items()}
        known = [value for value in dice.values() if value is not None]
        mean = sum(known) / len(known) if known else None
        improved = mean is not None and (state.best_dice is None or mean > state.best_dice)
        if improved:
            state.best_dice, state.best_epochs = mean, state.epochs
        return record.model_copy(update={"dice": dice, "mean_dice": mean, "best_dice": state.best_dice}), improved

    def _save_time_line(self, engine: Engine) -> None:
        """The last step of a stage's first epoch, as a trace that browsers show (and `--timeline` draws)."""
        if self.state.epoch == 1:  # not "if the file is not there": machines see new files at different times
            line = engine.time_line()
            if engine.rank == 0:
                write_text(time_line_path(self.run, self.state.stage), json.dumps(line.chrome_trace()))

    def _save_last(self, stage: _Stage) -> None:
        state = self.state
        tensors = _within("model", stage.kept)
        if stage.average is not None:
            tensors |= _within("ema", stage.average.values)
        if state.epoch == self.config.curriculum[state.stage].epochs:
            state.stage, state.epoch = state.stage + 1, 0  # where another optimizer begins
        else:
            tensors |= _within("optimizer", optimizer_tensors(stage.optimizer, stage.engine.parameters))
        save_checkpoint(self.last, tensors, state.model_dump())


def time_line_path(run: Path, stage: int) -> Path:
    """Where a run keeps the time line of a stage (from 0), as a Chrome trace."""
    return run / "timelines" / f"stage-{stage}.json"


def _within(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}/{name}": tensor for name, tensor in tensors.items()}


def _seed(*place: int) -> int:
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])
