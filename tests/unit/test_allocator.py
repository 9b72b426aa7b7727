"""How much memory a worker has had in use."""

import sys

import pytest
import torch

import lamp3d
from lamp3d.graph.allocator import peak_resident_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_an_engines_peak_is_not_that_of_what_was_before_it() -> None:
    network = lamp3d.UNet(1, 2, filters=4)
    plan = lamp3d.make_plan(network, (1, 1, 32, 32, 32), 1, precision="fp32", channels_last=False)
    before = torch.zeros(10**9, dtype=torch.uint8)
    del before
    highest = peak_resident_bytes()
    engine = lamp3d.Engine(network, plan)
    assert engine.peak_bytes() < highest - 5 * 10**8
    lowest = engine.peak_bytes()
    beside = torch.ones(10**9, dtype=torch.uint8)
    assert engine.peak_bytes() > lowest + 9 * 10**8
    del beside
