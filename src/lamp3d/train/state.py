"""How far a training run has come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict


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
    """The TrainConfig that it was trained with."""

    def where(self, stages: int) -> str:
        """For people; of a curriculum with so many stages."""
        if self.stage >= stages:
            return f"the finished run ({self.epochs} epochs, {self.step} steps)"
        return f"{self.epochs} epochs ({self.epoch} of stage {self.stage + 1}), {self.step} steps"

    def past_the_end(self, epochs: Sequence[int]) -> bool:
        """Whether a curriculum of so many epochs by stage lacks the place where this goes on."""
        if self.stage >= len(epochs):
            return self.stage > len(epochs)
        return self.epoch > 0 and self.epoch >= epochs[self.stage]
