"""The plan: who does what. Frozen, readable as a table, written as JSON, and all that the engine needs to know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    ValidationError,
    field_validator,
    model_validator,
)
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lamp3d.errors import ConfigError, PlanError
from lamp3d.files import write_text
from lamp3d.graph import Edge
from lamp3d.graph.inputs import input_text, volume_of
from lamp3d.plan.amounts import counted, format_bytes
from lamp3d.plan.links import Links
from lamp3d.plan.routes import Routes
from lamp3d.plan.schedule import SCHEDULES, Actions, StageTimes, splits_backward
from lamp3d.plan.simulate import TimeLine, Transfers, simulate
from lamp3d.settings import told_with_its_key

Recompute = Literal["never", "always"] | tuple[tuple[str, ...], ...]
"""Which cells are computed again in backward: none, all, or those of some blocks; a block comes back as a whole."""
Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


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
    forward_seconds: NonNegativeFloat
    backward_seconds: NonNegativeFloat
    weight_seconds: NonNegativeFloat
    parameter_bytes: NonNegativeInt
    sent_bytes: NonNegativeInt


class EdgePlan(BaseModel):
    """A value that passes between stages.

    Attributes:
        value: its name.
        maker, users: stages.
        size: bytes of one micro-batch's.
        gradient: whether one goes back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: str
    maker: int
    users: tuple[int, ...]
    size: NonNegativeInt
    gradient: bool


class DevicePlan(BaseModel):
    """What one device is expected to hold in a training step.

    Attributes:
        saved_bytes: at most, between actions: for backward passes to come, outputs for the loss, what is on its way.
        peak_bytes: with parameters, gradients, optimizer state and the loss.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    saved_bytes: NonNegativeInt
    peak_bytes: NonNegativeInt


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
        recompute: "never" or "always", or blocks of cells, by their names, that are computed again in backward.
        stages: in the network's order; a device may have several.
        per_device: by rank of the pipeline.
        edges: what passes between stages.
        links: between the devices.
        gathered: the cells of a cut volume that every rank computes, their slabs being too thin.
        exchanged_bytes: that a rank sends in a step to those with which it shares volumes.
        reduce_seconds: that a step waits for the sum of replicas' and slabs' gradients.
        step_seconds, bubble: of a step, in training.
        uncertainty: of the seconds, relative, as far as the measurements that they come from tell.
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
    memory_limit_bytes: NonNegativeInt | None
    stages: tuple[StagePlan, ...]
    per_device: tuple[DevicePlan, ...]
    edges: tuple[EdgePlan, ...] = ()
    links: Links | None = None
    gathered: tuple[str, ...] = ()
    exchanged_bytes: NonNegativeInt = 0
    reduce_seconds: NonNegativeFloat = 0.0
    step_seconds: NonNegativeFloat
    bubble: float
    uncertainty: NonNegativeFloat = 0.0

    @model_validator(mode="before")
    @classmethod
    def _of_one_machine(cls, content: Any) -> Any:
        """Plans that know one link alone, as they were saved before there were links between machines."""
        if isinstance(content, dict) and "link" in content:
            content = dict(content)
            link = content.pop("link")
            return content | {"links": None if link is None else {"within": link}}
        return content

    @field_validator("recompute", mode="before")
    @classmethod
    def _in_blocks(cls, value: object) -> object:
        return recompute_setting(value)

    @field_validator("schedule")
    @classmethod
    def _is_a_schedule(cls, name: str) -> str:
        with told_with_its_key():
            check_schedule(name)
        return name

    @model_validator(mode="after")
    def _hangs_together(self) -> Plan:
        """What a plan made by lamp3d is by itself, and one that was edited by hand need not be."""
        if len(self.space) != len(self.space_dims) or len(set(self.space_dims) & {2, 3, 4}) != len(self.space):
            raise ValueError(
                f"space is {self.space} and space_dims {self.space_dims}: they want an entry an axis, and the "
                "latter 2, 3 or 4, each at most once"
            )
        counts = {"data": self.data, "micro_batches": self.micro_batches, "least_planes": self.least_planes}
        for name, count in (*counts.items(), *(("space", slabs) for slabs in self.space)):
            if count < 1:
                raise ValueError(f"{name} has {count}, and must be 1 or more")
        if not self.stages or min(self.ranks) < 0:
            raise ValueError(f"the stages' ranks are {self.ranks}, and must be one or more, from 0 on")
        pipe = 1 + max(self.ranks)
        if self.devices != self.data * self.slabs * pipe:
            raise ValueError(
                f"devices is {self.devices}, and must be data × space × the stages' ranks: "
                f"{self.data} × {self.slabs} × {pipe}"
            )
        if len(self.per_device) != pipe:
            raise ValueError(f"per_device has {len(self.per_device)} entries for {pipe} ranks of a pipeline")
        first = 0
        for index, stage in enumerate(self.stages):
            last = first + len(stage.cells) - 1
            if not stage.cells or (stage.first_cell, stage.last_cell) != (first, last):
                raise ValueError(
                    f"stages.{index} has cells {stage.first_cell} to {stage.last_cell} and names {len(stage.cells)}: "
                    f"stages follow one another, and this one begins at {first}"
                )
            first = last + 1
        return self

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of the volume among the inputs; most networks have no other."""
        return volume_of(self.input_shape)

    @property
    def pipe(self) -> int:
        """The devices of one pipeline."""
        return self.devices // (self.data * self.slabs)

    @property
    def slabs(self) -> int:
        """Into how many parts a volume is cut."""
        return math.prod(self.space)

    @property
    def peak_bytes(self) -> int:
        """What the fullest device holds."""
        return max(device.peak_bytes for device in self.per_device)

    @property
    def starts(self) -> list[int]:
        """The first cell of every stage."""
        return [stage.first_cell for stage in self.stages]

    @property
    def cells(self) -> list[str]:
        """The names of all stages' cells."""
        return [cell for stage in self.stages for cell in stage.cells]

    @property
    def is_for_any_cells(self) -> bool:
        """Whether it holds whatever the network's cells are: all in one stage, and none of them named."""
        return len(self.stages) == 1 and isinstance(self.recompute, str)

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

    def time_line(self) -> TimeLine:
        """The predicted time line of a step."""
        actions = self.actions(self.micro_batches)
        if self.links is None:
            return simulate(actions, self.stage_times)
        edges = [Edge(edge.value, edge.maker, edge.users) for edge in self.edges]
        gradients = {edge.value for edge in self.edges if edge.gradient}
        routes = Routes(edges, self.ranks, actions, [gradients] * self.micro_batches)
        sizes = {edge.value: edge.size for edge in self.edges}
        return simulate(actions, self.stage_times, Transfers(routes, sizes, self.links.in_pipeline(self.pipe)))

    def table(self) -> Table:
        """The plan as a table: stage, cells, seconds, memory, bytes sent."""
        limit = "" if self.memory_limit_bytes is None else f" of {format_bytes(self.memory_limit_bytes)} a device"
        table = Table(
            box=SIMPLE_HEAD,
            title=f"{self.network}, mini-batch {input_text(self.input_shape)}, {self.devices_text()} "
            f"{self.device_type}{self._machines_text()}, {self.precision}"
            f"{', channels-last' if self.channels_last else ''}",
            caption=f"{self.schedule}, {counted(self.micro_batches, 'micro-batch')}, recompute "
            f"{self.recompute_text()}: {self.step_seconds:.2f} s a step, {self.bubble:.0%} bubble, peak memory "
            f"{format_bytes(self.peak_bytes)}{limit} (predicted{self._spread()})"
            f"{self._space_text()}",
        )
        for column in ("stage", "device", "cells"):
            table.add_column(column, overflow="fold")
        for column in ("fwd s", "bwd s", "params", "sent", "memory"):
            table.add_column(column, justify="right", no_wrap=True)
        for index, stage in enumerate(self.stages):
            cells = f"{stage.first_cell}-{stage.last_cell}  {_short(stage.cells[0])}\n… {_short(stage.cells[-1])}"
            if len(stage.cells) == 1:
                cells = f"{stage.first_cell}  {_short(stage.cells[0])}"
            table.add_row(
                str(index),
                str(stage.rank),
                cells,
                f"{stage.forward_seconds:.3f}",
                f"{stage.backward_seconds:.3f}",
                format_bytes(stage.parameter_bytes),
                format_bytes(stage.sent_bytes),
                format_bytes(self.per_device[stage.rank].peak_bytes) if stage.rank not in self.ranks[:index] else "",
            )
        return table

    def _spread(self) -> str:
        return f"; ± {self.uncertainty:.0%} of the seconds, by the spread of what was timed" if self.uncertainty else ""

    def _space_text(self) -> str:
        if self.slabs == 1:
            return ""
        axes = " and ".join(["depth", "height", "width"][dim - 2] for dim in self.space_dims)
        text = (
            f"\nvolumes cut along {axes}; a rank sends {format_bytes(self.exchanged_bytes)} of borders and sums a step"
        )
        if self.gathered:
            text += f"; computed by every rank: {', '.join(map(_short, self.gathered))}"
        return text

    def devices_text(self) -> str:
        """The mesh in words: replicas × slabs × devices of a pipeline."""
        factors = [f"{self.data} replicas"] * (self.data > 1) + [f"{self.slabs} slabs"] * (self.slabs > 1)
        return " × ".join([*factors, str(self.pipe)]) + ("" if factors else " ×")

    def _machines_text(self) -> str:
        if self.links is None or self.links.across is None:
            return ""
        return f" on {math.ceil(self.devices / self.links.per_machine)} machines ({self.links.across.title})"

    def recompute_text(self) -> str:
        """What is computed again in backward, in words."""
        if isinstance(self.recompute, str):
            return self.recompute
        return f"{counted(sum(map(len, self.recompute)), 'cell')} in {counted(len(self.recompute), 'block')}"

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        write_text(Path(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from JSON.

        Raises:
            PlanError: the file is absent or not a plan.
        """
        try:
            return cls.model_validate_json(Path(path).read_text("utf-8"))
        except FileNotFoundError:
            raise PlanError(f"no plan at {path}; make one with `lamp3d plan … --json {path}`.") from None
        except (ValidationError, UnicodeDecodeError) as error:
            what = str(error)
            if isinstance(error, ValidationError):  # pydantic's own text has many lines
                first = error.errors()[0]
                what = ": ".join(
                    filter(None, (".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")))
                )
            raise PlanError(
                f"{path} is not a plan that this version of lamp3d reads ({what}); make it anew, or where a run "
                "keeps it, delete it: --resume plans anew."
            ) from error


def blocks_of(recompute: Recompute, cells: Sequence[str]) -> list[int | None]:
    """For each cell the number of the block that it is computed again with, None where it is not.

    Raises:
        PlanError: a block names a cell that is not there.
    """
    if isinstance(recompute, str):
        return [0 if recompute == "always" else None] * len(cells)
    recompute = recompute_setting(recompute)
    number = {cell: index for index, block in enumerate(recompute) for cell in block}
    if unknown := set(number) - set(cells):
        raise PlanError(
            f"recompute names cells that the network has not: {', '.join(sorted(unknown))}; it has "
            f"{', '.join(cells[:8])}, …"
        )
    return [number.get(cell) for cell in cells]


def recompute_setting(value: Any) -> Any:
    """A setting as a plan keeps it: names of cells that are not in blocks are one block."""
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value):
        return (tuple(value),)
    if isinstance(value, list | tuple) and all(isinstance(block, list | tuple) for block in value):
        return tuple(map(tuple, value))
    return value


def check_schedule(name: str) -> None:
    """Make sure that there is a schedule of this name.

    Raises:
        ConfigError: listing those that there are.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"there is no schedule {name!r}; there are {', '.join(SCHEDULES)}.")


def _short(cell: str) -> str:
    return cell.split(" + ", maxsplit=1)[0]
