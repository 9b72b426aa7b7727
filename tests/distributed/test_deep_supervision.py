"""Deep supervision on two devices, as a pipeline and with shared volumes, is that on one."""

from functools import partial
from typing import Any

import pytest

from lamp3d import SEUNet, UNet
from lamp3d.experiment import verify
from lamp3d.plan import make_plan


@pytest.mark.parametrize(
    ("net", "batch", "mesh"),
    [(UNet, 2, {"pipe": 2, "schedule": "zero_bubble_v"}), (SEUNet, 1, {"space": 2})],
    ids=["pipe", "space"],
)
def test_all_levels_and_gradients_are_those_of_one_device(net: type[UNet], batch: int, mesh: dict[str, Any]) -> None:
    make = partial(net, 1, 3, filters=2, deep_supervision=3)
    plan = make_plan(make(), (batch, 1, 32, 16, 32), 2, precision="fp32", **mesh)
    for report in verify(make, plan):
        assert max(report.differences.values()) <= 1e-10
        assert any(name.startswith("coarse_logits") for name in report.differences) or plan.pipe > 1
