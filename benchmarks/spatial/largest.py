"""The paper's largest head-and-neck volume, 352×256×288: one training step of U-Net-32 on two workers, in bf16.

Plain PyTorch needs more memory than most machines have for that: it is measured on parts of the volume, and what the
whole would take is what so many voxels more take.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lamp3d
from benchmarks.harness import WORKERS, alone
from lamp3d.errors import ConfigError
from lamp3d.graph.allocator import keep_freed_memory, peak_resident_bytes
from lamp3d.graph.inputs import input_text
from lamp3d.plan import Plan, format_bytes, make_plan
from lamp3d.plan.hardware import has_fast_bf16
from lamp3d.train import HybridLoss, LossConfig

SIDES = (352, 256, 288)
PARTS = ((176, 64, 144), (176, 128, 144), (176, 256, 144))
"""Of the volume: a sixteenth, an eighth, a quarter."""

FILTERS, ORGANS = 32, 9
MEMORY = 8_000_000_000
"""Bytes of each device that the plan may count on; a process needs some more."""

KEPT = 6_500_000_000
"""Bytes beyond which a process gives back at once what it frees; at its peak it uses more."""


def measure(rounds: int, console: Console) -> dict[str, Any]:
    """Seconds and resident bytes of the step, and what plain PyTorch takes of memory for parts of the volume."""
    if not has_fast_bf16("cpu"):
        raise ConfigError("this CPU does not compute in bf16: the step would take hours. Leave out the part 'largest'.")
    plan = plan_of(SIDES)
    by_rank = lamp3d.launch(_step, WORKERS, (plan,))
    plain = {input_text(sides): alone(_plain_step, sides) for sides in PARTS}
    (_, base), (_, most) = list(plain.values())[-2:]
    small, large = map(math.prod, PARTS[-2:])
    predicted = base + (most - base) / (large - small) * (math.prod(SIDES) - small)
    seconds = max(took for took, _, _ in by_rank)
    resident = [peak for _, peak, _ in by_rank]
    table = Table(title=f"U-Net-{FILTERS}, batch 1, bf16, a training step with the hybrid loss")
    for column in ("", "volume", "seconds", "peak resident"):
        table.add_column(column, justify="left" if not column else "right")
    whole = input_text(SIDES)
    together = " + ".join(format_bytes(peak) for peak in resident)
    table.add_row(f"lamp3d, {WORKERS} slabs", whole, f"{seconds:.1f}", f"{together} = {format_bytes(sum(resident))}")
    for name, (took, peak) in plain.items():
        table.add_row("plain PyTorch, 2 threads", name, f"{took:.1f}", format_bytes(peak))
    table.add_row("plain PyTorch, predicted", whole, "", format_bytes(predicted))
    console.print(table)
    return {
        "seconds": seconds,
        "loss": by_rank[0][2],
        "resident_bytes": resident,
        "plain": {name: {"seconds": took, "resident_bytes": peak} for name, (took, peak) in plain.items()},
        "plain_predicted_bytes": predicted,
    }


def plan_of(sides: tuple[int, int, int]) -> Plan:
    """Two slabs, and the blocks to compute again that the planner finds for two devices of `MEMORY` each.

    The planner times what it plans for; here that would need the very memory in question. So the plan is made as for
    devices that are described, which need not be here: what a cell holds is the same on all.
    """
    with torch.device("meta"):
        network = _network()
    settings: dict[str, Any] = {"precision": "bf16", "memory": MEMORY, "hardware": "a100-40g"}
    plan = make_plan(network, (1, 1, *sides), WORKERS, space=WORKERS, **settings)
    return plan.model_copy(update={"device_type": "cpu", "memory_limit_bytes": KEPT})


def _network() -> lamp3d.UNet:
    torch.manual_seed(0)
    return lamp3d.UNet(1, ORGANS + 1, filters=FILTERS)


def _data(sides: tuple[int, ...]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn((1, 1, *sides), generator=generator)
    labels = torch.randint(0, ORGANS + 1, (1, 1, *sides), generator=generator, dtype=torch.uint8)
    return images, (labels, torch.ones(1, ORGANS + 1, dtype=torch.bool))


def _loss() -> HybridLoss:
    return HybridLoss(LossConfig(), [f"organ {i}" for i in range(ORGANS)])


def _step(plan: Plan) -> tuple[float, int, float]:
    torch.set_num_threads(1)
    engine = lamp3d.Engine(_network(), plan)
    images, targets = _data(plan.image_shape[2:])
    dist.barrier()
    begin = time.perf_counter()
    loss = engine.step(images, targets, _loss())
    return time.perf_counter() - begin, peak_resident_bytes(), float(loss)


def _plain_step(sides: tuple[int, int, int]) -> tuple[float, int]:
    torch.set_num_threads(WORKERS)
    keep_freed_memory()
    images, targets = _data(sides)
    model = _network().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    images = images.contiguous(memory_format=torch.channels_last_3d)
    loss_fn = _loss()
    begin = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    torch.autograd.backward(loss_fn(logits, targets))
    return time.perf_counter() - begin, peak_resident_bytes()
