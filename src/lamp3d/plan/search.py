"""The search for the fastest plan that fits: every mesh, schedule, cut and way to recompute, as far as it may matter.

Each *option* says all but where to cut and what to compute again. No plan of an option can take less than its *bound*;
options are tried in the order of their bounds, so that those that cannot win are never played through.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lamp3d.errors import ConfigError
from lamp3d.plan.blocks import Blocks
from lamp3d.plan.costs import StageCosts
from lamp3d.plan.cut import Cut, best_cut, fitting_cut, least_memory
from lamp3d.plan.links import Link
from lamp3d.plan.meter import Meter
from lamp3d.plan.options import Option, Request, options
from lamp3d.plan.plan import Recompute
from lamp3d.plan.schedule import PLACEMENTS, splits_backward
from lamp3d.plan.slabs import Slabs, gather_levels

DOES_NOT_FIT = "does not fit"

KEPT = 11
"""How many plans are played through at least: the best and ten alternatives."""


HOPELESS = 1.1
"""A cut that much slower than the best plan so far is not improved."""

FRUGAL = 14
"""Where only memory matters: of the ways to recompute, so many that hold the least."""


@dataclass(frozen=True)
class Found:
    """What became of an option.

    Attributes:
        option: it.
        bound: seconds that no plan of it can beat.
        cut: its best plan that fits; None if there is none, or if it was not looked for.
        reduce_seconds: that a step waits for the sum of gradients.
        why: it has no plan.
    """

    option: Option
    bound: float
    cut: Cut | None = None
    reduce_seconds: float = 0.0
    why: str = ""

    @property
    def seconds(self) -> float:
        """Of a step; infinite if there is no plan."""
        return math.inf if self.cut is None else self.cut.line.seconds + self.reduce_seconds


@dataclass(frozen=True)
class Answer:
    """What a search came to.

    Attributes:
        found: all options, those with a plan first, the fastest first.
    """

    found: tuple[Found, ...]

    @property
    def best(self) -> Found | None:
        """The fastest that fits."""
        return self.found[0] if self.found and self.found[0].cut is not None else None

    @property
    def bound(self) -> float:
        """Seconds of a step that no plan can beat, whatever the memory."""
        return min(found.bound for found in self.found)


def _mesh(option: Option) -> tuple[int, Slabs, int]:
    """Replicas, slabs, devices of a pipeline."""
    return option.data, option.slabs, option.pipe


class Search:
    """Finds the fastest plan for a request.

    Args:
        meter: of the network's cells.
        request: what is to be decided.
        kept: how many plans are played through at least, if there are as many.
    """

    def __init__(self, meter: Meter, request: Request, kept: int = KEPT):
        self.meter, self.request, self.kept = meter, request, kept
        self._costs: dict[tuple[object, ...], StageCosts] = {}
        self._profile, self._gathered = functools.cache(meter.profile), functools.cache(self._gathering)

    def answer(self) -> Answer:
        """Try the options, the most promising first."""
        answer = self._answer(thorough=False)
        return self._answer(thorough=True) if answer.best is None else answer

    def _answer(self, *, thorough: bool) -> Answer:
        open_ = sorted(map(self._opened, options(self.request)), key=lambda found: found.bound)
        done: list[Found] = []
        for found in open_:
            if found.why:
                done.append(found)
                continue
            best = sorted(other.seconds for other in done if other.cut is not None)
            if len(best) >= self.kept and found.bound > best[self.kept - 1]:
                why = f"cannot be faster than {found.bound:.3g} s"
                done.append(replace(found, why=why))
                continue
            hopeless = HOPELESS * best[0] if best else math.inf
            if best and found.bound >= best[0]:
                hopeless = 0.0  # it cannot win: it is shown beside the plan, and worth no effort
            done.append(self.try_out(found, hopeless, thorough=thorough))
        return Answer(tuple(sorted(done, key=lambda found: (found.seconds, found.bound))))

    def _opened(self, option: Option) -> Found:
        """An option with its bound; without a plan where the network cannot be cut so, or takes no such slabs."""
        if option.slabs.mesh and (why := self.meter.refusal(len(option.slabs.mesh))) is not None:
            return Found(option, math.inf, why=why)
        try:
            option = replace(option, slabs=self._gathered(option.slabs, self._slab_link(option)))
            return Found(option, self.bound(option))
        except ConfigError as error:
            if not option.slabs.mesh:
                raise
            return Found(option, math.inf, why=str(error))

    def _slab_link(self, option: Option) -> Link:
        """What joins those that share a volume."""
        return self.meter.links.among_slabs(option.slabs.count, option.pipe)

    def _gathering(self, slabs: Slabs, link: Link) -> Slabs:
        """The slabs, with those levels gathered that every rank has sooner computed than exchanged."""
        if not slabs.mesh or self.request.least_planes is not None:
            return slabs
        how = self.request.precision, self.request.channels_last
        ways = [replace(slabs, least=least) for least in gather_levels(self.meter.whole(*how), slabs)]
        return min(ways, key=lambda way: self._profile(way, *how, False, None, link).seconds)

    def costs(self, option: Option, recompute: Recompute) -> StageCosts:
        """What a micro-batch of an option costs."""
        cases = math.ceil(self.request.batch / option.data / option.micro_batches)
        split = option.pipe > 1 and splits_backward(option.schedule)
        at_once = option.schedule == "gpipe" and not self.request.by_case
        link = self._slab_link(option)
        key = option.slabs, split, cases, option.micro_batches, recompute, at_once, link
        if key not in self._costs:
            how = option.slabs, self.request.precision, self.request.channels_last, split
            profile = self._profile(*how, self.meter.timed_cases(*how, cases), link).times(
                math.ceil(cases / self.meter.micro_batch)
            )
            self._costs[key] = StageCosts(
                self.meter.graph, profile, option.micro_batches, recompute, at_once, self.request.optimizer_copies
            )
        return self._costs[key]

    def bound(self, option: Option) -> float:
        """Seconds that no plan of an option can beat.

        A pipeline has all of the work to share, and one micro-batch has to go all the way (but for weight gradients
        that are computed apart). With one stage a rank, stage r begins when a micro-batch has come through those before
        it and ends that long before the step; if the stages' shares x of the work are best, all have the same
        x₀ + … + xᵣ₋₁ + M xᵣ, from which follows the sum of a geometric series.
        """
        profile = self.costs(option, "never").profile
        m, k = option.micro_batches, option.pipe
        way = profile.seconds - sum(cell.weight_seconds for cell in profile.cells)
        bounds = [profile.seconds * m / k, way if k > 1 else 0.0]
        if len(PLACEMENTS[option.schedule](k)) == k and not splits_backward(option.schedule):
            bounds.append(profile.seconds / (1 - (1 - 1 / m) ** k))
        return max(bounds) + self.reduce_seconds(option)

    def reduce_seconds(self, option: Option) -> float:
        """What the sum of gradients over replicas and slabs takes beyond the backward that it runs beside."""
        ranks = option.data * option.slabs.count
        if ranks == 1:
            return 0.0
        profile = self.costs(option, "never").profile
        size = sum(cell.parameter_bytes for cell in profile.cells) / option.pipe
        link: Link = self.meter.links.within
        takes = self.meter.links.sum_seconds(size, ranks, option.pipe)
        behind = 0.0 if link.by_cores else sum(cell.backward_seconds for cell in profile.cells) / option.pipe
        return max(link.seconds, takes - behind)

    def try_out(self, found: Found, hopeless: float = math.inf, *, thorough: bool = True) -> Found:
        """The best plan of an option: without recomputation, with as little of it as fits, or with all of it.

        Args:
            found: the option.
            hopeless: seconds of a step beyond which a cut is not improved.
            thorough: improve cuts that nearly fit.
        """
        option, request = found.option, self.request
        stages = len(PLACEMENTS[option.schedule](option.pipe))
        if stages > len(self.meter.graph.cells):
            return replace(found, why=f"{len(self.meter.graph.cells)} cells cannot be cut into {stages} stages")
        reduce_seconds, links = self.reduce_seconds(option), self.meter.links.in_pipeline(option.pipe)
        for recompute in self.ways_to_recompute(option):
            costs = self.costs(option, recompute)
            cut = best_cut(costs, option.schedule, option.pipe, request.limit, links, hopeless, thorough=thorough)
            if cut is not None:
                return replace(found, cut=cut, reduce_seconds=reduce_seconds)
        if option.slabs != (even := replace(option.slabs, least=request.least_planes or 1)):
            return self.try_out(replace(found, option=replace(option, slabs=even)), hopeless, thorough=thorough)
        return replace(found, why=DOES_NOT_FIT)

    def fits(self) -> bool:
        """Whether there is a plan among the frugal ones."""
        between = self.meter.links.in_pipeline
        return any(
            fitting_cut(costs, option.schedule, option.pipe, self.request.limit, between(option.pipe))
            for option, costs in self._frugal()
        )

    def least_memory(self) -> int | None:
        """The smallest limit, about, under which there is a plan; None if there are too few cells."""
        between = self.meter.links.in_pipeline
        found = [
            least_memory(costs, option.schedule, option.pipe, between(option.pipe)) for option, costs in self._frugal()
        ]
        return min((size for size in found if size is not None), default=None)

    def _frugal(self) -> Iterator[tuple[Option, StageCosts]]:
        """What needs the least memory: small micro-batches, few of them in flight, much computed again."""
        every = list(options(self.request))
        for option in every:
            others = [other for other in every if _mesh(other) == _mesh(option)]
            most = max(other.micro_batches for other in others)
            schedules = {other.schedule for other in others}
            frugal = "1f1b" if "1f1b" in schedules else min(schedules)
            if (option.micro_batches, option.schedule) == (most, frugal) and not self._opened(option).why:
                for recompute in self._frugal_ways(option):
                    yield option, self.costs(option, recompute)

    def _frugal_ways(self, option: Option) -> Sequence[Recompute]:
        if self.request.recompute is not None:
            return [self.request.recompute]
        return [*self.blocks(option).frugal(FRUGAL), "always"]

    def ways_to_recompute(self, option: Option) -> Iterator[Recompute]:
        """Those to try, the fastest first."""
        if self.request.recompute is not None:
            yield self.request.recompute
            return
        yield "never"
        yield from self.blocks(option).choices()
        yield "always"

    def blocks(self, option: Option) -> Blocks:
        """The ways to recompute in blocks."""
        return Blocks(self.costs(option, "never"))
