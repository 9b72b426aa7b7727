"""How far plans are from the best: by brute force, beside torchgpipe's blocks, and among all plans that were timed."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torchgpipe.balance import blockpartition

import lamp3d
from benchmarks.planner.predictions import Case, _step, network
from lamp3d.graph import trace
from lamp3d.plan import Plan, find_plans, make_plan
from lamp3d.plan.choice import search_plans
from lamp3d.plan.hardware import load_hardware
from lamp3d.plan.links import Links, load_link
from lamp3d.plan.meter import ModelMeter
from lamp3d.plan.options import Request
from lamp3d.plan.partition import minimise_largest, pairs
from lamp3d.plan.profile import model_cells
from lamp3d.plan.work import account

RANDOM = 2000
SHARES = (50, 90, 99, 100)
MEASURED = (Case("UNet", 8, 4, 64, 2), Case("UNet", 16, 1, 64, 2), Case("SEUNet", 8, 2, 64, 2))


def measure(rounds: int, console: Console) -> dict[str, Any]:
    """The slowest stage of torchgpipe's block partition over that of ours, on random and on real profiles."""
    draw = random.Random(0)
    random_ratios = []
    for _ in range(RANDOM):
        costs = [draw.choice((1, 1, 10, 100)) * draw.random() for _ in range(draw.randint(4, 60))]
        random_ratios.append(_ratio(costs, draw.randint(2, min(8, len(costs)))))
    real_ratios = {}
    hardware = load_hardware("a100-80g")
    with torch.device("meta"):
        nets: dict[str, nn.Module] = {
            f"{kind}-{filters}": network(kind, filters) for kind in ("UNet", "SEUNet") for filters in (16, 32)
        } | {"DynUNet-16": network("DynUNet", 16)}
    for name, net in nets.items():
        shape = (1, 1, 128, 128, 128)
        work = account(trace(net, shape), shape, precision="fp32", channels_last=False)
        seconds = [cell.forward + cell.backward for cell in model_cells(work, hardware, "fp32").cells]
        for stages in (2, 3, 4, 8):
            real_ratios[f"{name}, {stages} stages"] = _ratio(seconds, stages)
    table = Table(title="Slowest stage: torchgpipe's block partition / lamp3d's (1: as good)")
    for column in ("profiles", *(f"{share} % of them up to" for share in SHARES), "worse than torchgpipe"):
        table.add_column(column, justify="left" if column == "profiles" else "right")
    for kind, ratios in (("random", random_ratios), ("real", list(real_ratios.values()))):
        worse = sum(ratio < 1 - 1e-9 for ratio in ratios)
        table.add_row(f"{len(ratios)} {kind}", *(f"{np.percentile(ratios, share):.2f}" for share in SHARES), str(worse))
    console.print(table)
    return {
        "random": {str(share): float(np.percentile(random_ratios, share)) for share in SHARES},
        "random_worse": sum(ratio < 1 - 1e-9 for ratio in random_ratios),
        "real": real_ratios,
    }


def _ratio(costs: list[float], stages: int) -> float:
    theirs = max(map(sum, blockpartition.solve(costs, stages)))
    sums = np.array([0.0, *itertools.accumulate(costs)])
    starts = minimise_largest(sums[None, :] - sums[:, None], [pairs(len(costs))] * stages)
    assert starts is not None
    ours = max(sum(costs[i:j]) for i, j in itertools.pairwise([*starts, len(costs)]))
    return theirs / ours


LAYOUT = {False: "channels first", True: "channels last"}


def measure_best(rounds: int, console: Console) -> dict[str, Any]:
    """Every way to use two devices, timed: how far the chosen plan is from the fastest of them."""
    found: dict[str, Any] = {}
    for case in MEASURED:
        shape = (case.batch, 1, case.side, case.side, case.side)
        planning = find_plans(network(case.net, case.filters), shape, case.devices, recompute="never", fresh=True)
        seconds = {}
        for other in track(planning.answer.found, description=str(case), console=console):
            if other.cut is None:
                continue
            option = other.option
            for last in (False, True):
                plan = make_plan(
                    network(case.net, case.filters), shape, case.devices, recompute="never", data=option.data,
                    space=option.slabs.mesh or 1, pipe=option.pipe, micro_batches=option.micro_batches,
                    schedule=option.schedule, channels_last=last,
                )  # fmt: skip
                seconds[f"{option}, {LAYOUT[last]}"] = {
                    "predicted": plan.step_seconds, "measured": statistics.median(_timed(case, plan, rounds)),
                }  # fmt: skip
        chosen = f"{planning.answer.found[0].option}, {LAYOUT[planning.plan.channels_last]}"
        best = min(of["measured"] for of in seconds.values())
        table = Table(title=f"{case}: every way to use {case.devices} devices")
        for column in ("", "predicted s", "measured s"):
            table.add_column(column, justify="left" if not column else "right")
        for name, of in sorted(seconds.items(), key=lambda item: item[1]["measured"]):
            mark = " (chosen)" if name == chosen else ""
            table.add_row(name + mark, f"{of['predicted']:.3f}", f"{of['measured']:.3f}")
        console.print(table)
        found[str(case)] = {
            "chosen": chosen, "chosen_over_best": seconds[chosen]["measured"] / best, "plans": seconds
        }  # fmt: skip
    return found


def _timed(case: Case, plan: Plan, rounds: int) -> list[float]:
    seconds: list[float] = lamp3d.launch(_step, case.devices, (case, plan, rounds))[0][0]
    return seconds


def measure_speed(rounds: int, console: Console) -> dict[str, Any]:
    """Seconds of planning for about 100 cells and up to 64 devices: all of it, and with the profile known."""
    found = {}
    with torch.device("meta"):
        net = network("SEUNet", 32)
    hardware = load_hardware("a100-80g")
    for shape, devices in (((1, 1, 192, 192, 192), 64), ((64, 1, 128, 128, 128), 64), ((8, 1, 128, 128, 128), 16)):
        begin = time.perf_counter()
        meter = ModelMeter(net, shape, 1, hardware, Links(within=load_link(hardware.link)))
        request = Request(shape, devices, meter.memory, *meter.ways(("bf16",))[0], least_planes=None)
        search_plans(meter, request)
        whole = time.perf_counter() - begin
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            planning = search_plans(meter, request)
            seconds.append(time.perf_counter() - begin)
        name = f"{len(meter.graph.cells)} cells, batch {shape[0]}, {shape[2]}³, {devices} devices"
        found[name] = {
            "seconds": statistics.median(seconds),
            "with_tracing_and_profile": whole,
            "options": len(planning.answer.found),
            "plan": str(planning.answer.found[0].option),
            "gap": planning.gap,
        }
        console.print(
            f"{name}: {found[name]['seconds']:.2f} s, {whole:.2f} s with tracing and profile, "
            f"{found[name]['options']} options, {found[name]['plan']}, within {planning.gap:.0%} of the bound"
        )
    return found
