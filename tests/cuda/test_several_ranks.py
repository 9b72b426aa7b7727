"""Several ranks on CUDA, joined by NCCL: the same checks as on the CPU, in float64.

With fewer GPUs than ranks they share one: slow, and the same messages.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from lamp3d import launch
from tests.distributed.operations import Example, compare_all, examples
from tests.distributed.test_engine import assert_exact
from tests.distributed.workers import run_checks

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
CHECKS = {
    2: ["exactness", "schedules", "any_placement", "shapes", "batch_norm", "inputs", "space", "dropped_engine"],
    4: ["schedules", "replicas", "space"],
}


@pytest.fixture
def ranks_on_cuda(monkeypatch: pytest.MonkeyPatch, ranks: int) -> int:
    """So many ranks, on a GPU each or on fewer."""
    monkeypatch.setenv("LAMP3D_TEST_DEVICE", "cuda")
    monkeypatch.setenv("LAMP3D_WORKERS_PER_GPU", str(-(-ranks // torch.cuda.device_count())))
    return ranks


@pytest.mark.parametrize(("ranks", "check"), [(ranks, check) for ranks, names in CHECKS.items() for check in names])
def test_the_engine_is_exact(ranks_on_cuda: int, check: str) -> None:
    found = launch(run_checks, ranks_on_cuda, ([check],))
    assert len(assert_exact(found, check)) >= (1 if check == "dropped_engine" else 3)


@pytest.mark.parametrize("ranks", [2, 4])
def test_operations_on_slabs_are_exact(ranks_on_cuda: int) -> None:
    drawn: list[Example] = []

    @settings(
        max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
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
