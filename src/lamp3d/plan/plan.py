"""The plan: who does what. Frozen, readable as a table, written as JSON, and all that the engine needs to know."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lamp3d.errors import ConfigError, PlanError
from lamp3d.graph.inputs import input_text
from lamp3d.plan.schedule import SCHEDULES, Actions, StageTimes, splits_backward
from lamp3d.plan.simulate import TimeLine, simulate
from lamp3d.volume import write_atomically

Recompute = Literal["never", "always"] | tuple[str, ...]
Precision = Literal["fp32", "bf16"]


class StagePlan(BaseModel):
    """One stage: a contiguous run of cells, the rank that runs it, and what it is expected to cost.

    Attributes:
        rank: the device.
        first_cell, last_cell: the run of cells, both ends included.
        cells: their names, by which the engine checks that plan and network belong together.
        forward_seconds, backward_seconds: one micro-batch, recomputation included in the backward.
        weight_seconds: the part of the backward that the schedule does apart (0 where it does not).
        parameter_bytes: parameters only.
        sent_bytes: values and gradients that leave for other devices in one mini-batch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    first_cell: int
    last_cell: int
    cells: tuple[str, ...]
    forward_seconds: float
    backward_seconds: float
    weight_seconds: float
    parameter_bytes: int
    sent_bytes: int


class DevicePlan(BaseModel):
    """What one device is expected to hold in a training step.

    Attributes:
        saved_bytes: at most, between actions: for backward passes to come, outputs for the loss, what is on its way.
        peak_bytes: with parameters, gradients, optimizer state and the loss.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    saved_bytes: int
    peak_bytes: int


class Plan(BaseModel):
    """How one network runs on several devices for one shape of mini-batch.

    A plan holds for other shapes as well: its cut stays exact, only its predictions belong to ``input_shape``.

    Attributes:
        input_shape: of the whole mini-batch; of a network with several inputs, by name.
        devices: data × space × pipe.
        data: replicas, each with an equal share of the mini-batch.
        space: the mesh over which every volume is cut into slabs, such as (4,) or (2, 2); empty for whole volumes.
        space_dims: for each of its axes, the dimension of a (B, C, D, H, W) tensor that is cut: 2, 3 or 4.
        least_planes: a level whose slabs have fewer planes is gathered and computed by every rank.
        micro_batches: M, of a replica's share.
        recompute: "never" or "always", or the names of the cells that are computed again in backward.
        stages: in the network's order; a device may have several.
        per_device: by rank of the pipeline.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = 2
    network: str
    input_shape: tuple[int, ...] | dict[str, tuple[int, ...]]
    devices: int
    data: int = 1
    space: tuple[int, ...] = ()
    space_dims: tuple[int, ...] = ()
    least_planes: int = 1
    device_type: Literal["cpu", "cuda"]
    micro_batches: int
    schedule: str
    recompute: Recompute
    precision: Precision
    channels_last: bool
    memory_limit_bytes: int | None
    stages: tuple[StagePlan, ...]
    per_device: tuple[DevicePlan, ...]
    step_seconds: float
    bubble: float

    @field_validator("schedule")
    @classmethod
    def _is_a_schedule(cls, name: str) -> str:
        check_schedule(name)
        return name

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of the first input, which is the only one of most networks."""
        return next(iter(self.input_shape.values())) if isinstance(self.input_shape, dict) else self.input_shape

    @property
    def pipe(self) -> int:
        """The devices of one pipeline."""
        return self.devices // (self.data * self.slabs)

    @property
    def slabs(self) -> int:
        """Into how many parts a volume is cut."""
        return math.prod(self.space)

    @property
    def starts(self) -> list[int]:
        """The first cell of every stage."""
        return [stage.first_cell for stage in self.stages]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of every stage."""
        return tuple(stage.rank for stage in self.stages)

    @property
    def stage_times(self) -> list[StageTimes]:
        """What schedules and the simulator know of the stages."""
        return [
            StageTimes(stage.rank, stage.forward_seconds, stage.backward_seconds, stage.weight_seconds)
            for stage in self.stages
        ]

    @property
    def splits_backward(self) -> bool:
        """Whether the schedule computes weight gradients apart."""
        return splits_backward(self.schedule)

    def actions(self, micro_batches: int) -> Actions:
        """Every rank's actions for a mini-batch of so many micro-batches."""
        return SCHEDULES[self.schedule](self.stage_times, micro_batches)

    def recomputes(self, cell: str) -> bool:
        """Whether a cell's activations are computed again in backward."""
        return recomputes(self.recompute, cell)

    def time_line(self) -> TimeLine:
        """The predicted time line of a step."""
        return simulate(self.actions(self.micro_batches), self.stage_times)

    def table(self) -> Table:
        """The plan as a table: stage, cells, seconds, memory, bytes sent."""
        limit = "" if self.memory_limit_bytes is None else f" of {format_bytes(self.memory_limit_bytes)} a device"
        table = Table(
            box=SIMPLE_HEAD,
            title=f"{self.network}, mini-batch {input_text(self.input_shape)}, {self._devices_text()} "
            f"{self.device_type}, {self.precision}{', channels-last' if self.channels_last else ''}",
            caption=f"{self.schedule}, {self.micro_batches} micro-batches, recompute {self._recompute_text()}: "
            f"{self.step_seconds:.2f} s a step, {self.bubble:.0%} bubble, peak memory "
            f"{format_bytes(max(device.peak_bytes for device in self.per_device))}{limit} (predicted)",
        )
        for column in ("stage", "device", "cells"):
            table.add_column(column, overflow="fold")
        for column in ("fwd s", "bwd s", "params", "sent", "memory"):
            table.add_column(column, justify="right", no_wrap=True)
        for index, stage in enumerate(self.stages):
            first, last = _short(stage.cells[0]), _short(stage.cells[-1])
            table.add_row(
                str(index),
                str(stage.rank),
                f"{stage.first_cell}-{stage.last_cell}  {first}\n… {last}",
                f"{stage.forward_seconds:.3f}",
                f"{stage.backward_seconds:.3f}",
                format_bytes(stage.parameter_bytes),
                format_bytes(stage.sent_bytes),
                format_bytes(self.per_device[stage.rank].peak_bytes) if stage.rank not in self.ranks[:index] else "",
            )
        return table

    def _devices_text(self) -> str:
        factors = [f"{self.data} replicas"] * (self.data > 1) + [f"{self.slabs} slabs"] * (self.slabs > 1)
        return " × ".join([*factors, str(self.pipe)]) + ("" if factors else " ×")

    def _recompute_text(self) -> str:
        return self.recompute if isinstance(self.recompute, str) else f"{len(self.recompute)} cells"

    def save(self, path: Path) -> None:
        """Write the plan as JSON, atomically."""
        write_atomically(path, lambda temporary: temporary.write_text(self.model_dump_json(indent=1) + "\n", "utf-8"))

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan from JSON.

        Raises:
            PlanError: the file is absent or not a plan.
        """
        try:
            return cls.model_validate_json(path.read_text("utf-8"))
        except FileNotFoundError:
            raise PlanError(f"no plan at {path}; make one with `lamp3d plan … --json {path}`.") from None
        except ValidationError as error:
            raise PlanError(f"{path} is not a plan that this version of lamp3d reads: {error}") from error


def recomputes(recompute: Recompute, cell: str) -> bool:
    """Whether a cell's activations are computed again in backward."""
    return recompute == "always" if isinstance(recompute, str) else cell in recompute


def check_schedule(name: str) -> None:
    """Make sure that there is a schedule of this name.

    Raises:
        ConfigError: listing those that there are.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"there is no schedule {name!r}; there are {', '.join(SCHEDULES)}.")


def _short(cell: str) -> str:
    return cell.split(" + ", maxsplit=1)[0]


_UNITS: dict[str, int] = {"": 1, "B": 1} | {
    f"{letter}{i}B": (1024 if i else 1000) ** (power + 1) for power, letter in enumerate("KMGT") for i in ("", "I")
}


def parse_bytes(text: str | int) -> int:
    """Bytes from a number or a text such as ``"16GB"`` or ``"15.5 GiB"``.

    Raises:
        ConfigError: the text is not an amount of memory.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", str(text))
    if not match or (unit := match[2].upper()) not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"{text!r} is not an amount of memory; write it like 16GB or 15.5GiB.")
    return round(float(match[1]) * _UNITS[unit])


def format_bytes(count: float, *, up: bool = False) -> str:
    """A number of bytes for people: three digits, in powers of ten; with ``up`` never less than ``count``."""
    for power, unit in enumerate(("B", "kB", "MB", "GB", "TB")):
        size = 1000**power
        digits = 0 if unit == "B" or count >= 99.95 * size else 1 if count >= 9.995 * size else 2
        exact = math.ceil(count) * 10**digits  # a whole number, which does not round
        shown = -(-exact // size) / 10**digits if up else round(count / size, digits)
        if shown < 1000 or unit == "TB":
            break
    return f"{shown:g} {unit}"
