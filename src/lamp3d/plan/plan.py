"""The plan: who does what. Frozen, readable as a table, written as JSON, and all that the engine needs to know."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table

from lamp3d.errors import ConfigError, PlanError
from lamp3d.volume import write_atomically

Recompute = Literal["never", "always"]
Precision = Literal["fp32", "bf16"]
ScheduleName = Literal["gpipe"]


class StagePlan(BaseModel):
    """One stage: a contiguous run of cells, the rank that runs it, and what it is expected to cost.

    Attributes:
        rank: the device.
        first_cell, last_cell: the run of cells, both ends included.
        cells: their names, by which the engine checks that plan and network belong together.
        forward_seconds, backward_seconds: one micro-batch, recomputation included in the backward.
        parameter_bytes: parameters only; ``peak_bytes`` has gradients, optimizer state and activations as well.
        peak_bytes: predicted peak memory of a training step.
        sent_bytes: values and gradients that leave this stage in one mini-batch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    first_cell: int
    last_cell: int
    cells: tuple[str, ...]
    forward_seconds: float
    backward_seconds: float
    parameter_bytes: int
    peak_bytes: int
    sent_bytes: int


class Plan(BaseModel):
    """How one network runs on several devices for one shape of mini-batch.

    A plan holds for other shapes as well: its cut stays exact, only its predictions belong to ``input_shape``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    network: str
    input_shape: tuple[int, ...]
    devices: int
    device_type: Literal["cpu", "cuda"]
    micro_batches: int
    schedule: ScheduleName
    recompute: Recompute
    precision: Precision
    channels_last: bool
    memory_limit_bytes: int | None
    stages: tuple[StagePlan, ...]
    step_seconds: float
    bubble: float

    @property
    def starts(self) -> list[int]:
        """The first cell of every stage."""
        return [stage.first_cell for stage in self.stages]

    def table(self) -> Table:
        """The plan as a table: stage, cells, seconds, memory, bytes sent."""
        limit = "" if self.memory_limit_bytes is None else f" of {format_bytes(self.memory_limit_bytes)} a device"
        table = Table(
            title=f"{self.network}, mini-batch {'×'.join(map(str, self.input_shape))}, {self.devices} × "
            f"{self.device_type}, {self.precision}{', channels-last' if self.channels_last else ''}",
            caption=f"{self.schedule}, {self.micro_batches} micro-batches, recompute {self.recompute}: "
            f"{self.step_seconds:.2f} s a step, {self.bubble:.0%} bubble, peak memory "
            f"{format_bytes(max(stage.peak_bytes for stage in self.stages))}{limit} (predicted)",
        )
        for column in ("stage", "cells"):
            table.add_column(column)
        for column in ("forward s", "backward s", "memory", "parameters", "sent a step"):
            table.add_column(column, justify="right")
        for index, stage in enumerate(self.stages):
            first, last = _short(stage.cells[0]), _short(stage.cells[-1])
            table.add_row(
                str(index),
                f"{stage.first_cell}-{stage.last_cell}  {first} … {last}",
                f"{stage.forward_seconds:.3f}",
                f"{stage.backward_seconds:.3f}",
                format_bytes(stage.peak_bytes),
                format_bytes(stage.parameter_bytes),
                format_bytes(stage.sent_bytes),
            )
        return table

    def save(self, path: Path) -> None:
        """Write the plan as JSON, atomically."""
        write_atomically(path, lambda temporary: temporary.write_text(self.model_dump_json(indent=1) + "\n"))

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan from JSON.

        Raises:
            PlanError: the file is absent or not a plan.
        """
        try:
            return cls.model_validate_json(path.read_text())
        except FileNotFoundError:
            raise PlanError(f"no plan at {path}; make one with `lamp3d plan … --json {path}`.") from None
        except ValidationError as error:
            raise PlanError(f"{path} is not a plan that this version of lamp3d reads: {error}") from error


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
    for unit in ("B", "kB", "MB", "GB", "TB"):
        digits = 0 if unit == "B" or count >= 99.95 else 1 if count >= 9.995 else 2
        shown = math.ceil(round(count * 10**digits, 6)) / 10**digits if up else round(count, digits)
        if shown < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{shown:g} {unit}"
