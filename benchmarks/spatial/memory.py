"""What a rank holds in a training step: one device against two and four that share the volume."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import lamp3d
from benchmarks.harness import loss_fn, network
from lamp3d.graph.allocator import peak_resident_bytes
from lamp3d.graph.footprint import LiveBytes
from lamp3d.plan import Plan, format_bytes, make_plan

SIDE = 128
MESHES = ((1,), (2,), (4,), (2, 2))


def measure(rounds: int, console: Console) -> dict[str, Any]:
    """Live and resident bytes at most in a step of U-Net-16 at 128³, fp32, batch 1, for each mesh of ranks."""
    shape = (1, 1, SIDE, SIDE, SIDE)
    found = {}
    table = Table(title=f"U-Net-16, batch 1, {SIDE}³, fp32: what a rank holds at most")
    for column in ("mesh", "activations", "× one rank's", "resident"):
        table.add_column(column, justify="right")
    for mesh in MESHES:
        name, ranks = "x".join(map(str, mesh)), math.prod(mesh)
        plan = make_plan(network(), shape, ranks, space=mesh, recompute="never", channels_last=False, repeats=1)
        by_rank = lamp3d.launch(_peaks, ranks, (plan,))
        found[name] = {"live_bytes": [r[0] for r in by_rank], "resident_bytes": [r[1] for r in by_rank]}
        live, resident = (max(values) for values in zip(*by_rank, strict=True))
        share = live / max(found["1"]["live_bytes"])
        table.add_row(name, format_bytes(live), f"{share:.2f}", format_bytes(resident))
    console.print(table)
    return found


def _peaks(plan: Plan) -> tuple[int, int]:
    torch.set_num_threads(1)
    engine = lamp3d.Engine(network(), plan)
    images = torch.randn(plan.image_shape)
    engine.step(images, None, loss_fn)  # the parameters' gradients are made by the first step
    resident = peak_resident_bytes()
    with LiveBytes() as live:
        engine.step(images, None, loss_fn)
    return live.highest, resident
