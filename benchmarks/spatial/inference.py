"""One abdominal scan, 512×512×133: the whole volume on two workers beside MONAI's sliding windows, the same weights."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from monai.inferers import sliding_window_inference
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import lamp3d
from benchmarks.harness import WORKERS, alone, images, network
from lamp3d.graph.allocator import keep_freed_memory, peak_resident_bytes
from lamp3d.graph.inputs import input_text
from lamp3d.plan import Plan, format_bytes, make_plan
from lamp3d.space.sharded import whole

SIDES = (512, 512, 133)
WINDOWS = (64, 128)
OVERLAP = 0.5
WINDOWS_AT_ONCE = 4
DIVISOR = 16


def measure(rounds: int, console: Console) -> dict[str, Any]:
    """Seconds and resident bytes of each way to the same scan's logits, all in the precision that is fastest here."""
    shape = (1, 1, *(-(-side // DIVISOR) * DIVISOR for side in SIDES))
    small = make_plan(network(), (1, 1, 64, 64, 64), WORKERS, space=WORKERS, precision="auto", recompute="never")
    plan = small.model_copy(update={"input_shape": shape, "space_dims": (2,)})
    turns = max(1, rounds // 2)
    by_rank = lamp3d.launch(_by_slabs, WORKERS, (plan, turns))
    found: dict[str, dict[str, Any]] = {
        f"lamp3d, whole volume, {WORKERS} slabs": {
            "seconds": by_rank[0][0],
            "resident_bytes": [peak for _, peak in by_rank],
        }
    }
    for side in WINDOWS:
        seconds, peak = alone(_by_windows, side, plan.precision, plan.channels_last)
        found[f"MONAI, windows of {side}³, 2 threads"] = {"seconds": [seconds], "resident_bytes": [peak]}
    ours = statistics.median(by_rank[0][0])
    table = Table(title=f"U-Net-16, {plan.precision}, a scan of {input_text(SIDES)} (overlap {OVERLAP})")
    for column in ("", "seconds", "× slabs", "peak resident"):
        table.add_column(column, justify="left" if not column else "right")
    for name, of_way in found.items():
        median = statistics.median(of_way["seconds"])
        peaks = " + ".join(format_bytes(peak) for peak in of_way["resident_bytes"])
        table.add_row(name, f"{median:.1f}", f"{median / ours:.2f}", peaks)
    console.print(table)
    return {"precision": plan.precision, "channels_last": plan.channels_last, "ways": found}


def _scan() -> Tensor:
    return images((1, 1, *SIDES))


def _by_slabs(plan: Plan, rounds: int) -> tuple[list[float], int]:
    torch.set_num_threads(1)
    engine = lamp3d.Engine(network().eval(), plan)
    scan = _scan()
    missing = [side - given for side, given in zip(plan.image_shape[2:], SIDES, strict=True)]
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        begin = time.perf_counter()
        padded = F.pad(scan, [width for axis in reversed(missing) for width in (0, axis)], value=float(scan.min()))
        logits = whole(engine.forward(padded))[..., : SIDES[0], : SIDES[1], : SIDES[2]]
        seconds.append(time.perf_counter() - begin)
        del logits
    return seconds, peak_resident_bytes()


@torch.no_grad()
def _by_windows(side: int, precision: str, channels_last: bool) -> tuple[float, int]:
    torch.set_num_threads(WORKERS)
    keep_freed_memory()
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    model = network().eval().to(memory_format=layout)  # type: ignore[call-overload]
    scan = _scan()

    def predict(windows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found: Tensor = model(windows.contiguous(memory_format=layout))
        return found.float()

    begin = time.perf_counter()
    sliding_window_inference(scan, (side,) * 3, WINDOWS_AT_ONCE, predict, overlap=OVERLAP, mode="gaussian")
    return time.perf_counter() - begin, peak_resident_bytes()
