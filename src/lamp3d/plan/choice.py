"""From a request to a plan: the fastest that fits in any of some precisions, and what it was chosen from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lamp3d.errors import PlanError
from lamp3d.graph.inputs import input_text, title_of, with_batch
from lamp3d.plan.advice import does_not_fit
from lamp3d.plan.amounts import counted, format_bytes
from lamp3d.plan.meter import Meter, Way
from lamp3d.plan.options import Request
from lamp3d.plan.plan import DevicePlan, EdgePlan, Plan, StagePlan
from lamp3d.plan.search import DOES_NOT_FIT, KEPT, Answer, Found, Search
from lamp3d.plan.slabs import is_gathered

WORTH_LESS_EXACT = 1.05
"""So many times as fast must a less exact precision be to be chosen."""


@dataclass(frozen=True)
class Planning:
    """A plan, and what it was chosen from.

    Attributes:
        plan: the fastest that fits.
        answer: all that was considered, in the plan's precision.
        others: the best plans in other precisions.
    """

    plan: Plan
    answer: Answer
    others: tuple[Plan, ...] = ()

    @property
    def bound_seconds(self) -> float:
        """Of a step: what no plan can beat, by the same profile, whatever the memory."""
        return min(self.answer.bound, self.plan.step_seconds)

    @property
    def gap(self) -> float:
        """How far the plan may be from the best one at most, relative."""
        return self.plan.step_seconds / self.bound_seconds - 1

    def alternatives(self) -> Table:
        """The plan and the best of the others, and why each of them lost."""
        table = Table(
            box=SIMPLE_HEAD,
            title=f"Considered: {counted(len(self.answer.found), 'way')} to use the devices",
            caption=f"No plan can take less than {self.bound_seconds:.3g} s a step; the chosen one is within "
            f"{self.gap:.0%} of that."
            + "".join(
                f" In {other.precision} the best takes {other.step_seconds:.3g} s and {format_bytes(other.peak_bytes)}."
                for other in self.others
            ),
        )
        table.add_column("plan", overflow="fold")
        for column in ("s a step", "memory"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("", overflow="fold")
        for index, found in enumerate(self.answer.found[:KEPT]):
            table.add_row(*_row(found, self.plan, chosen=index == 0))
        return table


def search_precisions(
    meter: Meter,
    request: Request,
    ways: Sequence[Way],
    if_none: Sequence[Way] = (),
    *,
    advise: bool = True,
    kept: int = KEPT,
) -> Planning:
    """The fastest plan in any of some precisions; of two that take about as long, the more exact one.

    Args:
        meter: of the network.
        request: what is to be decided beside the precision and the layout.
        ways: to choose from, the most exact first.
        if_none: the same, where nothing fits in any of the former.
        advise, kept: as for :func:`search_plans`.

    Raises:
        PlanError: no plan fits.
    """
    found: list[Planning] = []
    for index, (precision, channels_last) in enumerate(every := (*ways, *if_none)):
        if index == len(ways) and found:
            break
        hopeless = index == len(every) - 1 and not found
        try:
            wanted = replace(request, precision=precision, channels_last=channels_last)
            found.append(search_plans(meter, wanted, advise=advise and hopeless, kept=kept))
        except PlanError:
            if hopeless:
                raise
    best = min(found, key=lambda planning: planning.plan.step_seconds)
    if found[0].plan.step_seconds < WORTH_LESS_EXACT * best.plan.step_seconds:
        best = found[0]
    return replace(best, others=tuple(planning.plan for planning in found if planning is not best))


def search_plans(meter: Meter, request: Request, *, advise: bool = True, kept: int = KEPT) -> Planning:
    """The fastest plan for a request.

    Args:
        meter: of the network.
        request: what is to be decided.
        advise: where nothing fits, look for what would.
        kept: how many plans to compare at least.

    Raises:
        PlanError: no plan fits.
    """
    answer = Search(meter, request, kept).answer()
    if not answer.found:
        raise PlanError(
            f"{request.devices} devices cannot share {input_text(meter.input_shape)} as it is asked for; leave data, "
            "space and pipe to the planner, or take fewer devices."
        )
    if answer.best is None:
        few = {found.why for found in answer.found} - {DOES_NOT_FIT}
        if few and all(found.why in few for found in answer.found):
            raise PlanError(f"{'; '.join(why.rstrip('.') for why in sorted(few))}.")
        raise PlanError(does_not_fit(meter, request, advise=advise))
    return Planning(_plan(answer.best, meter, request, title_of(meter.network)), answer)


def _plan(found: Found, meter: Meter, request: Request, network: str) -> Plan:
    assert found.cut is not None
    cut, option = found.cut, found.option
    costs = cut.costs
    stages = tuple(
        StagePlan(
            rank=rank,
            first_cell=begin,
            last_cell=end - 1,
            cells=tuple(cell.name for cell in costs.graph.cells[begin:end]),
            forward_seconds=costs.forward_seconds(begin, end),
            backward_seconds=costs.backward_seconds(begin, end),
            weight_seconds=costs.weight_seconds(begin, end),
            parameter_bytes=costs.parameter_bytes(begin, end),
            sent_bytes=sent,
        )
        for rank, sent, (begin, end) in zip(cut.ranks, cut.sent_bytes, cut.bounds, strict=True)
    )
    whole = meter.whole(request.precision, request.channels_last)
    inputs = set(costs.graph.inputs)
    return Plan(
        network=network,
        input_shape=with_batch(meter.input_shape, request.batch),
        devices=request.devices,
        data=option.data,
        space=option.slabs.mesh,
        space_dims=option.slabs.dims,
        least_planes=option.slabs.least,
        device_type=meter.kind,
        micro_batches=costs.micro_batches,
        schedule=cut.schedule,
        recompute=costs.recompute,
        precision=request.precision,
        channels_last=request.channels_last,
        memory_limit_bytes=request.limit,
        stages=stages,
        per_device=tuple(
            DevicePlan(saved_bytes=device.saved_bytes, peak_bytes=device.peak_bytes) for device in cut.memory
        ),
        edges=tuple(
            EdgePlan(
                value=edge.value,
                maker=edge.maker,
                users=edge.users,
                size=costs.profile.value_bytes.get(edge.value, 0),
                gradient=edge.value not in inputs,
            )
            for edge in cut.edges
        ),
        links=meter.links,
        gathered=tuple(cell.name for cell in whole.cells if option.slabs.mesh and is_gathered(cell, option.slabs)),
        exchanged_bytes=sum(cell.exchanged_bytes for cell in costs.profile.cells) * costs.micro_batches,
        reduce_seconds=found.reduce_seconds,
        step_seconds=found.seconds,
        bubble=cut.line.bubble,
        uncertainty=costs.profile.uncertainty,
    )


def _row(found: Found, plan: Plan, *, chosen: bool) -> tuple[str, str, str, str]:
    if found.cut is None:
        return str(found.option), "–", "–", found.why
    recompute = found.cut.costs.recompute
    name = str(found.option) + ("" if recompute == "never" else ", with recomputation")
    seconds, memory = f"{found.seconds:.3g}", format_bytes(found.cut.peak_bytes)
    if chosen:
        return name, seconds, memory, "chosen"
    reasons = [f"{found.seconds / plan.step_seconds - 1:.0%} slower"]
    if found.cut.line.bubble > 0.05:
        reasons.append(f"devices idle {found.cut.line.bubble:.0%}")
    if found.reduce_seconds > 0.02 * found.seconds:
        reasons.append(f"gradients take {found.reduce_seconds:.2g} s")
    return name, seconds, memory, ", ".join(reasons)
