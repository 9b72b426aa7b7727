"""What a search chooses from: every mesh, number of micro-batches and schedule that a request allows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lamp3d.plan.plan import Recompute
from lamp3d.plan.schedule import PLACEMENTS, SCHEDULES
from lamp3d.plan.slabs import Slabs, longest_axes

ADAMW_COPIES = 2
"""The two moments that AdamW keeps of every parameter, of which plans think unasked."""

MOST_FOLDED = 4
"""Devices of the longest pipelines with two runs a rank that are considered unasked: to cut longer ones takes long."""

MOST_PASSES = 256
"""Stages × micro-batches of the pipelines that are considered unasked; to play through longer ones takes seconds."""


@dataclass(frozen=True)
class Option:
    """What a plan decides before the network is cut.

    Attributes:
        data, slabs, pipe: the mesh.
        micro_batches: M, of a replica's share.
        schedule: the order of actions.
    """

    data: int
    slabs: Slabs
    pipe: int
    micro_batches: int
    schedule: str

    def __str__(self) -> str:
        mesh = [f"data {self.data}"] * (self.data > 1)
        mesh += [f"space {'x'.join(map(str, self.slabs.mesh))}"] * bool(self.slabs.mesh)
        mesh += [f"pipe {self.pipe}, {self.schedule}"] * (self.pipe > 1)
        parts = f", {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""
        return (" × ".join(mesh) or "one device") + parts


@dataclass(frozen=True)
class Request:
    """What is to be decided, and what is not.

    Attributes:
        volume: the mini-batch's shape (of the first input).
        devices: how many there are.
        limit: of each one's memory, in bytes; None: there is none.
        precision, channels_last: of the plan.
        data, space, pipe, micro_batches, schedule, recompute: what is fixed; None: what is best.
        least_planes: a level whose slabs have fewer planes is gathered; None: what is best.
        any_loss: whether the plan must do for losses that are no mean over cases.
        by_case: whether the loss is known to be such a mean, and so computed a micro-batch at a time.
        optimizer_copies: the optimizer's state, in units of the parameters.
    """

    volume: tuple[int, ...]
    devices: int
    limit: int | None
    precision: str
    channels_last: bool
    data: int | None = None
    space: tuple[int, ...] | None = None
    pipe: int | None = None
    micro_batches: int | None = None
    schedule: str | None = None
    recompute: Recompute | None = None
    least_planes: int | None = 1
    any_loss: bool = False
    by_case: bool = False
    optimizer_copies: int = ADAMW_COPIES

    @property
    def batch(self) -> int:
        """Cases of a mini-batch."""
        return self.volume[0]


def options(request: Request) -> Iterator[Option]:
    """All that may be considered."""
    for data, mesh, pipe in meshes(request):
        if len(request.volume) == 5 and any(
            extent < size
            for extent, size in zip(sorted(request.volume[2:], reverse=True), sorted(mesh, reverse=True), strict=False)
        ):
            continue
        slabs = longest_axes(request.volume, mesh, request.least_planes or 1)
        share = request.batch // data
        for micro_batches in _divisors(share) if request.micro_batches is None else (request.micro_batches,):
            for schedule in (schedules := _schedules(request, pipe)):
                stages = len(PLACEMENTS[schedule](pipe))
                unasked = request.pipe is None or request.micro_batches is None
                if pipe > 1 and unasked and request.schedule is None and stages * micro_batches > MOST_PASSES:
                    continue
                if pipe > MOST_FOLDED and stages > pipe and request.schedule is None:
                    continue
                if pipe > 1 and micro_batches == 1 and schedule != schedules[0] and request.schedule is None:
                    continue  # nothing to put in order
                yield Option(data, slabs, pipe, min(share, micro_batches), schedule)


def meshes(request: Request) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """Every data × space × pipe that comes to so many devices."""
    for data in _divisors(request.devices) if request.data is None else (request.data,):
        if request.devices % data or request.batch % data or (request.any_loss and data > 1 and request.data is None):
            continue
        unasked = _spaces(request.devices // data) if len(request.volume) == 5 else ((),)
        for mesh in unasked if request.space is None else (request.space,):
            count = math.prod(mesh)
            pipe, rest = divmod(request.devices, data * count)
            if not rest and request.pipe in (None, pipe):
                yield data, mesh, pipe


def _spaces(devices: int) -> Iterator[tuple[int, ...]]:
    for count in _divisors(devices):
        yield (count,) if count > 1 else ()
        yield from ((a, count // a) for a in _divisors(count) if a > 1 and a <= count // a and count >= 8)


def _schedules(request: Request, pipe: int) -> Sequence[str]:
    if request.schedule is not None:
        return (request.schedule,)
    if request.any_loss:
        return ("gpipe",)
    return tuple(name for name in SCHEDULES if name != "gpipe") if pipe > 1 else ("1f1b",)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
