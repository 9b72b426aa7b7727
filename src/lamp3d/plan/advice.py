"""What to do where nothing fits: the smallest changes that would do, each of them tried."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from lamp3d.graph.inputs import input_text
from lamp3d.plan.amounts import counted, format_bytes
from lamp3d.plan.hardware import load_hardware
from lamp3d.plan.meter import Meter, ModelMeter
from lamp3d.plan.options import Request
from lamp3d.plan.search import Search

SPARE = 1.1
"""What would fit is named with so much to spare: the next profile has other seconds, and what is on its way between two
devices depends on them."""

VOLUMES_TRIED = 15
"""That may be named, the largest first; which of them is the largest that fits takes four trials to find out."""

MORE_DEVICES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def does_not_fit(meter: Meter, request: Request, *, advise: bool) -> str:
    """The message: what was asked for, and what would do.

    Only bytes matter here, so that nothing is timed: seconds are those of some device that is described, of this kind.
    """
    limit = request.limit or 0
    hardware = load_hardware("a100-80g").model_copy(update={"device_type": meter.kind})
    loss = meter.loss_cost(request.precision, request.channels_last)
    model = ModelMeter(meter.network, meter.input_shape, meter.micro_batch, hardware, meter.links, meter.graph, loss)
    model.refusal, model.work = meter.refusal, meter.work  # the same cells, of which that is known
    ways = list(_ways(model, replace(request, limit=round(limit / SPARE)))) if advise else []
    settings = "".join(
        f", {name} {_shown(getattr(request, name))}"
        for name in ("schedule", "recompute", "data", "space", "pipe")
        if getattr(request, name) not in (None, ())
    )
    would = f"These would do: {'; '.join(ways)}." if ways else "Take a smaller volume or network."
    return (
        f"the network does not fit {counted(request.devices, 'device')} of {format_bytes(limit)} with "
        f"{input_text(meter.input_shape)} in {request.precision}{settings}. {would}"
    )


def _shown(setting: object) -> str:
    """As commands take it: slabs like 2x2; blocks of cells are too long for a message."""
    if not isinstance(setting, tuple):
        return str(setting)
    slabs = all(isinstance(size, int) for size in setting)
    return "x".join(map(str, setting)) if slabs else counted(len(setting), "block")


def _ways(meter: Meter, request: Request) -> Iterator[str]:
    count = request.devices
    if (memory := Search(meter, request).least_memory()) is not None:
        yield f"{format_bytes(memory * SPARE, up=True)} a device on {counted(count, 'device')}"
    free = replace(request, pipe=None) if request.pipe is not None else request
    for more in MORE_DEVICES:
        if more > count and Search(meter, replace(free, devices=more)).fits():
            yield f"{more} devices of {format_bytes(round((request.limit or 0) * SPARE))}"
            break
    if request.recompute is not None and Search(meter, replace(request, recompute=None)).fits():
        yield "recompute left to the planner"
    if request.precision == "fp32" and Search(meter, replace(request, precision="bf16")).fits():
        yield "precision bf16"
    batch = request.volume[0]
    for cases in range(batch - 1, 0, -1):
        smaller = replace(request, volume=(cases, *request.volume[1:]), micro_batches=None)
        if Search(meter, smaller).fits():
            yield f"a batch of {cases}"
            break
    if memory is not None and (shape := _smaller_volume(meter, request, memory)) is not None:
        yield f"volumes of {input_text(shape[2:])}"


def _smaller_volume(meter: Meter, request: Request, memory: int) -> tuple[int, ...] | None:
    """The largest volume that fits, of those with the longest axes shortened, a step of the network's at a time.

    Bytes grow with voxels, so the first one in question has the part of them that the limit is of the memory needed.
    """
    if isinstance(meter.input_shape, dict) or len(request.volume) != 5:
        return None
    assert isinstance(meter, ModelMeter)
    voxels = math.prod(request.volume) * (request.limit or 0) / memory
    few_enough = (shape for shape in _shortened(request.volume, meter.divisor) if math.prod(shape) <= voxels)
    shapes = list(itertools.islice(few_enough, VOLUMES_TRIED))
    index = bisect.bisect_left(shapes, True, key=lambda shape: _volume_fits(meter, request, shape))
    return shapes[index] if index < len(shapes) else None


def _shortened(shape: tuple[int, ...], divisor: int) -> Iterator[tuple[int, ...]]:
    """Ever smaller volumes."""
    sides = list(shape)
    while True:
        longest = max(range(2, 5), key=lambda dim: sides[dim])
        sides[longest] = (sides[longest] - 1) // divisor * divisor
        if sides[longest] < 2 * divisor:
            return
        yield tuple(sides)


def _volume_fits(meter: ModelMeter, request: Request, shape: tuple[int, ...]) -> bool:
    if not meter.takes(shape):
        return False
    part = math.prod(shape) / math.prod(request.volume)
    loss = None if meter.loss is None else meter.loss.share(part)
    smaller = ModelMeter(meter.network, shape, meter.micro_batch, meter.hardware, meter.links, meter.graph, loss)
    smaller.refusal = (
        meter.refusal
    )  # whether it takes slabs does not depend on their size, and takes seconds to find out
    return Search(smaller, replace(request, volume=shape)).fits()
