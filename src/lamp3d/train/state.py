"""How far a training run has come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

from lamp3d.errors import ConfigError
from lamp3d.train.checkpoint import Checkpoint
from lamp3d.train.curriculum import TrainConfig

LASTING = "preprocess"
"""The part of the settings that a run keeps to its end."""


class TrainingState(BaseModel):
    """How far a run has come; all that a checkpoint keeps beside tensors."""

    model_config = ConfigDict(extra="forbid")

    stage: int = 0
    """That goes on; the curriculum's length when all is done."""
    epoch: int = 0
    """Epochs done in this stage."""
    epochs: int = 0
    """Epochs done in all stages: lines of history.jsonl."""
    step: int = 0
    """Steps done in all stages, bad ones included."""
    bad_steps: int = 0
    """Of them, those that changed nothing."""
    bad_in_a_row: list[list[str]] = []
    """Names of the cases of each bad step since the last good one."""
    best_dice: float | None = None
    best_epochs: int | None = None
    """`epochs` when the best was reached."""
    settings: dict[str, Any] = {}
    """The TrainConfig that it was trained with, and its settings of other parts, each part under its name."""

    def where(self, stages: int) -> str:
        """For people; of a curriculum with so many stages."""
        if self.stage >= stages:
            return f"the finished run ({self.epochs} epochs, {self.step} steps)"
        return f"{self.epochs} epochs ({self.epoch} of stage {self.stage + 1}), {self.step} steps"

    def changed(self, config: TrainConfig, others: Mapping[str, BaseModel]) -> list[str]:
        """Names of the settings that are not as it was trained with.

        A setting that has come to lamp3d since then counts as its default, and a part that was not kept as the same.

        Args:
            config: those of training now.
            others: those of the other parts now, by name.
        """
        names = _changed(self.settings, config)
        for part, now in others.items():
            names += [f"{part}.{name}" for name in _changed(self.settings.get(part), now)]
        return names

    def done_otherwise(self, config: TrainConfig) -> bool:
        """Whether a stage that is done was not as these settings want it."""
        done = self.settings.get("curriculum", [])[: self.stage]
        return any(_changed(before, now) for before, now in zip(done, config.curriculum, strict=False))

    def past_the_end(self, epochs: Sequence[int]) -> bool:
        """Whether a curriculum of so many epochs by stage lacks the place where this goes on."""
        if self.stage >= len(epochs):
            return self.stage > len(epochs)
        return self.epoch > 0 and self.epoch >= epochs[self.stage]


def resumable(
    checkpoint: Checkpoint, network: nn.Module, config: TrainConfig, others: Mapping[str, BaseModel]
) -> TrainingState:
    """Where a run goes on.

    Args:
        checkpoint: its last.
        network: of the run.
        config: the settings to go on with.
        others: those of other parts, by name.

    Raises:
        ConfigError: it is another network's, has come farther than the curriculum goes, or has seen scans that were
            prepared otherwise.
    """
    checkpoint.check_network(network)
    state = TrainingState.model_validate(checkpoint.progress)
    epochs = [stage.epochs for stage in config.curriculum]
    if state.past_the_end(epochs):
        raise ConfigError(
            f"{checkpoint.path} holds {state.where(len(epochs))}, which is past the end of the curriculum (epochs of "
            f"its stages: {', '.join(map(str, epochs))}): resume it with at least as many."
        )
    if lasting := [name for name in state.changed(config, others) if name.startswith(f"{LASTING}.")]:
        raise ConfigError(
            f"{checkpoint.path} was trained with another {', '.join(lasting)}, and its weights are for scans that are "
            "prepared like that: go on with the same, or choose another --out."
        )
    return state


def _changed(kept: Mapping[str, Any] | None, now: BaseModel) -> list[str]:
    if not kept:
        return []
    known = type(now).model_fields
    before = type(now).model_validate({name: value for name, value in kept.items() if name in known})
    return [name for name in known if getattr(before, name) != getattr(now, name)]
