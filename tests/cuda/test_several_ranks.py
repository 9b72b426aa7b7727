"""Several ranks on CUDA, joined by NCCL, in float64: what a mesh, a schedule and slabs send, against the plain network.

With fewer GPUs than ranks they share one. They take turns on it then, so that a message takes some 20 ms: hence a few
steps here, where tests/distributed has hundreds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from lamp3d import UNet, launch
from lamp3d.plan.schedule import PLACEMENTS
from tests.distributed.operations import Example, compare_all, examples
from tests.distributed.workers import Finding, by_case, one_step, run_plain, seeded, volumes, world
from tests.plans import cell_names, plan_at, random_starts

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
SHAPE = (2, 1, 32, 16, 16)
SPLITS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "pipeline": {"schedule": "1f1b"},
        "zero bubble": {"schedule": "zero_bubble_v", "recompute": "always"},
        "slabs": {"space": (2,), "space_dims": (2,)},
        "replicas": {"data": 2},
    },
    4: {
        "pipelines of slabs": {"schedule": "folded", "space": (2,), "space_dims": (2,)},
        "replicas of pipelines": {"schedule": "1f1b", "data": 2},
        "replicas of slabs": {"data": 2, "space": (2,), "space_dims": (2,)},
        "slabs along two axes": {"space": (2, 2), "space_dims": (2, 3)},
    },
}


def one_of_each() -> dict[str, Finding]:
    """A step and a pass forward of every split of so many ranks."""
    network = seeded(lambda: UNet(1, 2, filters=1))
    images, targets = volumes(SHAPE)
    plain = run_plain(network, images, targets, by_case)
    names = cell_names(network, SHAPE)
    findings = {}
    for seed, (name, split) in enumerate(SPLITS[world()].items()):
        copies = split.get("data", 1) * torch.Size(split.get("space", ())).numel()
        ranks = PLACEMENTS[split.get("schedule", "gpipe")](world() // copies)
        starts = random_starts(len(names), len(ranks), seed)
        plan = plan_at(network, SHAPE, starts, 2 // split.get("data", 1), names, ranks=ranks, devices=world(), **split)
        findings[name] = one_step(network, plan, images, targets, plain, loss_fn=by_case, forward=True)
    return findings


@pytest.fixture
def ranks_on_cuda(monkeypatch: pytest.MonkeyPatch, ranks: int) -> int:
    """So many ranks, on a GPU each or on fewer."""
    monkeypatch.setenv("LAMP3D_TEST_DEVICE", "cuda")
    monkeypatch.setenv("LAMP3D_WORKERS_PER_GPU", str(-(-ranks // torch.cuda.device_count())))
    return ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_split_is_exact(ranks_on_cuda: int) -> None:
    by_rank: Sequence[dict[str, Finding]] = launch(one_of_each, ranks_on_cuda)
    for name in SPLITS[ranks_on_cuda]:
        findings = [found[name] for found in by_rank]
        assert max(error for finding in findings for error in finding.errors.values()) <= 1e-10, (name, findings)
        compared = set().union(*(finding.gradients for finding in findings))
        assert compared == {parameter for parameter, _ in UNet(1, 2, filters=1).named_parameters()}, name
        assert any("output of forward" in finding.errors for finding in findings), name


@pytest.mark.parametrize("ranks", [2, 4])
def test_operations_on_slabs_are_exact(ranks_on_cuda: int) -> None:
    drawn: list[Example] = []

    @settings(
        max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )  # fmt: skip
    @given(examples(ranks_on_cuda))
    def draw(example: Example) -> None:
        drawn.append(example)

    draw()
    by_rank = launch(compare_all, ranks_on_cuda, (drawn,))
    for example, findings in zip(drawn, zip(*by_rank, strict=True), strict=True):
        assert len({says for _, says in findings}) == 1, example
        assert max(error for error, _ in findings) <= 1e-10, (example, findings)
    assert sum(says == "" for _, says in by_rank[0]) > len(drawn) // 3
