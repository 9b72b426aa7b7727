"""Making a plan: from what the user has and fixes to a request, and to the meter that knows what cells cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

from torch import nn

from lamp3d.errors import ConfigError, PlanError
from lamp3d.graph import trace
from lamp3d.graph.buffers import refuse_parts, wants_whole_batch
from lamp3d.graph.inputs import InputShape, batch_of, volume_of
from lamp3d.plan.amounts import counted, parse_bytes
from lamp3d.plan.choice import Planning, search_precisions
from lamp3d.plan.hardware import Hardware, load_hardware, local_workers
from lamp3d.plan.hardware import device_type as local_device_type
from lamp3d.plan.links import USUAL_NETWORK, Links, load_link, local_link
from lamp3d.plan.measure import MeasuringMeter
from lamp3d.plan.meter import Meter, ModelMeter
from lamp3d.plan.options import ADAMW_COPIES, Request, meshes
from lamp3d.plan.plan import PRECISIONS, Plan, Precision, Recompute, check_schedule
from lamp3d.plan.plan import recompute_setting as in_blocks
from lamp3d.plan.slabs import longest_axes
from lamp3d.plan.timing import TimedLoss


def make_plan(network: nn.Module, input_shape: InputShape, devices: int = 1, **settings: Any) -> Plan:
    """The fastest plan that fits; the arguments are those of :func:`find_plans`.

    Raises:
        PlanError: none fits; the message says what would do.
        ConfigError: the network cannot be traced or does not accept ``input_shape``.
    """
    return find_plans(network, input_shape, devices, **settings).plan


def find_plans(
    network: nn.Module,
    input_shape: InputShape,
    devices: int = 1,
    *,
    micro_batches: int | None = None,
    schedule: str | None = None,
    recompute: Recompute | Sequence[str] | None = None,
    precision: Precision | Literal["auto"] = "fp32",
    channels_last: bool | None = None,
    memory: str | int | None = None,
    data: int | None = None,
    pipe: int | None = None,
    space: int | Sequence[int] | None = None,
    least_planes: int | None = None,
    loss: TimedLoss | None = None,
    any_loss: bool = False,
    optimizer_copies: int = ADAMW_COPIES,
    hardware: str | Hardware | None = None,
    link: str | int | None = None,
    across: str | int | None = None,
    per_machine: int | None = None,
    repeats: int = 3,
    fresh: bool = False,
) -> Planning:
    """Find the fastest way to run a training step of ``network`` on ``devices``; what is not given is searched.

    Args:
        network: any traceable module; left as it is. With ``hardware``, its parameters may be on the meta device.
        input_shape: the mini-batch's shape, (B, C, D, H, W); for a network with several inputs the shape of each by the
            name of ``forward``'s parameter (parameters that are not named keep their defaults).
        devices: how many there are.
        micro_batches: M, of a replica's share.
        schedule: the order of the micro-batches' forwards and backwards, and with it where stages lie: "gpipe" (any
            loss function), "1f1b" (least memory), "interleaved", "folded" (fewest bytes sent), "zero_bubble_v"
            (fastest); all but the first want a loss that is a mean over cases.
        recompute: ``"never"`` or ``"always"`` recompute activations in backward, or the cells to do so, in blocks of
            names; by default as little as fits.
        precision: ``"fp32"``, ``"bf16"`` (autocast), or ``"auto"``: the faster one, or the one that fits, where the
            hardware is fast in bf16.
        channels_last: memory layout of volumes; by default the faster one.
        memory: limit per device, such as ``"16GB"``, or ``"unlimited"``; by default what the device has.
        data: replicas of the pipeline, each with an equal share of the mini-batch; their gradients are averaged, which
            wants a loss that is a mean over cases.
        pipe: K, the devices of one pipeline.
        space: slabs that a volume is cut into along its longest axis; or two numbers, such as (2, 2), along its two
            longest axes.
        least_planes: a level of the network whose slabs have fewer planes is gathered and computed by every rank; None:
            the levels for which this is faster.
        loss: from the network's output to a 0-dim tensor; it is timed, and counts in the last cell's backward. If it is
            declared to be a mean over cases, GPipe need not keep a mini-batch's outputs joined for it. None, or with
            ``hardware``: its seconds do not count.
        any_loss: only plans that are right for a loss that is no mean over cases.
        optimizer_copies: what the optimizer keeps of every parameter, and an average of the weights beside it, in units
            of the parameter: two for AdamW, one for RMSProp or momentum.
        hardware: the devices are not here: the name of a description, such as ``"a100-80g"``, or one's path. Seconds
            are then worked out from arithmetic and bytes, and nothing is allocated.
        link: between the devices (of a machine): a name, such as ``"nvlink3"``, or what it carries in a second,
            ``"10GB"``. If neither of the next two is given, between all devices that are described.
        across: what joins machines, all devices of one together, likewise; by default what the description says, and
            for devices that are here ``"network100"``.
        per_machine: devices of a machine; by default what the description says, and for devices that are here what
            torchrun has started on this one.
        repeats: timed passes through all cells.
        fresh: time the cells even if that was done before on this machine.

    Raises:
        PlanError: no plan fits; the message says what would do.
        ConfigError: the network cannot be traced or does not accept ``input_shape``, or there is no such hardware.
    """
    batch = batch_of(input_shape)
    counts = {
        "devices": devices, "repeats": repeats, "micro_batches": micro_batches, "data": data, "pipe": pipe,
        "space": space, "least_planes": least_planes, "per_machine": per_machine, "optimizer_copies": optimizer_copies,
    }  # fmt: skip
    _check_numbers(input_shape, counts)
    sizes = space if space is None or isinstance(space, Sequence) else [int(space)]
    mesh = None if sizes is None else tuple(size for size in sizes if size != 1)
    _check(devices, data, mesh, pipe, batch, micro_batches)
    if schedule is not None:
        check_schedule(schedule)
    if precision not in (*PRECISIONS, "auto"):
        raise ConfigError(f"precision is {', '.join(PRECISIONS)} or auto, not {precision!r}.")
    blocks = in_blocks(recompute)
    by_name = isinstance(blocks, tuple) and all(isinstance(name, str) for block in blocks for name in block)
    if blocks not in (None, "never", "always") and not by_name:
        raise ConfigError(f"recompute is never, always, or blocks of cells, not {recompute!r}.")
    graph = trace(network, input_shape)
    if wants_whole_batch(graph, network) is not None:
        if (data or 1) * (micro_batches or 1) > 1:
            refuse_parts(graph, network)
        data = micro_batches = 1
    described = hardware if hardware is None or isinstance(hardware, Hardware) else load_hardware(str(hardware))
    joined = _links(devices, described, link, across, per_machine)
    smallest = (
        1 if data is None or micro_batches is None else math.ceil(batch // data / min(micro_batches, batch // data))
    )
    meter: Meter
    if described is None:
        meter = MeasuringMeter(
            network, input_shape, smallest, joined, graph, workers=devices, loss=loss, repeats=repeats, fresh=fresh
        )
    else:
        meter = ModelMeter(network, input_shape, smallest, described, joined, graph)
    ways = meter.ways(meter.precisions if precision == "auto" else (precision,), channels_last)
    slower = [(p, not last) for p, last in ways if channels_last is None and (not last) in meter.layouts(p)]
    request = Request(
        volume=volume_of(input_shape),
        devices=devices,
        limit=meter.memory if memory is None else None if memory == "unlimited" else parse_bytes(memory),
        precision=ways[0][0],
        channels_last=ways[0][1],
        data=data,
        space=mesh,
        pipe=pipe,
        micro_batches=micro_batches,
        schedule=schedule,
        recompute=blocks,
        least_planes=least_planes,
        any_loss=any_loss,
        by_case=getattr(loss, "mean_over_cases", False),
        optimizer_copies=optimizer_copies,
    )
    if mesh:
        longest_axes(input_shape, mesh)  # or it says why they cannot be cut so
    if not list(meshes(request)):
        raise PlanError(f"{counted(devices, 'device')} cannot be arranged so: data {data}, space {space}, pipe {pipe}.")
    return search_precisions(meter, request, ways, slower)


def _links(
    devices: int, described: Hardware | None, link: str | int | None, across: str | int | None, per_machine: int | None
) -> Links:
    """What joins so many devices: what is given, else what is known of them."""
    if link is not None:
        within = load_link(str(link))
    else:
        within = local_link(local_device_type()) if described is None else load_link(described.link)
    if described is not None and link is not None and across is None and per_machine is None:
        return Links(within=within)
    if per_machine is None:
        per_machine = local_workers(devices) if described is None else described.per_machine
    if devices <= per_machine:
        if described is not None and across is not None:
            raise ConfigError(
                f"{across} across machines joins nothing, with {counted(devices, 'device')} on one machine of "
                f"{per_machine}. Say how many devices a machine has, or leave the link across machines out."
            )
        return Links(within=within)
    if across is None:
        across = USUAL_NETWORK if described is None else described.across
    return Links(within=within, across=load_link(str(across)), per_machine=per_machine)


def _check_numbers(input_shape: InputShape, counts: Mapping[str, Any]) -> None:
    for extents in input_shape.values() if isinstance(input_shape, Mapping) else (input_shape,):
        if not all(isinstance(extent, Integral) and extent >= 1 for extent in extents):
            raise ConfigError(f"an input's extents are whole numbers, each at least 1; {extents!r} is no such shape.")
    for name, count in counts.items():
        numbers = count if name == "space" and isinstance(count, list | tuple) else (count,)
        if count is not None and not all(isinstance(number, Integral) for number in numbers):
            raise ConfigError(f"{name} is a whole number{' or two' if name == 'space' else ''}, not {count!r}.")
    if counts["per_machine"] is not None and counts["per_machine"] < 1:
        raise ConfigError(f"a machine has at least one device; per_machine={counts['per_machine']} is not.")
    if counts["optimizer_copies"] < 0:
        raise ConfigError(f"an optimizer keeps nothing or more; optimizer_copies={counts['optimizer_copies']} is less.")
    if counts["repeats"] < 1:
        raise ConfigError(f"cells are timed in at least one pass; repeats={counts['repeats']} is not.")


def _check(
    devices: int,
    data: int | None,
    mesh: tuple[int, ...] | None,
    pipe: int | None,
    batch: int,
    micro_batches: int | None,
) -> None:
    if devices < 1:
        raise PlanError(f"a plan needs at least one device, not {devices}.")
    wanted = {"data": data, "space": None if mesh is None else math.prod(mesh), "pipe": pipe}
    given = {name: number for name, number in wanted.items() if number is not None}
    product = math.prod(given.values())
    if any(number < 1 for number in given.values()) or devices % product or (len(given) == 3 and product != devices):
        told = ", ".join(f"{name} {number}" for name, number in given.items())
        raise PlanError(f"data × space × pipe must be devices; {told} of {counted(devices, 'device')} is not.")
    if data is not None and batch % data:
        raise PlanError(
            f"a mini-batch of {batch} cannot be shared evenly among {data} replicas; take a multiple of {data}."
        )
    if micro_batches is not None and micro_batches < 1:
        raise PlanError(f"a mini-batch is cut into at least one micro-batch; {micro_batches} are not.")
