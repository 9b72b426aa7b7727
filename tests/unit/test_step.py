"""A training step on one device, without worker processes."""

import pytest
import torch
from torch import nn

from lamp3d import Engine, make_plan
from lamp3d.errors import PlanError


@pytest.mark.parametrize("frozen", [True, False])
def test_a_loss_without_gradient_is_refused(frozen: bool) -> None:
    network, shape = nn.Conv3d(1, 1, 1).requires_grad_(not frozen), (1, 1, 4, 4, 4)
    engine = Engine(network, make_plan(network, shape, repeats=1))
    with pytest.raises(PlanError, match="no gradient in any parameter: all are frozen"):
        engine.step(torch.rand(shape), None, lambda output, _: (output if frozen else output.detach()).mean())
