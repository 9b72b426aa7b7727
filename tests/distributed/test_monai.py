"""MONAI's networks, unmodified, in two and three stages and more: output, loss and gradients of the plain network.

Here every network runs with one schedule on two devices or on three; with LAMP3D_FULL=1 on both, and on four, with
every schedule and every way to recompute.
"""

import pytest

from lamp3d import launch
from lamp3d.plan import SCHEDULES
from tests.distributed.workers import run_monai, run_monai_on_slabs
from tests.full import FULL
from tests.monai_networks import NETWORKS, networks_on


@pytest.mark.timeout(3600 if FULL else 1800)
@pytest.mark.parametrize("devices", [2, 3, 4] if FULL else [2, 3])
def test_monais_networks_are_exact(devices: int) -> None:
    ranks = launch(run_monai, devices, (FULL,))
    for rank, found in enumerate(ranks):
        for name, finding in found.items():
            assert not finding.says, f"{name}: {finding.says}"
            wrong = {what: error for what, error in finding.errors.items() if not error <= 1e-10}
            assert not wrong, f"{name}, rank {rank}"
    for _, network in networks_on(devices, full=FULL):
        names = [name for name in ranks[0] if name.startswith(f"{network}:")]
        assert len(names) == (len(SCHEDULES) * 3 if FULL else 1)
        for name in names:
            compared = set().union(*(found[name].gradients for found in ranks))
            assert compared == ranks[0][name].facts["expected"], name
            assert any("output of forward" in found[name].errors for found in ranks)


EXACT_ON_SLABS = ("UNet", "BasicUNet", "DynUNet", "SegResNet", "VNet", "AttentionUnet", "MedNeXt")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("devices", [2, 3, 4] if FULL else [2])
def test_monais_networks_on_slabs_are_exact_or_refused(devices: int) -> None:
    ranks = launch(run_monai_on_slabs, devices)
    for network in NETWORKS:
        assert len({found[network].says for found in ranks}) == 1, network
        if network in EXACT_ON_SLABS:
            assert not ranks[0][network].says, network
        for found in ranks:
            wrong = {what: error for what, error in found[network].errors.items() if not error <= 1e-10}
            assert not wrong, network
            assert found[network].errors or "cannot be done exactly on a volume" in found[network].says, network
