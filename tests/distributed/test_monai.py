"""MONAI's networks, unmodified, in two and three stages and more: output, loss and gradients of the plain network.

Here every network runs with one schedule on each number of devices, another one each time; with LAMP3D_FULL=1 with
every schedule and every way to recompute, and on four devices too.
"""

import os

import pytest

from lamp3d import launch
from lamp3d.plan import SCHEDULES
from tests.distributed.workers import run_monai
from tests.monai_networks import NETWORKS

FULL = bool(os.environ.get("LAMP3D_FULL"))


@pytest.mark.timeout(3600 if FULL else 300)
@pytest.mark.parametrize("devices", [2, 3, 4] if FULL else [2, 3])
def test_monais_networks_are_exact(devices: int) -> None:
    ranks = launch(run_monai, devices, (FULL,))
    for rank, found in enumerate(ranks):
        for name, finding in found.items():
            assert not finding.says, f"{name}: {finding.says}"
            wrong = {what: error for what, error in finding.errors.items() if not error <= 1e-10}
            assert not wrong, f"{name}, rank {rank}"
    for network in NETWORKS:
        names = [name for name in ranks[0] if name.startswith(f"{network}:")]
        assert len(names) == (len(SCHEDULES) * 3 if FULL else 1)
        for name in names:
            compared = set().union(*(found[name].gradients for found in ranks))
            assert compared == ranks[0][name].facts["expected"], name
            assert any("output of forward" in found[name].errors for found in ranks)
