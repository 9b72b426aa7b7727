"""The engine's contract: for every cut, number of devices and of micro-batches, the plain network's numbers."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from lamp3d import launch
from lamp3d.plan import SCHEDULES, make_plan
from lamp3d.plan.hardware import has_fast_bf16
from tests.distributed.workers import (
    CHECKS,
    Finding,
    SEUNet,
    UNet,
    measure_memory,
    measure_sent_bytes,
    one_step,
    run_checks,
    seeded,
    volumes,
)
from tests.full import FULL
from tests.networks import Branches, Conditioned, Counting, InPlace
from tests.plans import plan_at

pytestmark = pytest.mark.timeout(1800)  # the first test of a number of devices runs all checks on that number

Results = list[dict[str, dict[str, Finding]]]

FEW = ["exactness", "every_cut", "schedules", "any_placement"]
SPACE = ["space", "slabs_in_bf16"]
ALL = [check for check in CHECKS if check not in ("replicas", *SPACE)]
PLANS = {
    1: ALL,
    2: [*ALL, *SPACE],
    3: [*FEW, "shapes", "batch_norm", "frozen", "inputs", *SPACE, "dropped_engine"],
    4: [*(FEW if FULL else ["every_cut", "schedules"]), "replicas", *(SPACE if FULL else ["space"])],
}
"""Which checks run on how many devices, more with LAMP3D_FULL=1; each number of devices is launched once."""


@pytest.fixture(scope="module")
def results() -> Callable[[int], Results]:
    """The checks' findings by rank, run at the first request for that number of devices."""
    known: dict[int, Results] = {}

    def of(devices: int) -> Results:
        if devices not in known:
            known[devices] = launch(run_checks, devices, (PLANS[devices],))
        return known[devices]

    return of


def on(check: str) -> pytest.MarkDecorator:
    """Parametrise a test over the numbers of devices on which ``check`` runs."""
    return pytest.mark.parametrize("devices", [devices for devices, checks in PLANS.items() if check in checks])


def assert_exact(ranks: Results, check: str, tolerance: float = 1e-10) -> dict[str, set[str]]:
    """No error above the tolerance, on any rank; returns the parameters whose gradients were compared, by finding."""
    compared: dict[str, set[str]] = {}
    for rank, checks in enumerate(ranks):
        for name, finding in checks[check].items():
            wrong = {what: error for what, error in finding.errors.items() if not error <= tolerance}
            assert not wrong, f"{name}, rank {rank}"
            compared[name] = compared.get(name, set()) | finding.gradients
    return compared


@on("exactness")
def test_output_loss_and_all_gradients_equal_the_plain_networks(
    results: Callable[[int], Results], devices: int
) -> None:
    compared = assert_exact(results(devices), "exactness")
    assert len(compared) >= 2 * (4 * 2 // 3)  # two networks, four numbers of micro-batches, two ways to recompute
    for name, gradients in compared.items():
        network = (SEUNet if name.startswith("SEUNet") else UNet)(1, 3, filters=2)
        assert gradients == {parameter for parameter, _ in network.named_parameters()}, name
    # The output, and the loss, were compared somewhere.
    for name in compared:
        assert "output of forward" in results(devices)[-1]["exactness"][name].errors
        assert all("loss" in rank["exactness"][name].errors for rank in results(devices))


@on("every_cut")
def test_in_place_operations_shared_values_and_several_outputs(results: Callable[[int], Results], devices: int) -> None:
    compared = assert_exact(results(devices), "every_cut")
    assert sum(name.startswith("RandomDag") for name in compared) >= 8, "too few random graphs were valid"
    for network in (InPlace(), Branches()):
        mine = {name: found for name, found in compared.items() if name.startswith(type(network).__name__)}
        assert len(mine) >= (4 if devices == 2 else 2)
        for found in mine.values():
            assert found == {name for name, _ in network.named_parameters()}


@on("schedules")
def test_every_schedule_and_every_way_to_recompute(results: Callable[[int], Results], devices: int) -> None:
    compared = assert_exact(results(devices), "schedules")
    every = 3 * len(SCHEDULES)
    assert len(compared) >= 3 * (every // 2) + every // 4
    for name, gradients in compared.items():
        if name.startswith("SEUNet"):
            assert gradients == {parameter for parameter, _ in SEUNet(1, 3, filters=2).named_parameters()}, name


@on("any_placement")
def test_stages_on_any_ranks(results: Callable[[int], Results], devices: int) -> None:
    compared = assert_exact(results(devices), "any_placement")
    assert {"mini-batch", "stream of 2", "stream of 5"} < compared.keys()
    for rank in results(devices):
        refused = [finding.says for name, finding in rank["any_placement"].items() if name.startswith("refused")]
        assert len(refused) == 3
        assert all("a loss that is a mean over cases" in says for says in refused)


@on("shapes")
def test_volumes_of_different_shapes(results: Callable[[int], Results], devices: int) -> None:
    compared = assert_exact(results(devices), "shapes")
    for network in ("UNet", "Shaped"):  # the second is traced anew for every shape
        kinds = {f"{kind} of {network}" for kind in ("list", "list, recomputed", "stream 0", "stream 1")}
        assert kinds < compared.keys()


@on("dropout")
def test_dropout_is_replayed(results: Callable[[int], Results], devices: int) -> None:
    assert all(rank["dropout"]["dropout"].facts["same"] for rank in results(devices))


@on("batch_norm")
def test_batch_norm_is_exact_or_refused(results: Callable[[int], Results], devices: int) -> None:
    assert_exact(results(devices), "batch_norm")
    seen = set().union(*(rank["batch_norm"]["M=1 recompute=always"].facts["buffers"] for rank in results(devices)))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert seen == {f"layers.{layer}.{name}" for layer in (1, 4) for name in statistics}
    for rank in results(devices):
        assert "is a BatchNorm in training mode" in rank["batch_norm"]["M=2"].says


def test_batch_norm_may_need_the_whole_batch() -> None:
    network, shape = seeded(Counting), (4, 1, 1, 1, 1)  # a single image would leave one value a channel
    finding = one_step(network, plan_at(network, shape, [0]), *volumes(shape))
    assert max(finding.errors.values()) < 1e-10


@on("frozen")
def test_frozen_parameters(results: Callable[[int], Results], devices: int) -> None:
    compared = assert_exact(results(devices), "frozen")
    assert not {name for name in compared["frozen, recompute=never"] if name[0] in "ab"}
    assert {"a.weight", "b.bias"} < compared["thawed"]


@on("dropped_engine")
def test_an_engine_may_be_dropped_after_any_call(results: Callable[[int], Results], devices: int) -> None:
    assert_exact(results(devices), "dropped_engine")


@on("inputs")
def test_several_inputs_by_name(results: Callable[[int], Results], devices: int) -> None:
    compared = assert_exact(results(devices), "inputs")
    every = {name for name, _ in Conditioned().named_parameters()}
    assert compared["three gpipe"] == compared["list"] == compared["after refusals"] == every
    assert compared["two, in another order 1f1b"] == every - {"c.weight", "c.bias"}
    for rank, checks in enumerate(results(devices)):
        for name, says in (("names", "given code, input; pass those"), ("batch", "have batches of [3, 4]")):
            refusal = checks["inputs"][f"refused: {name}"].says
            assert says in refusal if rank == 0 else "worker 0 has refused the mini-batch" in refusal


@on("space")
def test_volumes_that_ranks_share(results: Callable[[int], Results], devices: int) -> None:
    compared = assert_exact(results(devices), "space")
    everything = {name for name, _ in UNet(1, 3, filters=2).named_parameters()}
    assert compared["list"] == everything
    alone = [name for name in compared if name.startswith(f"UNet 0 ({devices},)")]
    assert len(alone) == 2
    assert all(compared[name] == everything for name in alone)
    for rank in results(devices):
        assert rank["space"]["list"].facts["sent"] > 0
        assert "has too few planes for" in rank["space"]["refused: thin"].says
        assert re.search(r"'flip' on .* in 1 \(Shuffled\) cannot be .* space=1", rank["space"]["refused: unknown"].says)


@on("refusals")
def test_what_cannot_be_run_is_refused(results: Callable[[int], Results], devices: int) -> None:
    for rank in results(devices):
        findings = rank["refusals"]
        if devices > 1:
            assert "'twice.weight' is used in stage" in findings["tied"].says
        else:
            assert findings["tied"].says == ""
        assert f"not for {devices} worker" in findings["devices"].says
        if devices > 1:
            says = findings["mode"].says
            assert re.match(r"Sided does something else .* in evaluation than with .* in training", says)
        else:  # whatever its cells are
            assert findings["mode"].errors == {"output": 0.0}
        assert (
            "the plan was made for another network: cell 'first' here is 'a + mul + act' there"
            in findings["network"].says
        )


@on("reduced_precision")
def test_reduced_precision_is_close(results: Callable[[int], Results], devices: int) -> None:
    for rank in results(devices):
        for name, finding in rank["reduced_precision"].items():
            limit = 3e-2 if name.startswith("bf16") else 1e-4
            assert not {what: error for what, error in finding.errors.items() if not error <= limit}, name


@on("slabs_in_bf16")
def test_slabs_in_bf16_are_close(results: Callable[[int], Results], devices: int) -> None:
    for rank in results(devices):
        assert len(rank["slabs_in_bf16"]) == 6
        for name, finding in rank["slabs_in_bf16"].items():
            # Thin slabs are computed in fp32, the whole in bf16: so much do gradients differ that nearly cancel (0.0625
            # where bf16 is emulated).
            limit = 6e-2 if has_fast_bf16("cpu") else 1e-1
            assert not {what: error for what, error in finding.errors.items() if not error <= limit}, name


@on("mixed_layouts")
def test_both_ends_of_a_transfer_agree_on_its_layout(results: Callable[[int], Results], devices: int) -> None:
    assert_exact(results(devices), "mixed_layouts", tolerance=1e-5)


@on("accumulation")
def test_gradients_add_up_and_steps_leave_nothing_behind(results: Callable[[int], Results], devices: int) -> None:
    assert_exact(results(devices), "accumulation")
    for rank in results(devices):
        facts = rank["accumulation"]["two steps"].facts
        assert facts["tensors"] == 0
        assert facts["bytes"] < 40_000_000  # sixteen steps with about 4 MB of activations each


def test_memory_is_as_predicted() -> None:
    network, shape = UNet(1, 3, filters=4), (8, 1, 32, 32, 32)
    straight: dict[str, Any] = {
        "data": 1, "space": 1, "micro_batches": shape[0], "recompute": "never", "channels_last": False, "repeats": 1,
    }  # fmt: skip
    plans = {schedule: make_plan(network, shape, 2, **straight, schedule=schedule) for schedule in SCHEDULES}
    peaks = launch(measure_memory, 2, (plans,))
    for rank, found in enumerate(peaks):
        for schedule, peak in found.items():
            # What is on its way depends on how the ranks keep pace, and following every tensor slows them unequally.
            tolerance = 0.15 if schedule in ("gpipe", "1f1b") else 0.5
            assert peak == pytest.approx(plans[schedule].per_device[rank].saved_bytes, rel=tolerance), (schedule, rank)
        assert found["1f1b"] < 0.4 * found["gpipe"]


def test_what_slabs_send_is_as_predicted() -> None:
    """Borders, the statistics of norms, gates' means, and the levels that are gathered."""
    shape, networks, plans = (1, 1, 64, 64, 64), {}, {}
    for net in (UNet, SEUNet):
        for least in (1, 5):
            name = f"{net.__name__}, at least {least} planes"
            networks[name] = net(1, 1, filters=4)
            plans[name] = make_plan(
                networks[name], shape, 2, space=2, least_planes=least, precision="fp32", channels_last=False,
                recompute="never", repeats=1,
            )  # fmt: skip
            assert ("encoder4.conv1" in plans[name].gathered) == (least > 1)
    for found in launch(measure_sent_bytes, 2, (plans, networks)):
        for name, sent in found.items():
            assert sent == pytest.approx(plans[name].exchanged_bytes, rel=0.02), name


@on("replicas")
def test_replicas_of_a_pipeline_make_one_step(results: Callable[[int], Results], devices: int) -> None:
    compared = assert_exact(results(devices), "replicas")
    everything = {parameter for parameter, _ in SEUNet(1, 3, filters=2).named_parameters()}
    for schedule in SCHEDULES:
        steps = [found for name, found in compared.items() if name.startswith(schedule) and "step" in name]
        assert steps == [everything] * 2
    assert compared["list"] == everything
    assert {"0.twice.weight", "0.twice.bias"} < compared["tied folded"] & compared["tied zero_bubble_v"]
    for index, rank in enumerate(results(devices)):
        findings = rank["replicas"]
        assert not any(finding.facts.get("hooks") for finding in findings.values())
        assert "a loss that is a mean over cases" in findings["refused: loss"].says
        refused = findings["refused: uneven"].says
        first = index % 2 == 0  # of its pipeline
        assert ("a mini-batch of 3 cannot be shared evenly among 2 replicas" if first else "has refused") in refused
