"""The tables of README.md from results.json:  python -m benchmarks.pipeline.tables"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")
PREFIX = "schedules, M = "


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def schedules(results: dict[str, Any]) -> str:
    """Throughput over one thread of plain PyTorch, for every M."""
    counts = sorted(int(part.removeprefix(PREFIX)) for part in results if part.startswith(PREFIX))
    found = {m: results[f"{PREFIX}{m}"]["found"] for m in counts}
    last = found[8]["median_seconds"] if 8 in found else found[counts[-1]]["median_seconds"]
    names = sorted(last, key=lambda name: -last[name])
    head = ["× one thread of plain PyTorch", *(f"M = {m}" for m in counts), "seconds at M = 8", "sent at M = 8"]
    rows = []
    for name in names:
        ratios = [f"{ratio:.2f}" if (ratio := found[m]["over_one_thread"].get(name)) else "" for m in counts]
        sent = found[8]["bytes_sent"].get(name.removeprefix("lamp3d, ")) if 8 in found else None
        rows.append([name, *ratios, f"{last[name]:.2f}", "" if sent is None else f"{sent / 1e6:.0f} MB"])
    return table(head, rows)


def single(results: dict[str, Any]) -> str:
    """One device: seconds, and the share of the peak."""
    found = results["single"]["found"]
    names = list(next(iter(found.values()))["seconds"])
    head = ["seconds a step", *(f"{side}³" for side in found)]
    rows: list[list[object]] = [[name, *(f"{one['seconds'][name]:.3f}" for one in found.values())] for name in names]
    for precision in ("fp32", "bf16"):
        shares = (
            f"{one[f'{precision}_share_of_peak']:.0%} of {one[f'{precision}_peak_gflops']:.0f} GFLOP/s"
            for one in found.values()
        )
        rows.append([f"share of the {precision} peak", *shares])
    return table(head, rows)


def memory(results: dict[str, Any]) -> str:
    """What each rank holds at most, measured and predicted."""
    rows = []
    for name, one in results["memory"]["found"].items():
        pairs = list(zip(one["measured_bytes"], one["predicted_bytes"], strict=True))
        cells = (f"{measured / 1e6:.0f} ({predicted / measured - 1:+.0%})" for measured, predicted in pairs)
        rows.append([name, *cells])
    return table(["MB (predicted against measured)", "rank 0", "rank 1"], rows)


def ablation(results: dict[str, Any]) -> str:
    """What each part of the engine is worth."""
    rows = [
        [
            row["name"],
            f"{row['seconds']:.2f}",
            f"{row['cases_per_second']:.2f}",
            f"{row['utilisation']:.0%}",
            f"{max(row['peak_bytes']) / 1e9:.2f} GB",
            f"{row['bytes_sent'] / 1e6:.0f} MB",
        ]
        for row in results["ablation"]["found"]
    ]
    return table(["", "s a step", "cases a second", "utilisation", "peak memory of a worker", "sent"], rows)


def sent(results: dict[str, Any]) -> str:
    """Bytes of a step: straight and folded cuts, for this machine's link and a slow one; skips straight and relayed."""
    found, skips = results["bytes"]["found"], results["skips"]["found"]
    kinds = list(next(iter(found.values())))
    head = ["MB a step", *kinds, "straight cut, skips sent straight", "the same, skips passed along"]
    rows = []
    for devices, (straight, relayed) in skips.items():
        of_kind = (f"{found[devices][kind]['sent_bytes'] / 1e6:.0f}" if devices in found else "" for kind in kinds)
        rows.append([f"K = {devices}", *of_kind, f"{straight / 1e6:.0f}", f"{relayed / 1e6:.0f}"])
    return table(head, rows)


if __name__ == "__main__":
    loaded = json.loads(RESULTS.read_text())
    if any(part.startswith(PREFIX) for part in loaded):
        print(schedules(loaded))
    for make in (single, memory, ablation, sent):
        print(make(loaded))
