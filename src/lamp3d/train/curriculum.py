"""The curriculum (small patches, medium patches, whole volumes) and all settings of a training run."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from lamp3d.plan import check_schedule
from lamp3d.settings import Settings, told_with_its_key
from lamp3d.sides import Shape3, Sides, sides_or_none

Fraction = Annotated[float, Field(gt=0, lt=1)]

WARM_UP = 0.03  # part of a stage over which the cosine schedule rises to the full learning rate
FLOOR = 0.01  # of the learning rate, at the end of the stage
POLY_EXPONENT = 0.9  # nnU-Net's


class CurriculumStage(Settings):
    """One stage of the curriculum: inputs of one size, with an optimizer of its own (paper §2.3)."""

    patch: Sides
    """Voxels along each axis, or one number for all three; or "whole" (cropped) volumes."""
    batch: PositiveInt = 1
    """Cases a step."""
    micro_batches: PositiveInt | None = None
    """Parts a mini-batch is cut into for the pipeline; None: the planner's choice. Whole volumes are one each."""
    epochs: PositiveInt
    learning_rate: PositiveFloat = 1e-3
    patches_per_case: PositiveInt = 1
    """Patches drawn from each case in an epoch; whole volumes come as often."""
    positive_fraction: float = Field(default=1.0, ge=0, le=1)
    """Share of the patches that show an organ for sure (paper §2.3: all); the others lie anywhere."""
    schedule: str | None = None
    """The order of the micro-batches' forwards and backwards on several devices, one of `lamp3d.plan.SCHEDULES`; None:
    the planner's choice."""
    data: PositiveInt | None = None
    """Replicas, each with a share of the batch; None: the planner's choice."""
    space: PositiveInt | None = None
    """Slabs that every volume is cut into, each on a device; None: the planner's choice."""
    recompute: Literal["never", "always"] | None = None
    """Whether activations are computed a second time in the backward pass, to save memory; None: where it must be."""

    @field_validator("schedule")
    @classmethod
    def _is_a_schedule(cls, name: str | None) -> str | None:
        if name is not None:
            with told_with_its_key():
                check_schedule(name)
        return name

    @property
    def patch_shape(self) -> Shape3 | None:
        """Voxels of a patch; None for whole volumes."""
        return sides_or_none(self.patch)

    def __str__(self) -> str:
        size = "whole volumes" if self.patch == "whole" else f"patches of {'x'.join(map(str, self.patch))}"
        return f"{size}, batch {self.batch}, learning rate {self.learning_rate:g}"


class TrainConfig(Settings):
    """Settings of a training run, beside data, augmentation, network and loss."""

    curriculum: tuple[CurriculumStage, ...] = Field(min_length=1)
    optimizer: Literal["rmsprop", "adamw", "sgd"] = "rmsprop"
    """The paper's RMSProp, AdamW, or SGD with Nesterov's momentum as in nnU-Net."""
    momentum: float = Field(default=0.99, ge=0, lt=1)
    """Of "sgd"; the others do not look at it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """On convolution and linear weights; biases and normalisation are left alone."""
    clip_norm: PositiveFloat | None = None
    """Limit of the whole network's gradient norm; None: no limit."""
    lr_schedule: Literal["constant", "cosine", "poly"] = "constant"
    """"cosine": over each stage, after a short warm-up, down to a hundredth. "poly": over each stage, with the
    0.9th power of what is left of it (nnU-Net), down to a hundredth."""
    ema_decay: Fraction | None = None
    """If given, an exponential moving average of the weights is validated and kept as the best, e.g. 0.999; where there
    is nothing to validate on, its last state is."""
    precision: Literal["fp32", "bf16", "auto"] = "auto"
    """"auto": bf16 where the hardware computes in it."""
    validate_every: PositiveInt = 1
    """Epochs between validations; the last epoch of a stage is always validated."""
    max_bad_steps: PositiveInt = 10
    """Steps in a row with a non-finite loss or gradient after which the run stops."""
    seed: int = Field(default=0, ge=0, lt=2**64)

    @property
    def optimizer_copies(self) -> int:
        """What is kept of every weight beside itself and its gradient: the optimizer's state, and the average."""
        state = {"adamw": 2, "rmsprop": 1, "sgd": int(self.momentum > 0)}[self.optimizer]
        return state + (self.ema_decay is not None)

    def learning_rate(self, stage: int, position: float) -> float:
        """Learning rate of a step.

        Args:
            stage: index into the curriculum.
            position: in (0, 1], part of the stage's steps that are done when this one is.
        """
        full = self.curriculum[stage].learning_rate
        if self.lr_schedule == "constant":
            return full
        if self.lr_schedule == "poly":
            return full * (FLOOR + (1 - FLOOR) * math.pow(1 - position, POLY_EXPONENT))
        if position < WARM_UP:
            return full * position / WARM_UP
        swing = (1 + math.cos(math.pi * (position - WARM_UP) / (1 - WARM_UP))) / 2
        return full * (FLOOR + (1 - FLOOR) * swing)

    def validates(self, stage: int, epoch: int) -> bool:
        """Whether the network is validated after this epoch (counted from 0 within its stage)."""
        return (epoch + 1) % self.validate_every == 0 or epoch + 1 == self.curriculum[stage].epochs
