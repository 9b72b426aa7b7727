"""The best cut of a network for a schedule: where its stages begin, under a memory limit."""

from __future__ import annotations

import functools
import gc
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lamp3d.graph import Edge
from lamp3d.plan.costs import StageCosts, runs
from lamp3d.plan.links import LinkTable
from lamp3d.plan.memory import DeviceMemory, StageBytes, memory_use
from lamp3d.plan.partition import minimise_largest
from lamp3d.plan.program import CutProgram
from lamp3d.plan.routes import Routes
from lamp3d.plan.schedule import PLACEMENTS, SCHEDULES, Actions, StageTimes
from lamp3d.plan.simulate import TimeLine, Transfers, simulate

TOLERANCES = (1.0, 1.02, 1.05, 1.1, 1.2, 1.4, 1.7)
"""How much slower than the least possible the slowest rank may be, for the sake of fewer bytes sent: all are tried."""


FEW = 64
"""So many cuts are all tried."""


SEEDS = 2
"""Where there are more, so many of those that the dynamic program gives are improved, the fastest first ..."""

STEPS = (-3, -1, 1, 3)
"""... by moving where one stage begins by so many cells."""


NEARLY = 1.2
"""A cut that needs up to so many times the limit is improved until it fits, or cannot be."""


@dataclass(frozen=True)
class Cut:
    """A network cut for a schedule, and what a mini-batch comes to, played through on paper.

    Args:
        costs: of the network's cells.
        schedule: its name.
        devices: K.
        links: between the ranks of a pipeline.
        starts: the first cell of every stage.
    """

    costs: StageCosts
    schedule: str
    devices: int
    links: LinkTable
    starts: list[int]

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """The (first, last + 1) cells of every stage."""
        return list(runs(self.starts, len(self.costs.profile.cells)))

    @cached_property
    def ranks(self) -> list[int]:
        """The rank of every stage."""
        return PLACEMENTS[self.schedule](self.devices)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """The values that pass between stages."""
        return self.costs.graph.stage_edges(self.starts)

    @cached_property
    def routes(self) -> Routes:
        """The messages of a step."""
        values = set(self.costs.profile.value_bytes) - set(self.costs.graph.inputs)
        return Routes(self.edges, self.ranks, self._actions, [values] * self.costs.micro_batches)

    @cached_property
    def line(self) -> TimeLine:
        """The time line of a step."""
        return simulate(self._actions, self._times, Transfers(self.routes, self.costs.profile.value_bytes, self.links))

    @cached_property
    def working_seconds(self) -> float:
        """Of a step, if messages arrived at once."""
        return simulate(self._actions, self._times).seconds

    @cached_property
    def memory(self) -> list[DeviceMemory]:
        """What every rank holds."""
        costs = self.costs
        return memory_use(
            self.line,
            self.routes,
            self.edges,
            self.ranks,
            costs.profile.value_bytes,
            [
                StageBytes(
                    costs.held(*run),
                    costs.deferred(*run),
                    costs.static_bytes(*run),
                    costs.backward_bytes(*run),
                    costs.parameter_bytes(*run),
                )
                for run in self.bounds
            ],
        )

    @property
    def peak_bytes(self) -> int:
        """Peak memory of the fullest rank."""
        return max(device.peak_bytes for device in self.memory)

    @cached_property
    def sent_bytes(self) -> list[int]:
        """Bytes of values and gradients that leave each stage for other ranks in one mini-batch."""
        sent = [0] * len(self.starts)
        for edge in self.edges:
            size = self.costs.profile.value_bytes.get(edge.value, 0) * self.costs.micro_batches
            for rank in {self.ranks[user] for user in edge.users} - {self.ranks[edge.maker]}:
                sent[edge.maker] += size
                if edge.value not in self.costs.graph.inputs:  # the gradient goes back once, with the rank's last user
                    sent[min(user for user in edge.users if self.ranks[user] == rank)] += size
        return sent

    @cached_property
    def _times(self) -> list[StageTimes]:
        costs = self.costs
        return [
            StageTimes(rank, costs.forward_seconds(*run), costs.backward_seconds(*run), costs.weight_seconds(*run))
            for rank, run in zip(self.ranks, self.bounds, strict=True)
        ]

    @cached_property
    def _actions(self) -> Actions:
        return SCHEDULES[self.schedule](self._times, self.costs.micro_batches)


CutAt = Callable[[tuple[int, ...]], Cut]


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Python's collector off: cuts that are played through are small objects by the hundred thousand, and no garbage.

    For every few of them it would look at all that torch holds, and take a third of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_collection_paused()
def best_cut(
    costs: StageCosts,
    schedule: str,
    devices: int,
    limit: int | None,
    links: LinkTable,
    hopeless: float = math.inf,
    *,
    thorough: bool = True,
) -> Cut | None:
    """The cut with the fastest step; None if no cut fits.

    Few cuts are all played through. Where there are many, those of the dynamic program are: for each tolerance the cut
    with the fewest bytes sent among those whose slowest rank is within it of the least possible. From the fastest of
    them on (and from equally long stages, where it does not know ranks), a stage's beginning is moved for as long as
    that makes the step faster.

    Args:
        costs: of the network's cells.
        schedule: its name.
        devices: K.
        limit: of every rank's memory, in bytes.
        links: between the ranks of a pipeline.
        hopeless: seconds of a step; what is slower than that, messages aside, is not improved.
        thorough: improve a cut that nearly fits.
    """
    stages, n = len(PLACEMENTS[schedule](devices)), len(costs.profile.cells)
    if stages > n or not _might_fit(costs, stages, limit):
        return None
    cut_at = _cuts(costs, schedule, devices, links)
    if math.comb(n - 1, stages - 1) <= FEW:
        every = [cut_at((0, *inner)) for inner in itertools.combinations(range(1, n), stages - 1)]
        return _fastest_that_fits(every, limit)
    program = CutProgram(costs, schedule, devices)
    known: dict[tuple[int, ...], Cut] = {}
    for tolerance in TOLERANCES:
        found = _fitting(program, cut_at, limit, tolerance, thorough=thorough)
        if found is None:
            break  # a larger tolerance changes nothing about what fits
        if found.working_seconds > hopeless:
            return found  # fewer bytes sent would not save it
        known[tuple(found.starts)] = found
    if not known:
        return None
    seeds = sorted(known.values(), key=lambda cut: cut.line.seconds)[:SEEDS]
    if not program.is_exact:
        even = _fastest_that_fits([cut_at(_equally_long(costs.seconds[0], stages))], limit)
        seeds += [] if even is None else [even]
    return min((_improved(seed, cut_at, limit, hopeless) for seed in seeds), key=lambda cut: cut.line.seconds)


def _cuts(costs: StageCosts, schedule: str, devices: int, links: LinkTable) -> CutAt:
    """The cut that begins its stages at given cells, each made (and so played through) once."""
    return functools.cache(lambda starts: Cut(costs, schedule, devices, links, list(starts)))


def _equally_long(seconds: NDArray[np.float64], stages: int) -> tuple[int, ...]:
    """Where stages of about equal length begin, of cells that have taken so many seconds before each of them.

    A schedule can need that more than a slowest rank that is as fast as can be: the interleaved one waits for every
    stage that is longer than the others.
    """
    starts, n = [0], len(seconds) - 1
    for stage in range(1, stages):
        nearest = int(np.abs(seconds - seconds[-1] * stage / stages).argmin())
        starts.append(min(max(starts[-1] + 1, nearest), n - stages + stage))
    return tuple(starts)


def _improved(best: Cut, cut_at: CutAt, limit: int | None, hopeless: float) -> Cut:
    """A cut, one stage's beginning moved at a time for as long as that makes it faster."""
    while best.line.seconds <= hopeless:
        nearby = map(cut_at, _moved(best.starts, len(best.costs.profile.cells)))
        faster = [cut for cut in nearby if cut.line.seconds < best.line.seconds]
        if (found := _fastest_that_fits(faster, limit)) is None:
            break
        best = found
    return best


def _fastest_that_fits(cuts: Iterable[Cut], limit: int | None) -> Cut | None:
    """The first in the order of seconds that fits: to play a cut's memory through takes as long as its time line."""
    ordered = sorted(cuts, key=lambda cut: cut.line.seconds)
    return next((cut for cut in ordered if limit is None or cut.peak_bytes <= limit), None)


def _might_fit(costs: StageCosts, stages: int, limit: int | None) -> bool:
    """False where no cut can fit: where stages cannot even hold one micro-batch each."""
    if limit is None:
        return True
    return minimise_largest(costs.seconds, [costs.static + costs.held_bytes <= limit] * stages) is not None


def _moved(starts: list[int], n: int) -> Iterator[tuple[int, ...]]:
    """All cuts with one stage beginning some cells earlier or later."""
    bounds = [*starts, n]
    for stage in range(1, len(starts)):
        for step in STEPS:
            if bounds[stage - 1] < starts[stage] + step < bounds[stage + 1]:
                yield *starts[:stage], starts[stage] + step, *starts[stage + 1 :]


@_collection_paused()
def fitting_cut(costs: StageCosts, schedule: str, devices: int, limit: int | None, links: LinkTable) -> Cut | None:
    """Of the cuts that the search finds to fit, one whose slowest rank is as fast as can be; None if it finds none."""
    program, cut_at = CutProgram(costs, schedule, devices), _cuts(costs, schedule, devices, links)
    return _fitting(program, cut_at, limit, 1.0, thorough=False)


def _fitting(
    program: CutProgram, cut_at: CutAt, limit: int | None, tolerance: float, *, thorough: bool = True
) -> Cut | None:
    """A cut that fits; None if none is found.

    Its slowest rank is within a factor ``tolerance`` of the least possible. The search bounds a rank's memory from
    above; what it finds is then played through. Where that fails, a ``thorough`` one goes by memory alone.
    """
    if limit is None:
        return None if (starts := program.cut(math.inf, tolerance)) is None else cut_at(tuple(starts))
    bound = float(limit)
    tried: list[Cut] = []
    for _ in range(4):
        if (starts := program.cut(bound, tolerance)) is None:
            break
        tried.append(cut_at(tuple(starts)))
        if tried[-1].peak_bytes <= limit:
            return tried[-1]
        bound *= 0.98 * limit / tried[-1].peak_bytes  # unequal stages: more in flight than the search supposed
    if not thorough:
        return None
    if (starts := program.smallest) is not None:
        tried.append(cut_at(tuple(starts)))
    return _emptied(min(tried, key=lambda cut: cut.peak_bytes), cut_at, limit) if tried else None


def _emptied(best: Cut, cut_at: CutAt, limit: int) -> Cut | None:
    """A cut that nearly fits, one stage's beginning moved at a time for as long as that leaves its peak lower.

    What waits to be sent or used depends on when each rank comes to it, which the program's bound knows nothing of.
    """
    if best.peak_bytes > NEARLY * limit:
        return None
    while best.peak_bytes > limit:
        nearby = map(cut_at, _moved(best.starts, len(best.costs.profile.cells)))
        lowest = min(nearby, key=lambda cut: cut.peak_bytes, default=best)
        if lowest.peak_bytes >= best.peak_bytes:
            return None
        best = lowest
    return best


@_collection_paused()
def least_memory(costs: StageCosts, schedule: str, devices: int, links: LinkTable) -> int | None:
    """The smallest limit, to a thousandth, under which a cut is found; None if there are too few cells."""
    program, cut_at = CutProgram(costs, schedule, devices), _cuts(costs, schedule, devices, links)
    cut = _fitting(program, cut_at, None, 1.0)
    if cut is None:
        return None
    low, high = 0, cut.peak_bytes
    while high - low > high // 1000:
        middle = (low + high) // 2
        found = _fitting(program, cut_at, middle, 1.0)
        if found is None:
            low = middle
        else:
            high = found.peak_bytes
    return high
