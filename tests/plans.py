"""Plans for given cuts, without profiling: tests cut where they like."""

import itertools
import os
import random
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from lamp3d.graph import trace
from lamp3d.graph.settings import settings_of
from lamp3d.plan import Plan, StagePlan
from lamp3d.plan.plan import DevicePlan

DEVICE = os.environ.get("LAMP3D_TEST_DEVICE", "cpu")
"""Where plans run. Workers inherit it from the test that launches them: "cuda" in tests/cuda."""


_NAMES: WeakKeyDictionary[nn.Module, list[tuple[object, list[str]]]] = WeakKeyDictionary()


def cell_names(network: nn.Module, input_shape: Sequence[int]) -> list[str]:
    """The names of the network's cells in order; kept, for to trace takes most of a small network's test."""
    asked = str(input_shape), settings_of(network), [module.training for module in network.modules()]
    for known, names in _NAMES.setdefault(network, []):
        if known == asked:
            return names
    names = [cell.name for cell in trace(network, input_shape).cells]
    _NAMES[network].append((asked, names))
    return names


def plan_at(
    network: nn.Module,
    input_shape: Sequence[int],
    starts: Sequence[int],
    micro_batches: int = 1,
    names: Sequence[str] | None = None,
    *,
    schedule: str = "gpipe",
    ranks: Sequence[int] | None = None,
    **settings: Any,
) -> Plan:
    """The plan whose stages begin at the cells ``starts``; ``settings`` are other fields of :class:`Plan`.

    ``names`` are the network's cells, if they are known already; ``ranks`` those of the stages, by default one each.
    """
    names = names or cell_names(network, input_shape)
    bounds = [*starts, len(names)]
    stages = tuple(
        StagePlan(
            rank=stage if ranks is None else ranks[stage],
            first_cell=begin,
            last_cell=end - 1,
            cells=tuple(names[begin:end]),
            forward_seconds=1.0,
            backward_seconds=2.0,
            weight_seconds=1.0,
            parameter_bytes=0,
            sent_bytes=0,
        )
        for stage, (begin, end) in enumerate(itertools.pairwise(bounds))
    )
    pipe = 1 + max(stage.rank for stage in stages)
    plan = Plan(
        network=type(network).__name__,
        input_shape=input_shape if isinstance(input_shape, dict) else tuple(input_shape),
        devices=pipe,
        device_type=DEVICE,
        micro_batches=micro_batches,
        schedule=schedule,
        recompute="never",
        precision="fp32",
        channels_last=False,
        memory_limit_bytes=None,
        stages=stages,
        per_device=(DevicePlan(saved_bytes=0, peak_bytes=0),) * pipe,
        step_seconds=1.0,
        bubble=0.0,
    )
    return plan.model_copy(update=settings)


def random_starts(n_cells: int, stages: int, seed: int) -> list[int]:
    """First cells of ``stages`` non-empty stages, cut at random."""
    return [0, *sorted(random.Random(seed).sample(range(1, n_cells), stages - 1))]
