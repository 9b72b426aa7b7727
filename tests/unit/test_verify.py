"""What counts as different from one device: everything but what rounding leaves of a sum that cancels."""

import math

import pytest
import torch
from torch import nn

from lamp3d.experiment.verify import _on_one_device, _Step


def step(*, weight: float = 1.0, bias: float = 0.0, deeper: float = 1e-3, output: float = 1.0) -> _Step:
    gradients = {"conv.weight": weight, "conv.bias": bias, "deeper.weight": deeper}
    return _Step(
        [torch.tensor([output])], torch.tensor(1.0), {name: torch.tensor([g]) for name, g in gradients.items()}
    )


def test_what_rounding_leaves_of_a_bias_before_a_norm_is_no_difference() -> None:
    assert max(step(bias=1e-14).differences(step(bias=-1e-14)).values()) <= 1e-13


@pytest.mark.parametrize("what", ["weight", "bias", "deeper", "output"])
def test_true_differences_are_seen(what: str) -> None:
    differences = step(**{what: 1.1e-3}).differences(step())
    assert max(differences.values()) >= 1e-3
    assert max(step(**{what: math.nan}).differences(step()).values()) == math.inf


def test_a_step_on_one_device_is_its_own() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.InstanceNorm3d(2), nn.Conv3d(2, 1, 1)).double()
    inputs = {"input": torch.randn(2, 1, 6, 6, 6, dtype=torch.float64)}
    targets = torch.randn(2, dtype=torch.float64)
    first, second = (_on_one_device(network, inputs, targets) for _ in range(2))
    differences = first.differences(second)
    assert set(differences) == {"loss", "output", *dict(network.named_parameters())}
    assert max(differences.values()) == 0
    rounded = _on_one_device(network.float(), inputs, targets).differences(first)
    assert 0 < max(rounded.values()) < 1e-3
