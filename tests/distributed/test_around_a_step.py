"""What goes wrong around a step on two workers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lamp3d import Engine, Plan, launch, make_plan, mean_over_cases
from lamp3d.errors import PlanError

SHAPE = (2, 1, 4, 4, 4)


def _with_a_plan_of_its_own() -> None:
    network = nn.Conv3d(1, 1, 1)
    Engine(network, make_plan(network, SHAPE, 2, pipe=1, space=1 + dist.get_rank(), repeats=1))


def test_workers_with_different_plans_are_refused() -> None:
    with pytest.raises(PlanError, match=r"workers have different plans.* make one, and hand it to all"):
        launch(_with_a_plan_of_its_own, 2)


def _gradient_after_a_step_that_failed(plan: Plan) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    network = nn.Conv3d(1, 1, 1)
    engine, images = Engine(network, plan), torch.rand(SHAPE)

    @mean_over_cases
    def fails(output: Tensor, targets: object) -> Tensor:
        raise ArithmeticError("no loss")

    engine.step(images, None, mean_over_cases(lambda output, _: output.mean()))
    assert network.weight.grad is not None
    before = network.weight.grad.clone()
    with pytest.raises(ArithmeticError, match="no loss"):
        engine.step(images, None, fails)
    return before, network.weight.grad


def test_gradients_that_were_there_outlive_a_step_that_fails() -> None:
    plan = make_plan(nn.Conv3d(1, 1, 1), SHAPE, 2, data=2, repeats=1)
    for before, after in launch(_gradient_after_a_step_that_failed, 2, (plan,)):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
