"""What ranks that share a volume send each other: measured, by the formula, and what it means for larger machines."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import lamp3d
from benchmarks.harness import FILTERS, loss_fn, network
from lamp3d.graph import trace
from lamp3d.graph.inputs import input_text
from lamp3d.plan import Plan, format_bytes, make_plan
from lamp3d.plan.timing import profile_cells

SIDE = 96
MESHES = ((2,), (4,), (2, 2))
LEVELS = 5
SLABS = (4, 8, 16)
VOLUMES = ((192, 192, 192), (352, 256, 288), (512, 512, 704))
REFERENCE = 64
"""Side of the volume whose cells are timed."""

SPEEDS = {"this machine's core": 1.0, "a device 1000 × as fast": 1000.0}
LINKS = {"NVLink": (300e9, 10e-6), "PCIe 4": (20e9, 15e-6), "100 Gb/s network": (11e9, 30e-6)}
"""Bytes a second in each direction, and seconds that a message takes beside."""


@dataclass(frozen=True)
class Conv:
    """A 3×3×3 convolution of the U-Net: at which level, and how many channels it reads."""

    level: int
    channels: int
    needs_gradient: bool = True

    @property
    def exchanges(self) -> int:
        """In a step: of the input's planes in forward, and of their gradients in backward."""
        return 2 if self.needs_gradient else 1


def convolutions(filters: int) -> dict[str, Conv]:
    """Those of the paper's U-Net, by the name of their cell."""
    widths = [filters * 2**level for level in range(LEVELS)]
    found = {}
    for level, width in enumerate(widths):
        below = widths[level - 1] if level else 1
        found[f"encoder{level + 1}.conv1"] = Conv(level, below, level > 0)
        found[f"encoder{level + 1}.conv2"] = Conv(level, width)
        if level < LEVELS - 1:
            found[f"decoder{level + 1}.conv1"] = Conv(level, 2 * width)
            found[f"decoder{level + 1}.conv2"] = Conv(level, width)
    return found


def halo_bytes(conv: Conv, voxels: int, axes: int = 2) -> int:
    """What one border sends one way: of the convolution's input, or of that one's gradient, in fp32.

    Args:
        conv: the convolution.
        voxels: of the border where the volume is at full resolution.
        axes: of the border, two of a face and one of an edge.
    """
    return conv.channels * (voxels >> (axes * conv.level)) * 4


def formula(filters: int, side: int, mesh: tuple[int, ...]) -> tuple[int, int, int]:
    """Bytes of halos, bytes of statistics, and messages that all ranks send in a step on a cube at batch 1, in fp32.

    A border has two sides: a face where slabs follow each other, and an edge where two axes are cut and they meet
    across. A norm sums three numbers of every rank for every channel in forward, two in backward; a ring of R ranks
    sends 2 (R - 1) / R times that from each.
    """
    every = convolutions(filters)
    ranks = math.prod(mesh)
    faces = [2 * (size - 1) for size in mesh]  # each as large as the cube's, in as many parts as the other axis is cut
    edges = math.prod(faces) if len(mesh) > 1 else 0
    halos = sum(
        (halo_bytes(conv, side**2) * sum(faces) + halo_bytes(conv, side, 1) * edges) * conv.exchanges
        for conv in every.values()
    )
    borders = sum(count * ranks // size for count, size in zip(faces, mesh, strict=True)) + edges
    messages = borders * sum(conv.exchanges for conv in every.values()) + 2 * ranks * len(every)
    widths = [filters * 2**conv.level for conv in every.values()]
    statistics = sum(2 * (ranks - 1) * (3 * ranks + 2) * width * 4 for width in widths)
    return halos, statistics, messages


def measure(rounds: int, console: Console) -> dict[str, Any]:
    """Bytes and messages of a step, measured and by the formula; simulated efficiency on more ranks."""
    shape = (1, 1, SIDE, SIDE, SIDE)
    found: dict[str, Any] = {"sent": {}}
    table = Table(title=f"U-Net-{FILTERS}, batch 1, {SIDE}³, fp32: sent in a step, by all ranks together")
    for column in ("mesh", "measured", "halos (formula)", "statistics (formula)", "messages", "messages (formula)"):
        table.add_column(column, justify="right")
    for mesh in MESHES:
        name = "x".join(map(str, mesh))
        ranks = math.prod(mesh)
        plan = make_plan(network(), shape, ranks, space=mesh, recompute="never", channels_last=False, repeats=1)
        by_rank = lamp3d.launch(_sent, ranks, (plan,))
        sent, messages = (sum(column) for column in zip(*by_rank, strict=True))
        halos, statistics, expected = formula(FILTERS, SIDE, mesh)
        found["sent"][name] = {
            "bytes": sent, "messages": messages, "halo_bytes_by_formula": halos,
            "statistics_bytes_by_formula": statistics, "messages_by_formula": expected,
        }  # fmt: skip
        table.add_row(
            name, format_bytes(sent), format_bytes(halos), format_bytes(statistics), str(messages), str(expected)
        )
    console.print(table)
    found["efficiency"] = _efficiencies(console)
    return found


def _sent(plan: Plan) -> tuple[int, int]:
    torch.set_num_threads(1)
    engine = lamp3d.Engine(network(), plan)
    images = torch.randn(plan.image_shape)
    assert engine.space is not None
    engine.step(images, None, loss_fn)
    before = engine.space.bytes_sent, engine.space.messages
    engine.step(images, None, loss_fn)
    return engine.space.bytes_sent - before[0], engine.space.messages - before[1]


def _efficiencies(console: Console) -> dict[str, dict[str, list[float]]]:
    """Of U-Net-16, fp32: one device's seconds over R times those of R ranks, by device, link, volume and R."""
    torch.set_num_threads(1)
    shape = (1, 1, REFERENCE, REFERENCE, REFERENCE)
    model = network()
    cells = profile_cells(trace(model, shape), shape, channels_last=False, precision="fp32", repeats=3).cells
    costs = {cell.name: (cell.forward_seconds, cell.backward_seconds) for cell in cells}
    found: dict[str, dict[str, list[float]]] = {}
    table = Table(title=f"U-Net-{FILTERS}, batch 1, fp32: simulated efficiency on {', '.join(map(str, SLABS))} ranks")
    for column in ("device", "link", *(input_text(sides) for sides in VOLUMES)):
        table.add_column(column, justify="left" if column in ("device", "link") else "right")
    for device, speed in SPEEDS.items():
        for link, (bandwidth, latency) in LINKS.items():
            row = {}
            for sides in VOLUMES:
                send = lambda size, b=bandwidth, a=latency: a + size / b  # noqa: E731
                row[input_text(sides)] = [efficiency(costs, sides, ranks, speed, send) for ranks in SLABS]
            found[f"{device}, {link}"] = row
            table.add_row(device, link, *("  ".join(f"{e:.2f}" for e in values) for values in row.values()))
    console.print(table)
    return found


def efficiency(
    costs: dict[str, tuple[float, float]],
    sides: tuple[int, int, int],
    ranks: int,
    speed: float,
    send: Callable[[float], float],
) -> float:
    """One device's seconds over ``ranks`` times those of ranks that share the volume along its longest axis.

    Halos travel while the slab's own convolution runs, and cost what they take beyond it; what the border adds costs
    as many planes' convolution. Statistics wait for the slowest: log2 R messages each way. A level with fewer planes
    than ranks is computed by all, and costs all of it.
    """
    voxels, longest = math.prod(sides), max(sides)
    scale = voxels / REFERENCE**3 / speed
    every = convolutions(FILTERS)
    alone = together = 0.0
    for name, (forward, backward) in costs.items():
        conv = every.get(name)
        level = conv.level if conv else _level(name)
        planes = longest >> level
        seconds = (forward + backward) * scale
        alone += seconds
        if planes < ranks:
            together += seconds
            continue
        thickest = -(-planes // ranks)
        own = seconds * thickest / planes
        together += own
        if conv:
            border = 2 * seconds / planes / 3  # two borders, a third of the kernel's planes each
            arrives = send(halo_bytes(conv, voxels // longest))
            behind = (forward, backward)[: conv.exchanges]
            together += border + sum(max(0.0, arrives - way * scale * thickest / planes) for way in behind)
        elif "norm" in name:
            together += 2 * math.ceil(math.log2(ranks)) * send(8 * FILTERS * 2**level)
    return alone / (ranks * together)


def _level(cell: str) -> int:
    """Of a cell that is no convolution, by its name."""
    found = [int(digit) for digit in cell.split(".")[0].split(" ")[0] if digit.isdigit()]
    if cell.startswith("cat"):  # cat, cat_1, …: from the coarsest level up
        return LEVELS - 2 - (found[0] if found else 0)
    return found[0] - 1 if found else 0
