"""How scans are shared out among devices for prediction: several at once, or one cut into slabs, or both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lamp3d.graph import CellGraph, Stage, arithmetic, trace
from lamp3d.graph.footprint import LiveBytes
from lamp3d.graph.inputs import Shape, divisor_of
from lamp3d.graph.shapes import fake_tensors
from lamp3d.plan.amounts import format_bytes
from lamp3d.plan.slabs import Slabs, longest_axes, slab_shape
from lamp3d.plan.walk import Values, inputs_of, walk
from lamp3d.plan.work import stand_ins
from lamp3d.space.trial import refusal

EFFICIENCY = 0.8
"""Of devices that share one scan, against as many that have one each: 0.64 to 0.97 on two (benchmarks/spatial)."""

MIRRORED = 3
"""Outputs in fp32 beside a mirror image's: the mean so far, and that output with its sides exchanged, and turned."""


@dataclass(frozen=True)
class Sharing:
    """One way to predict a series of scans.

    Attributes:
        at_once: scans that are under way at a time.
        slabs: how each of them is cut, every slab on a device of its own.
        peak_bytes: of a device, for the largest scan: weights, what the network holds at its fullest, the output.
        voxels: of that scan.
        limit: what a device has; None: not limited.
        turns: for the whole series, in times of one scan on one device.
    """

    at_once: int
    slabs: Slabs
    peak_bytes: int
    voxels: int
    limit: int | None
    turns: float

    @property
    def fits(self) -> bool:
        """Whether the largest scan does."""
        return self.limit is None or self.peak_bytes <= self.limit

    @property
    def most_voxels(self) -> int | None:
        """Of a scan that fits, as far as memory grows with the volume; None: not limited."""
        return None if self.limit is None else int(self.voxels * self.limit / self.peak_bytes)

    def __str__(self) -> str:
        scans = "one scan at a time" if self.at_once == 1 else f"{self.at_once} scans at a time"
        cut = f", each in {self.slabs.count} slabs" if self.slabs.mesh else ""
        of = "" if self.limit is None else f" of {format_bytes(self.limit)}"
        return f"{scans}{cut}; the largest needs up to {format_bytes(self.peak_bytes)}{of} a device"


def share_out(
    network: nn.Module,
    volume: Shape,
    scans: int,
    devices: int,
    *,
    precision: str,
    channels_last: bool,
    limit: int | None,
    mirrored: bool = False,
) -> list[Sharing]:
    """All ways to predict whole volumes, the best one first.

    Nothing is timed, for a short series would be done meanwhile: devices that share a scan are supposed to do
    `EFFICIENCY` of what they do with one each. Ways that fit come before those that do not; these go by their memory.

    Args:
        network: any traceable module.
        volume: (1, C, D, H, W) of the largest scan, as the network sees it.
        scans: how many there are.
        devices: that are there.
        precision: ``"fp32"`` or ``"bf16"``.
        channels_last: memory layout of volumes.
        limit: bytes that a device has; None: any number.
        mirrored: whether outputs are averaged over the scan's mirror images.

    Raises:
        ConfigError: the network cannot be traced, or does not accept such a volume.
    """
    ways, graph = [], trace(network, volume)
    halves = longest_axes(volume, (2,))
    whole = devices > 1 and refusal(graph, volume, halves.mesh, halves.dims) is not None
    for at_once in numbers_at_once(scans, devices):
        sharers = 1 if whole else devices // at_once  # of what slabs refuse, stages lie on several devices
        slabs = longest_axes(volume, (sharers,) if sharers > 1 else ())
        ways.append(
            Sharing(
                at_once=at_once,
                slabs=slabs,
                peak_bytes=forward_bytes(
                    network,
                    volume,
                    slabs,
                    precision=precision,
                    channels_last=channels_last,
                    mirrored=mirrored,
                    graph=graph,
                ),
                voxels=math.prod(volume[2:]),
                limit=limit,
                turns=math.ceil(scans / at_once) / (1 if sharers == 1 else EFFICIENCY * sharers),
            )
        )
    return sorted(ways, key=lambda way: (not way.fits, way.turns if way.fits else way.peak_bytes, -way.at_once))


def numbers_at_once(scans: int, devices: int) -> list[int]:
    """How many scans may be under way at a time, each on as many devices."""
    return [n for n in range(1, min(scans, devices) + 1) if devices % n == 0]


def forward_bytes(
    network: nn.Module,
    volume: Shape,
    slabs: Slabs,
    *,
    precision: str,
    channels_last: bool,
    mirrored: bool = False,
    graph: CellGraph | None = None,
) -> int:
    """What a rank holds at the fullest moment of a forward without gradients, with its weights and the whole output.

    With mirror images, the mean over those before waits, and an output is turned back and brought to fp32 beside it.

    Found on fake tensors, for a volume near to a slab's size, and brought to that of the thickest slab.
    """
    near = slab_shape(volume, slabs, divisor_of(network))
    assert not isinstance(near, dict)
    graph = trace(network, near) if graph is None or graph.reads_shape else graph
    cpu = torch.device("cpu")
    outputs: dict[str, Tensor] = {}

    def run(stage: Stage, inputs: Values) -> tuple[None, Values]:
        own = stand_ins(stage, cpu, channels_last)
        with live:
            made = dict(zip(stage.outputs, functional_call(stage, own, tuple(inputs.values())), strict=True))
        outputs.update((name, value) for name, value in made.items() if name in graph.outputs)
        return None, made

    live = LiveBytes()
    with fake_tensors(), torch.no_grad(), arithmetic(cpu, precision):
        values = inputs_of(graph, near, torch.empty, cpu, channels_last=channels_last)
        given = sum(value.nbytes for value in values.values())
        for _ in walk(graph, values, run):
            pass
        output = sum(value.nbytes for value in outputs.values())
        mean = 4 * sum(value.numel() for value in outputs.values()) if mirrored else 0
    part = _thickest(volume, slabs) / math.prod(near[2:])
    whole = math.prod(volume[2:]) / math.prod(near[2:]) if slabs.mesh else 0.0  # the slabs' outputs are put together
    weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    means = mean * math.prod(volume[2:]) / math.prod(near[2:])
    images = part * given * (2 if mirrored else 1)
    return round(weights + images + max(part * live.highest + means, (part + whole) * output + MIRRORED * means))


def _thickest(volume: Shape, slabs: Slabs) -> int:
    """Voxels of the largest slab."""
    sides: Sequence[int] = volume
    sizes = dict(zip(slabs.dims, slabs.mesh, strict=True))
    return math.prod(-(-side // sizes.get(dim, 1)) for dim, side in enumerate(sides) if dim >= 2)
