"""The paper's set-ups on devices that are described: what fits, how, and how fast; and strong scaling on paper."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from benchmarks.planner.predictions import network
from lamp3d.errors import PlanError
from lamp3d.graph import CellGraph
from lamp3d.graph.inputs import input_text
from lamp3d.plan import format_bytes
from lamp3d.plan.choice import search_precisions
from lamp3d.plan.hardware import load_hardware
from lamp3d.plan.links import Links, load_link
from lamp3d.plan.meter import ModelMeter
from lamp3d.plan.options import Request

NETWORKS = tuple((kind, filters) for kind in ("UNet", "SEUNet") for filters in (32, 64, 128))
VOLUMES = ((64, 64, 64), (128, 128, 128), (192, 192, 192), (256, 256, 256), (352, 256, 288), (512, 512, 704))
DEVICES = (1, 2, 4, 8)
HARDWARE = ("v100-16g", "v100-32g", "a100-80g", "h100-80g")
PAPER: dict[str, Any] = {"data": 1, "space": (), "schedule": "gpipe", "recompute": "always"}
"""GPipe as in the paper: stages one after the other, activations computed again."""

NVLINK, NETWORK = load_link("nvlink4"), load_link("network400")
JOINED = {
    "nvlink4": Links(within=NVLINK),
    "8 a machine": Links(
        within=NVLINK,
        across=NETWORK.model_copy(update={"gbs": 8 * NETWORK.gbs, "title": "8 × 400 Gb/s"}),
        per_machine=8,
    ),
    "network400": Links(within=NETWORK),
}
"""One domain of all devices; machines of eight, each of which has a network card of its own; a network alone."""

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def measure(rounds: int, console: Console) -> dict[str, Any]:
    """A table for every network: the plan for each volume, number of devices and device, beside the paper's GPipe."""
    found: dict[str, Any] = {}
    for kind, filters in NETWORKS:
        with torch.device("meta"):
            net = network(kind, filters)
        table = Table(title=f"{kind}-{filters}, batch 1: seconds a step and memory a device; (GPipe as in the paper)")
        for column in ("volume", "devices", *HARDWARE):
            table.add_column(column)
        meter = None
        for sides in track(VOLUMES, description=f"{kind}-{filters}", console=console):
            meter = _meter(net, sides, None if meter is None else meter.graph)
            for devices in DEVICES:
                row = []
                for hardware in HARDWARE:
                    ours = _plan(meter, sides, devices, hardware)
                    theirs = _plan(meter, sides, devices, hardware, **PAPER)
                    name = f"{kind}-{filters}, {input_text(sides)}, {devices} × {hardware}"
                    found[name] = {"plan": ours, "gpipe": theirs}
                    row.append(f"{_text(ours)} ({_text(theirs, short=True)})")
                table.add_row(input_text(sides), str(devices), *row)
        console.print(table)
    return found


def _meter(net: nn.Module, sides: tuple[int, ...], graph: CellGraph | None = None) -> ModelMeter:
    hardware = load_hardware(HARDWARE[0])
    return ModelMeter(net, (1, 1, *sides), 1, hardware, Links(within=load_link(hardware.link)), graph)


def _plan(
    meter: ModelMeter, sides: tuple[int, ...], devices: int, name: str, links: Links | None = None, **fixed: Any
) -> dict[str, Any] | None:
    """The plan in short; None where nothing fits."""
    hardware = load_hardware(name)
    here = meter.on(hardware, links or Links(within=load_link(hardware.link)))
    ways = here.ways(here.precisions)
    request = Request((1, 1, *sides), devices, here.memory, *ways[0], **fixed)
    try:
        found = search_precisions(here, request, ways, advise=False, kept=1)
    except PlanError:
        return None
    plan = found.plan
    recompute = plan.recompute if isinstance(plan.recompute, str) else f"{len(plan.recompute)} blocks"
    return {
        "seconds": plan.step_seconds,
        "bytes": max(device.peak_bytes for device in plan.per_device),
        "mesh": str(found.answer.found[0].option),
        "recompute": recompute,
        "precision": plan.precision,
    }


def _text(plan: dict[str, Any] | None, *, short: bool = False) -> str:
    if plan is None:
        return "–" if short else "no"
    text = f"{plan['seconds']:.2g} s"
    if short:
        return text
    return f"{text} {format_bytes(plan['bytes'])}{'' if plan['recompute'] == 'never' else ' R'}"


def measure_scaling(rounds: int, console: Console) -> dict[str, Any]:
    """Strong scaling of one step of U-Net-128 on 512×512×704, H100s joined by NVLink, a 400 Gb/s network, and both."""
    with torch.device("meta"):
        net = network("UNet", 128)
    sides = (512, 512, 704)
    meter = _meter(net, sides)
    found: dict[str, Any] = {}
    table = Table(title="U-Net-128, 512×512×704, batch 1, bf16, H100: seconds a step (× of the fewest that it fits)")
    table.add_column("devices", justify="right")
    for how in JOINED:
        table.add_column(how)
    first: dict[str, tuple[int, float]] = {}
    for devices in track(RANKS, description="devices", console=console):
        row = []
        for how, links in JOINED.items():
            plan = _plan(meter, sides, devices, "h100-80g", links)
            found[f"{devices}, {how}"] = plan
            if plan is None:
                row.append("does not fit")
                continue
            ranks, seconds = first.setdefault(how, (devices, plan["seconds"]))
            gain = seconds / plan["seconds"]
            efficiency = gain * ranks / devices
            plan["efficiency"] = efficiency
            row.append(f"{plan['seconds']:.3g} s, {gain:.1f} ×, efficiency {efficiency:.2f}: {plan['mesh']}")
        table.add_row(str(devices), *row)
    console.print(table)
    return found
