"""Making a plan: profile the cells, cut the sequence optimally under the memory limit, predict the step."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from lamp3d.errors import PlanError
from lamp3d.graph import lay_out_weights, trace
from lamp3d.plan.costs import StageCosts, runs
from lamp3d.plan.hardware import device_type, has_fast_bf16, worker_threads
from lamp3d.plan.plan import Plan, Precision, Recompute, ScheduleName, StagePlan, format_bytes, parse_bytes
from lamp3d.plan.profile import profile_cells
from lamp3d.plan.schedule import SCHEDULES
from lamp3d.plan.simulate import simulate


def make_plan(
    network: nn.Module,
    input_shape: Sequence[int],
    devices: int = 1,
    *,
    micro_batches: int | None = None,
    schedule: ScheduleName = "gpipe",
    recompute: Recompute | None = None,
    precision: Precision | Literal["auto"] = "fp32",
    channels_last: bool | None = None,
    memory: str | int | None = None,
    pipe: int | None = None,
    space: int = 1,
    repeats: int = 3,
) -> Plan:
    """Profile ``network`` on this machine and find the fastest cut into ``devices`` stages that fits.

    Args:
        network: any traceable module that takes one (B, C, D, H, W) tensor; left as it is.
        input_shape: the mini-batch's shape.
        devices: K, the number of devices, one stage each.
        micro_batches: M; by default the batch size, which fills the pipeline best.
        schedule: the order of the micro-batches' forwards and backwards.
        recompute: ``"never"`` or ``"always"`` recompute a stage's activations in backward; by default only where the
            plan does not fit otherwise.
        precision: ``"fp32"``, ``"bf16"`` (autocast), or ``"auto"``: bf16 where the hardware is fast at it.
        channels_last: memory layout of volumes; by default both are profiled and the faster one is taken.
        memory: limit per device, such as ``"16GB"``.
        pipe: fixed by hand it must equal ``devices``.
        space: slabs that a volume is cut into; 1 is what this version plans.
        repeats: timed repetitions of each cell.

    Raises:
        PlanError: no cut fits; the message says how many devices or how much memory would do.
        ConfigError: the network cannot be traced or does not accept ``input_shape``.
    """
    if space != 1 or (pipe is not None and pipe != devices):
        raise PlanError(f"pipe × space must be devices × 1 here; pipe={pipe}, space={space}, devices={devices} is not.")
    if devices < 1:
        raise PlanError(f"a plan needs at least one device, not {devices}.")
    kind = device_type()
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(kind) else "fp32"
    batch = input_shape[0]
    if micro_batches is not None and micro_batches < 1:
        raise PlanError(f"a mini-batch is cut into at least one micro-batch; micro_batches={micro_batches} is not.")
    micro_batches = min(batch, micro_batches or batch)
    shape = (math.ceil(batch / micro_batches), *input_shape[1:])
    profiles = {}
    for layout in (False, True) if channels_last is None else (channels_last,):
        with _worker_conditions(network, devices, kind, layout) as twin:
            graph = trace(twin, shape)
            if devices > len(graph.cells):
                raise PlanError(f"the network has {len(graph.cells)} cells and cannot be cut into {devices} stages.")
            profiles[layout] = profile_cells(graph, shape, precision=precision, channels_last=layout, repeats=repeats)
    channels_last = min(profiles, key=lambda layout: profiles[layout].seconds)
    profile = profiles[channels_last]
    limit = None if memory is None else parse_bytes(memory)
    choices: list[Recompute] = [recompute] if recompute else ["never", "always"]
    for choice in choices:
        costs = StageCosts(graph, profile, micro_batches, choice)
        if starts := costs.best_cut(devices, limit):
            return _plan(network, input_shape, kind, schedule, precision, channels_last, limit, costs, starts)
    raise PlanError(_does_not_fit(costs, devices, limit or 0, shape[0]))


def _plan(
    network: nn.Module,
    input_shape: Sequence[int],
    kind: Literal["cpu", "cuda"],
    schedule: ScheduleName,
    precision: Precision,
    channels_last: bool,
    limit: int | None,
    costs: StageCosts,
    starts: list[int],
) -> Plan:
    cells = costs.graph.cells
    sent = [0] * len(starts)
    for edge in costs.graph.stage_edges(starts):
        if edge.value in costs.profile.value_bytes:
            size = costs.profile.value_bytes[edge.value] * costs.micro_batches
            sent[edge.maker] += size * len(edge.users)
            for user in edge.users:
                sent[user] += size if edge.value not in costs.graph.inputs else 0
    stages = tuple(
        StagePlan(
            rank=rank,
            first_cell=begin,
            last_cell=end - 1,
            cells=tuple(cell.name for cell in cells[begin:end]),
            forward_seconds=costs.forward_seconds(begin, end),
            backward_seconds=costs.backward_seconds(begin, end),
            parameter_bytes=costs.parameter_bytes(begin, end),
            peak_bytes=costs.peak_bytes(begin, end),
            sent_bytes=sent[rank],
        )
        for rank, (begin, end) in enumerate(runs(starts, len(cells)))
    )
    line = simulate(
        SCHEDULES[schedule](len(stages), costs.micro_batches),
        [stage.forward_seconds for stage in stages],
        [stage.backward_seconds for stage in stages],
    )
    return Plan(
        network=type(network).__name__,
        input_shape=tuple(input_shape),
        devices=len(stages),
        device_type=kind,
        micro_batches=costs.micro_batches,
        schedule=schedule,
        recompute=costs.recompute,
        precision=precision,
        channels_last=channels_last,
        memory_limit_bytes=limit,
        stages=stages,
        step_seconds=line.seconds,
        bubble=line.bubble,
    )


def _does_not_fit(costs: StageCosts, devices: int, limit: int, micro_batch: int) -> str:
    """What would fit instead; everything that the message names has been tried."""
    n = len(costs.profile.cells)
    ways = []
    if (memory := costs.least_memory(devices)) is not None:
        ways.append(f"{format_bytes(memory, up=True)} a device on {devices} device{'s' if devices > 1 else ''}")
    more = range(devices + 1, min(n, 64) + 1)
    if (count := next((k for k in more if costs.fits(k, limit)), None)) is not None:
        ways.append(f"{count} devices of {format_bytes(limit)}")
    if costs.recompute == "never" and replace(costs, recompute="always").fits(devices, limit):
        ways.append("recompute='always'")
    fewer = range(costs.micro_batches - 1, 0, -1)
    if (count := next((m for m in fewer if replace(costs, micro_batches=m).fits(devices, limit)), None)) is not None:
        ways.append(f"a batch of {count * micro_batch}")
    return (
        f"the network does not fit {devices} device(s) of {format_bytes(limit)} with recompute={costs.recompute!r}. "
        f"These would do: {'; '.join(ways)}. A smaller volume needs less as well."
    )


@contextmanager
def _worker_conditions(
    network: nn.Module, devices: int, kind: Literal["cpu", "cuda"], channels_last: bool
) -> Iterator[nn.Module]:
    """A copy of the network on the device, layout and number of threads that a worker will have."""
    twin = copy.deepcopy(network)
    lay_out_weights(twin, channels_last)
    twin.to(kind).train()
    threads = torch.get_num_threads()
    if kind == "cpu":
        torch.set_num_threads(worker_threads(devices))
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if kind == "cuda" else []):
            yield twin
    finally:
        torch.set_num_threads(threads)
