"""Making a plan: profile the cells, cut the sequence optimally under the memory limit, predict the step."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from lamp3d.errors import PlanError
from lamp3d.graph import CellGraph, lay_out_weights, trace
from lamp3d.graph.inputs import InputShape, Shape, batch_of, with_batch
from lamp3d.plan.costs import StageCosts
from lamp3d.plan.cut import Cut, best_cut, fitting_cut, least_memory
from lamp3d.plan.hardware import device_type, has_fast_bf16, link_bytes_per_second, worker_threads
from lamp3d.plan.plan import (
    DevicePlan,
    Plan,
    Precision,
    Recompute,
    StagePlan,
    check_schedule,
    format_bytes,
    parse_bytes,
)
from lamp3d.plan.profile import profile_cells
from lamp3d.plan.schedule import PLACEMENTS, splits_backward

SPARE = 1.1
"""Where a plan does not fit, what would is named with so much to spare: the next profile has other seconds, and what is
on its way between two devices depends on them."""


def make_plan(
    network: nn.Module,
    input_shape: InputShape,
    devices: int = 1,
    *,
    micro_batches: int | None = None,
    schedule: str = "gpipe",
    recompute: Recompute | None = None,
    precision: Precision | Literal["auto"] = "fp32",
    channels_last: bool | None = None,
    memory: str | int | None = None,
    data: int = 1,
    pipe: int | None = None,
    space: int | Sequence[int] = 1,
    least_planes: int = 1,
    link: str | int | None = None,
    repeats: int = 3,
) -> Plan:
    """Profile ``network`` on this machine and find the fastest cut into ``devices`` stages that fits.

    Args:
        network: any traceable module; left as it is.
        input_shape: the mini-batch's shape, (B, C, D, H, W); for a network with several inputs the shape of each by the
            name of ``forward``'s parameter (parameters that are not named keep their defaults).
        devices: how many there are.
        micro_batches: M, of a replica's share; by default one a case, which fills the pipeline best.
        schedule: the order of the micro-batches' forwards and backwards, and with it where stages lie: "gpipe" (any
            loss function), "1f1b" (least memory), "interleaved", "folded" (fewest bytes sent), "zero_bubble_v"
            (fastest); all but the first want a loss that is a mean over cases.
        recompute: ``"never"`` or ``"always"`` recompute a stage's activations in backward, or the names of the cells
            to do so; by default only where the plan does not fit otherwise.
        precision: ``"fp32"``, ``"bf16"`` (autocast), or ``"auto"``: bf16 where the hardware is fast at it.
        channels_last: memory layout of volumes; by default both are profiled and the faster one is taken.
        memory: limit per device, such as ``"16GB"``.
        data: replicas of the pipeline, each with an equal share of the mini-batch; their gradients are averaged.
        pipe: K, the devices of one pipeline; by default ``devices / (data × space)``.
        space: slabs that a volume is cut into along its longest axis; or two numbers, such as (2, 2), along its two
            longest axes. The slabs' seconds and bytes are predicted without their halos.
        least_planes: a level of the network whose slabs have fewer planes is gathered and computed by every rank.
        link: bytes that pass between two devices in a second, such as ``"10GB"``; by default a guess for this machine.
        repeats: timed repetitions of each cell.

    Raises:
        PlanError: no cut fits; the message says how many devices or how much memory would do.
        ConfigError: the network cannot be traced or does not accept ``input_shape``.
    """
    if devices < 1:
        raise PlanError(f"a plan needs at least one device, not {devices}.")
    mesh = [size for size in ([space] if isinstance(space, int) else space) if size != 1]
    copies = data * math.prod(mesh)
    if data < 1 or copies < 1 or copies * (devices // copies if pipe is None else pipe) != devices:
        raise PlanError(
            f"data × space × pipe must be devices; data={data}, space={space}, pipe={pipe}, devices={devices} is not."
        )
    space_dims = _longest_axes(input_shape, mesh)
    if (mini_batch := batch_of(input_shape)) % data:
        raise PlanError(
            f"a mini-batch of {mini_batch} cannot be shared evenly among {data} replicas; take a multiple of {data}."
        )
    devices //= copies
    check_schedule(schedule)
    kind = device_type()
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(kind) else "fp32"
    batch = mini_batch // data
    if micro_batches is not None and micro_batches < 1:
        raise PlanError(f"a mini-batch is cut into at least one micro-batch; micro_batches={micro_batches} is not.")
    micro_batches = min(batch, micro_batches or batch)
    micro_batch = math.ceil(batch / micro_batches)
    shape, share = _slab(with_batch(input_shape, micro_batch), mesh, space_dims, getattr(network, "divisor", 32))
    profiles = {}
    for layout in (False, True) if channels_last is None else (channels_last,):
        with _worker_conditions(network, devices * copies, kind, layout) as twin:
            graph = trace(twin, shape)
            if (stages := len(PLACEMENTS[schedule](devices))) > len(graph.cells):
                raise PlanError(f"the network has {len(graph.cells)} cells and cannot be cut into {stages} stages.")
            profiles[layout] = profile_cells(
                graph,
                shape,
                precision=precision,
                channels_last=layout,
                repeats=repeats,
                split=splits_backward(schedule),
            ).scaled(share)
    channels_last = min(profiles, key=lambda layout: profiles[layout].seconds)
    profile = profiles[channels_last]
    limit = None if memory is None else parse_bytes(memory)
    speed = link_bytes_per_second(kind) if link is None else float(parse_bytes(link))
    choices: list[Recompute] = ["never", "always"] if recompute is None else [recompute]
    for choice in choices:
        _check_cells(graph, choice)
        costs = StageCosts(graph, profile, micro_batches, choice)
        if cut := best_cut(costs, schedule, devices, limit, speed):
            settings = {
                "network": type(network).__name__,
                "input_shape": with_batch(input_shape, mini_batch),
                "device_type": kind,
                "precision": precision,
                "channels_last": channels_last,
                "memory_limit_bytes": limit,
                "devices": devices * copies,
                "data": data,
                "space": tuple(mesh),
                "space_dims": space_dims,
                "least_planes": least_planes,
            }
            return _plan(cut, settings)
    raise PlanError(_does_not_fit(costs, schedule, devices, limit or 0, micro_batch))


def _longest_axes(input_shape: InputShape, mesh: Sequence[int]) -> tuple[int, ...]:
    """The axes to cut, for the fewest bytes of halos: the longest ones, the most slabs along the longest."""
    if not mesh:
        return ()
    volume = next(iter(input_shape.values())) if isinstance(input_shape, Mapping) else input_shape
    if len(mesh) > 2 or len(volume) != 5:
        raise PlanError(f"a (B, C, D, H, W) volume is cut along one axis or two; space={tuple(mesh)} is not that.")
    longest = sorted((2, 3, 4), key=lambda dim: -volume[dim])[: len(mesh)]
    order = sorted(range(len(mesh)), key=lambda axis: -mesh[axis])
    dims = dict(zip(order, longest, strict=True))
    for axis, size in enumerate(mesh):
        if volume[dims[axis]] < size:
            raise PlanError(f"{volume[dims[axis]]} planes cannot be cut into {size} slabs; take fewer.")
    return tuple(dims[axis] for axis in range(len(mesh)))


def _slab(
    shape: Shape | dict[str, Shape], mesh: Sequence[int], dims: Sequence[int], divisor: int
) -> tuple[Shape | dict[str, Shape], float]:
    """A shape that the network takes, near to that of a slab, and a slab's part of its voxels."""
    volumes = shape if isinstance(shape, dict) else {"": shape}
    extents = next(iter(volumes.values()))
    sides, share = list(extents), 1.0
    for size, dim in zip(mesh, dims, strict=True):
        # At least two of the coarsest voxels, for norms cannot do with one.
        sides[dim] = min(extents[dim], max(2, math.ceil(extents[dim] / size / divisor)) * divisor)
        share *= extents[dim] / size / sides[dim]

    def cut(of: Shape) -> Shape:
        return (*of[:2], *sides[2:]) if of[2:] == extents[2:] else of

    slabs = {name: cut(of) for name, of in volumes.items()}
    return slabs if isinstance(shape, dict) else slabs[""], share


def _check_cells(graph: CellGraph, recompute: Recompute) -> None:
    if not isinstance(recompute, str) and (unknown := set(recompute) - {cell.name for cell in graph.cells}):
        known = ", ".join(cell.name for cell in graph.cells[:8])
        raise PlanError(
            f"recompute names cells that the network has not: {', '.join(sorted(unknown))}; it has {known}, …"
        )


def _plan(cut: Cut, settings: dict[str, Any]) -> Plan:
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
    return Plan(
        schedule=cut.schedule,
        micro_batches=costs.micro_batches,
        recompute=costs.recompute,
        stages=stages,
        per_device=tuple(
            DevicePlan(saved_bytes=device.saved_bytes, peak_bytes=device.peak_bytes) for device in cut.memory
        ),
        step_seconds=cut.line.seconds,
        bubble=cut.line.bubble,
        **settings,
    )


def _does_not_fit(costs: StageCosts, schedule: str, devices: int, limit: int, micro_batch: int) -> str:
    """What would fit instead; everything that the message names has been tried, and with something to spare."""

    def fits(costs: StageCosts, devices: int) -> bool:
        return fitting_cut(costs, schedule, devices, round(limit / SPARE)) is not None

    ways = []
    if (memory := least_memory(costs, schedule, devices)) is not None:
        ways.append(f"{format_bytes(memory * SPARE, up=True)} a device on {devices} device{'s' if devices > 1 else ''}")
    more = range(devices + 1, min(len(costs.profile.cells), 64) + 1)
    if (count := next((k for k in more if fits(costs, k)), None)) is not None:
        ways.append(f"{count} devices of {format_bytes(limit)}")
    if costs.recompute == "never" and fits(replace(costs, recompute="always"), devices):
        ways.append("recompute='always'")
    fewer = range(costs.micro_batches - 1, 0, -1)
    if (count := next((m for m in fewer if fits(replace(costs, micro_batches=m), devices)), None)) is not None:
        ways.append(f"a batch of {count * micro_batch}")
    would = (
        f"These would do: {'; '.join(ways)}. A smaller volume needs less as well." if ways else "Take a smaller one."
    )
    return (
        f"the network does not fit {devices} device(s) of {format_bytes(limit)} with schedule={schedule!r} and "
        f"recompute={costs.recompute!r}. {would}A smaller volume needs less as well."
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
