"""The search: no plan is better than the one it finds, and what it says about the others is so."""

import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.patches import Arc, Rectangle
from rich.console import Console
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchgpipe.balance import blockpartition

from lamp3d.errors import ConfigError, PlanError
from lamp3d.graph import trace
from lamp3d.graph.arithmetic import arithmetic
from lamp3d.nets import SEUNet, UNet
from lamp3d.parallel import mean_over_cases
from lamp3d.plan import Plan, find_plans, make_plan
from lamp3d.plan.cache import remembered
from lamp3d.plan.costs import StageCosts
from lamp3d.plan.cut import Cut, best_cut
from lamp3d.plan.hardware import Hardware, known_hardware, load_hardware, workers_per_gpu
from lamp3d.plan.links import Links, load_link
from lamp3d.plan.measure import MeasuringMeter
from lamp3d.plan.meter import ModelMeter
from lamp3d.plan.options import Option, Request, options
from lamp3d.plan.partition import minimise_largest, pairs
from lamp3d.plan.profile import CellSeconds, Timing, model_cells
from lamp3d.plan.schedule import PLACEMENTS
from lamp3d.plan.search import Search
from lamp3d.plan.slabs import Slabs
from lamp3d.plan.timing import profile_cells, time_loss
from lamp3d.plan.work import account
from lamp3d.report import cells_picture
from tests.networks import conv

NVLINK, LOOPBACK = (Links(within=load_link(name)) for name in ("nvlink3", "loopback"))
NETWORK = load_link("network100")
A100 = load_hardware("a100-80g")


AT_ONCE = {"host_seconds": 0.0, "launch_seconds": 0.0}
"""Operations begin at once, so that half a volume takes half the time."""


class RandomMeter(ModelMeter):
    """Cells with any seconds."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...], seed: int, links: Links = NVLINK):
        super().__init__(network, shape, 1, A100, links)
        self.seed = seed

    def timing(self, slabs: Slabs, precision: str, channels_last: bool, split: bool, cases: int) -> Timing:
        draw = random.Random(self.seed)
        scale = 1 / slabs.count
        cells = []
        for _ in self.graph.cells:
            forward, backward = (scale * draw.choice((1e-3, 1e-2, 1e-1)) * draw.random() for _ in range(2))
            cells.append(CellSeconds(forward, backward, backward * 0.5 if split else 0.0))
        return Timing(tuple(cells))


def chain(layers: int) -> nn.Module:
    return nn.Sequential(*itertools.chain(*((conv(1 if i == 0 else 2, 2), nn.Tanh()) for i in range(layers // 2))))


def every_cut(search: Search, option: Option) -> Iterator[Cut]:
    """All there are, none recomputed."""
    costs = search.costs(option, "never")
    stages, n = len(PLACEMENTS[option.schedule](option.pipe)), len(costs.profile.cells)
    for inner in itertools.combinations(range(1, n), stages - 1):
        yield Cut(costs, option.schedule, option.pipe, search.meter.links.in_pipeline(option.pipe), [0, *inner])


@pytest.mark.parametrize("seed", range(60))
def test_no_plan_is_better(seed: int) -> None:
    """Every mesh, schedule, number of micro-batches and cut, played through one by one."""
    draw = random.Random(seed)
    shape = (draw.choice((1, 2, 4)), 1, 8, 6, 4)
    machines = [Links(within=NVLINK.within, across=NETWORK, per_machine=devices) for devices in (1, 2, 3)]
    links = draw.choice((NVLINK, Links(within=NETWORK), LOOPBACK, *machines))
    meter = RandomMeter(chain(2 * draw.randint(2, 4)), shape, seed, links)
    request = Request(shape, draw.choice((1, 2, 3, 4)), None, "fp32", False, recompute="never")
    search = Search(meter, request)
    peaks = sorted(cut.peak_bytes for option in options(request) for cut in every_cut(search, option))
    assert peaks
    limit = draw.choice((None, peaks[len(peaks) // 2], peaks[0]))
    search = Search(meter, replace(request, limit=limit))
    expected = min(
        (
            cut.line.seconds + search.reduce_seconds(option)
            for option in options(request)
            for cut in every_cut(search, option)
            if limit is None or cut.peak_bytes <= limit
        ),
    )
    answer = search.answer()
    assert answer.best is not None
    assert answer.best.seconds == pytest.approx(expected, rel=1e-12)
    assert answer.bound <= expected * (1 + 1e-12)
    for found in answer.found:  # nor is any option faster than its bound says
        assert found.bound <= found.seconds * (1 + 1e-12)
        if found.cut is None:
            assert found.why


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_where_any_cut_fits_with_little_to_spare_one_is_found(schedule: str) -> None:
    """Too many cuts to try them all, and what waits to be sent depends on seconds."""
    shape, pipe = (4, 1, 8, 6, 4), 4
    for seed in range(8):
        meter = RandomMeter(chain(12), shape, seed, LOOPBACK)
        request = Request(
            shape, pipe, None, "fp32", False, data=1, space=(), pipe=pipe, micro_batches=4, schedule=schedule
        )
        search = Search(meter, request)
        (option,) = options(request)
        limit = round(1.05 * min(cut.peak_bytes for cut in every_cut(search, option)))
        found = best_cut(search.costs(option, "never"), schedule, pipe, limit, meter.links.in_pipeline(pipe))
        assert found is not None
        assert found.peak_bytes <= limit


def test_options_that_cannot_win_are_not_played_through() -> None:
    shape = (8, 1, 16, 16, 16)
    request = Request(shape, 8, None, "fp32", False)
    all_of_them = Search(RandomMeter(chain(8), shape, 0), request, kept=1000).answer()
    some = Search(RandomMeter(chain(8), shape, 0), request, kept=1).answer()
    assert len(some.found) == len(all_of_them.found)
    assert some.best is not None
    assert all_of_them.best is not None
    assert some.best.seconds == all_of_them.best.seconds
    skipped = [found for found in some.found if "cannot be faster" in found.why]
    assert skipped
    assert all(found.bound > some.best.seconds for found in skipped)


def test_never_worse_than_torchgpipes_blocks() -> None:
    """torchgpipe 0.0.7 balances by block partitions, which minimise the difference between blocks."""
    draw = random.Random(0)
    better = 0
    for _ in range(2000):
        costs = [draw.choice((1, 1, 10, 100)) * draw.random() for _ in range(draw.randint(4, 40))]
        stages = draw.randint(2, min(8, len(costs)))
        theirs = max(map(sum, blockpartition.solve(costs, stages)))
        sums = torch.tensor([0.0, *itertools.accumulate(costs)], dtype=torch.float64).numpy()
        starts = minimise_largest(sums[None, :] - sums[:, None], [pairs(len(costs))] * stages)
        assert starts is not None
        ours = max(sum(costs[i:j]) for i, j in itertools.pairwise([*starts, len(costs)]))
        assert ours <= theirs * (1 + 1e-12)
        better += ours < theirs * 0.999
    assert better > 200


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("make", [lambda: UNet(1, 3, filters=2), lambda: SEUNet(1, 2, filters=4, norm="batch")])
def test_what_a_network_does_is_found_without_allocating_it(make, precision: str) -> None:  # type: ignore[no-untyped-def]
    shape = (1, 1, 32, 16, 16)
    with torch.device("meta"):
        hollow = make()
    assert all(parameter.is_meta for parameter in hollow.parameters())
    settings = {"precision": precision, "channels_last": False}
    of_hollow = account(trace(hollow, shape), shape, **settings)
    of_real = account(trace(make(), shape), shape, **settings)
    assert of_hollow == of_real
    volumes = [cell for cell in of_real.cells if cell.halos]
    assert len(volumes) == sum(
        isinstance(module, nn.Conv3d) and module.kernel_size != (1, 1, 1) for module in hollow.modules()
    )


def test_arithmetic_is_counted_as_it_is() -> None:
    network = nn.Conv3d(3, 5, 3, padding=1)
    (cell,) = account(trace(network, (2, 3, 8, 8, 8)), (2, 3, 8, 8, 8), precision="fp32", channels_last=False).cells
    forward = 2 * (2 * 8**3) * 3 * 5 * 27
    assert sum(operation.flops for operation in cell.forward) == forward
    assert sum(operation.flops for operation in cell.backward) == forward  # of the weight: the input has no gradient
    assert cell.halos[0].bytes == tuple(2 * 3 * 8 * 8 * 4 for _ in range(3))
    assert cell.extents == (8, 8, 8)


@pytest.mark.parametrize("layer", [nn.Conv3d, nn.ConvTranspose3d])
def test_groups_of_channels_save_arithmetic_backward_too(layer: type[nn.Conv3d] | type[nn.ConvTranspose3d]) -> None:
    network = nn.Sequential(nn.Conv3d(1, 8, 1), layer(8, 8, 2, 2, groups=4))
    *_, cell = account(trace(network, (1, 1, 8, 8, 8)), (1, 1, 8, 8, 8), precision="fp32", channels_last=False).cells
    forward = sum(operation.flops for operation in cell.forward)
    assert forward == 2 * (4**3 if layer is nn.Conv3d else 8**3) * 8 * 8 * 8 // 4
    assert sum(operation.flops for operation in cell.backward) == 2 * forward


def test_every_description_of_hardware_can_be_planned_for_and_names_its_sources() -> None:
    assert {"v100-16g", "v100-32g", "a100-40g", "a100-80g", "h100-80g", "rtx3090", "rtx4090"} <= set(known_hardware())
    with torch.device("meta"):
        network = UNet(1, 3, filters=8)
    for name in known_hardware():
        hardware = load_hardware(name)
        assert all(source.strip() for source in hardware.sources.values())
        assert load_link(hardware.link).source
        plan = make_plan(network, (2, 1, 64, 64, 64), 2, hardware=name, precision="auto")
        assert 0 < plan.step_seconds < 10
        assert max(device.peak_bytes for device in plan.per_device) <= hardware.usable_bytes


def test_the_precision_is_searched() -> None:
    """The faster one, unless it does not fit; of two that take as long, the more exact one."""
    with torch.device("meta"):
        network = UNet(1, 3, filters=64)
    shape = (1, 1, 128, 128, 128)
    as_fast = A100.model_copy(update={"peak_tflops": {"fp32": 156, "bf16": 156}, "host_seconds": 0.0})
    slow_host = A100.model_copy(update={"host_seconds": 1e-1})  # bf16 has more operations
    for hardware, memory, wanted, other in (
        (A100, None, "bf16", None),  # far faster: fp32 is not looked at
        (as_fast, "40GB", "fp32", "bf16"),
        (as_fast, "8GB", "bf16", "fp32"),  # fp32 would compute much again
        (as_fast, "5GB", "bf16", None),  # which does not fit in fp32 even so
        (slow_host, None, "fp32", None),
    ):
        found = find_plans(network, shape, 1, hardware=hardware, precision="auto", memory=memory)
        assert found.plan.precision == wanted
        assert [plan.precision for plan in found.others] == ([] if other is None else [other])
    for precision in ("fp32", "bf16"):
        assert find_plans(network, shape, 1, hardware=as_fast, precision=precision).plan.precision == precision


def test_workers_that_share_a_gpu_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workers_per_gpu() == 1
    monkeypatch.setenv("LAMP3D_WORKERS_PER_GPU", "3")
    assert workers_per_gpu() == 3
    for text in ("0", "two", "-1", ""):
        monkeypatch.setenv("LAMP3D_WORKERS_PER_GPU", text)
        with pytest.raises(ConfigError, match="number of workers that share a GPU"):
            workers_per_gpu()


def test_unknown_hardware_and_links_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no device 'b9000'; there are a100-40g"):
        load_hardware("b9000")
    with pytest.raises(ConfigError, match="no link 'string'; there are nvlink2"):
        load_link("string")
    path = tmp_path / "mine.yaml"
    path.write_text("titel: mine\nmemory: much\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml does not describe a hardware: device_type is missing") as caught:
        load_hardware(str(path))
    assert "; memory: 'much' is not an amount of memory; write it like 16GB" in str(caught.value)
    assert str(caught.value).endswith("; unknown key 'titel'; did you mean 'title'?")
    path.write_text("[1, 2")
    with pytest.raises(ConfigError, match=r"mine\.yaml is not valid YAML: line 1, column 6"):
        load_hardware(str(path))


def test_hardware_without_fp32_or_with_half_its_figures_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    described = A100.model_dump(mode="json") | {"sustained": {"fp32": 0.5}}
    own.write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(ConfigError, match="peak_tflops and sustained want the same precisions, fp32 among them"):
        load_hardware(str(own))


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({"launch_seconds": -1.0}, "launch_seconds: .*greater than or equal to 0"),
        ({"host_seconds": -1.0}, "host_seconds: .*greater than or equal to 0"),
        ({"sustained": {"fp32": 35, "bf16": 35}}, "sustained.fp32: .*less than or equal to 1"),
        ({"bandwidth_sustained": 80}, "bandwidth_sustained: .*less than or equal to 1"),
        ({"reserved": -1}, "reserved: .*greater than or equal to 0"),
        ({"memory": "100MB"}, "memory is 100000000 bytes, and must be more than what is reserved: 800000000"),
    ],
)
def test_hardware_with_figures_that_no_device_has_is_refused(
    figures: dict[str, object], says: str, tmp_path: Path
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(json.dumps(A100.model_dump(mode="json") | figures))
    with pytest.raises(ConfigError, match=says):
        load_hardware(str(own))


def test_a_users_own_hardware(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "title: mine\ndevice_type: cuda\nmemory: 4GiB\npeak_tflops: {fp32: 10}\nsustained: {fp32: 0.5}\n"
        "bandwidth_gbs: 500\nlink: pcie3\nsources: {all: a guess}\n"
    )
    assert load_hardware(str(path)).memory == 4 * 2**30
    plan = make_plan(UNet(1, 2, filters=4), (1, 1, 32, 32, 32), 1, hardware=str(path))
    assert plan.memory_limit_bytes == load_hardware(str(path)).usable_bytes


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_tight_memory_is_met_by_recomputing_little(devices: int) -> None:
    """Less memory never makes a plan faster, and every plan keeps to it."""
    shape = (1, 1, 64, 64, 64)
    with torch.device("meta"):
        network = UNet(1, 4, filters=8)

    def plan(limit: int | None = None) -> Plan:
        return make_plan(network, shape, devices, hardware="rtx3090", memory=limit, pipe=1, data=1)

    def peak(of: Plan) -> int:
        return max(device.peak_bytes for device in of.per_device)

    roomy = plan()
    assert roomy.recompute == "never"
    before, limit, blocks = roomy, peak(roomy), set()
    for share in (0.95, 0.9, 0.85):
        limit = round(share * peak(roomy))
        tight = plan(limit)
        assert peak(tight) <= limit
        assert tight.recompute != "never"
        assert tight.step_seconds >= before.step_seconds
        blocks.add(tight.recompute)
        before = tight
    assert len(blocks) > 1  # how much is recomputed depends on what is needed
    assert before.step_seconds < 1.6 * roomy.step_seconds


def test_more_devices_are_chosen_as_the_case_demands() -> None:
    """Many cases: replicas. One volume: slabs. What fits no device alone: not replicas."""
    with torch.device("meta"):
        network = UNet(1, 4, filters=16)
    many = make_plan(network, (8, 1, 64, 64, 64), 4, hardware="a100-80g")
    one = make_plan(network, (1, 1, 128, 128, 128), 4, hardware="a100-80g")
    assert many.data == 4
    assert one.slabs == 4
    large = make_plan(network, (4, 1, 128, 128, 128), 4, hardware="a100-80g", memory="2.2GB", recompute="never")
    assert large.data < 4
    assert max(device.peak_bytes for device in large.per_device) <= 2.2e9


@pytest.mark.parametrize("net", [UNet, SEUNet])
@pytest.mark.parametrize(("seconds", "gathers"), [(1e-6, False), (3e-3, True)])
def test_levels_are_gathered_where_messages_take_longer_than_they(
    net: type[UNet] | type[SEUNet], seconds: float, gathers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = load_link("nvlink4").model_copy(update={"seconds": seconds})
    monkeypatch.setattr("lamp3d.plan.planner.load_link", lambda _: slow)
    with torch.device("meta"):
        network = net(1, 4, filters=16)
    alone = load_hardware("v100-16g").model_copy(update=AT_ONCE)

    def plan(least: int | None) -> Plan:
        return make_plan(network, (1, 1, 96, 96, 96), 2, space=2, hardware=alone, least_planes=least)

    best = plan(None)
    assert (best.least_planes > 1) == gathers
    # 3, 6 and 12 planes a slab at the three coarsest levels
    assert best.step_seconds <= min(plan(least).step_seconds for least in (1, 4, 7, 13))
    assert not any("encoder1.conv" in cell for cell in best.gathered)


def test_what_a_gate_exchanges_counts() -> None:
    """Squeeze and excitation: a mean over all slabs forward, its gradient back, for every one of nine gates."""
    with torch.device("meta"):
        network = SEUNet(1, 4, filters=8)

    def seconds(link: str) -> float:
        return make_plan(
            network, (1, 1, 96, 96, 96), 2, space=2, hardware="v100-16g", least_planes=1, link=link
        ).step_seconds

    gates = sum(1 for name, _ in network.named_modules() if name.endswith("squeeze"))
    norms = sum(1 for module in network.modules() if isinstance(module, nn.InstanceNorm3d))
    latency = load_link("network400").seconds - load_link("nvlink4").seconds
    assert gates == 9
    waits = (seconds("network400") - seconds("nvlink4")) / (2 * (gates + norms) * latency)
    assert 1 <= waits < 1.1  # borders, behind their convolutions, add next to nothing


def test_what_a_gate_scales_is_shared() -> None:
    """A gate is a single voxel, which every rank has; the volume that it scales is cut like any other."""
    shape, whole, slabs = (1, 1, 96, 96, 96), Slabs(), Slabs((2,), (2,))
    with torch.device("meta"):
        meter = ModelMeter(SEUNet(1, 4, filters=8), shape, 1, A100.model_copy(update=AT_ONCE), NVLINK)
    of_whole, of_slab = (meter.profile(cut, "fp32", False, False) for cut in (whole, slabs))
    scaled = 0
    for before, after in zip(of_whole.cells, of_slab.cells, strict=True):
        waits = 2 * 1e-5 if "squeeze" in before.name else 0.0  # until the mean, and its gradient, have come
        if "mul" in before.name or "squeeze" in before.name:
            assert after.seconds == pytest.approx(before.seconds / 2 + waits, rel=0.01), before.name
            assert after.exchanged_bytes < 10_000
            scaled += 1
    assert scaled == 2 * 9


def test_the_table_says_why_the_others_lost() -> None:
    found = find_plans(UNet(1, 3, filters=4), (4, 1, 32, 32, 32), 4, hardware="v100-16g")
    console = Console(width=160, record=True)
    console.print(found.alternatives())
    text = console.export_text()
    assert "chosen" in text
    assert "slower" in text
    assert "No plan can take less than" in text
    assert found.gap >= 0
    assert found.bound_seconds <= found.plan.step_seconds


def test_what_does_not_fit_described_hardware_says_what_would() -> None:
    with torch.device("meta"):
        network = UNet(1, 10, filters=32)
    small = Hardware.model_validate(A100.model_dump() | {"memory": "3GiB"})
    shape = (1, 1, 192, 192, 192)
    with pytest.raises(PlanError) as caught:
        find_plans(network, shape, 1, hardware=small)
    message = str(caught.value)
    assert "does not fit 1 device of" in message
    count = int(message.split(" devices of")[0].split()[-1])
    assert find_plans(network, shape, count, hardware=small).plan.devices == count
    sides = tuple(map(int, message.split("volumes of ")[1].rstrip(".").split("×")))
    assert find_plans(network, (1, 1, *sides), 1, hardware=small).plan.devices == 1


def test_no_volume_is_suggested_that_the_network_does_not_take() -> None:
    class Odd(nn.Module):
        """Wants sides that are 1 more than a multiple of 2."""

        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv3d(1, 8, 3, 2, 1), nn.ConvTranspose3d(8, 8, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x)) + x

    with pytest.raises(PlanError, match=r"does not fit 1 device of 50 MB with 1×1×97×97×97") as caught:
        find_plans(Odd(), (1, 1, 97, 97, 97), 1, hardware="rtx3090", memory="50MB", recompute="never")
    assert "volumes of" not in str(caught.value)


def test_only_what_a_device_computes_is_an_operation() -> None:
    network = nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.InstanceNorm3d(3, affine=True), nn.LeakyReLU())
    shape = (1, 2, 8, 8, 8)
    graph = trace(network, shape)
    convolution, *_ = account(graph, shape, precision="fp32", channels_last=False).cells
    (forward,), (backward,) = convolution.forward, convolution.backward
    assert forward.channels == 3
    assert forward.flops == 2 * 27 * 2 * 3 * 512
    assert backward.channels == 3  # the image wants no gradient
    here, there = (
        sum(
            len(cell.forward)
            for cell in account(graph, shape, precision="fp32", channels_last=False, own_kernels=own).cells
        )
        for own in (True, False)
    )
    assert here == 3
    assert there > here  # torch's own instance norm is a batch norm of repeated parameters


@pytest.mark.parametrize("own_kernels", [True, False])
def test_accounts_of_a_gpu_lower_what_its_autocast_lowers(own_kernels: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), arithmetic(torch.device("cpu"), "bf16", own_kernels=own_kernels):
        low = torch.ones(1, 2, 4, 4, 4, dtype=torch.bfloat16)
        pooled = [pool(low).dtype for pool in (nn.MaxPool3d(2), nn.AvgPool3d(2), nn.AdaptiveAvgPool3d(1))]
        normed = [norm(low).dtype for norm in (nn.GroupNorm(1, 2), nn.LayerNorm(4), nn.Softmax(1))]
    assert set(pooled) == {torch.float32 if own_kernels else torch.bfloat16}
    assert set(normed) == {torch.bfloat16 if own_kernels else torch.float32}


def test_narrow_convolutions_and_small_ones_take_longer_than_their_arithmetic() -> None:
    device = A100.model_copy(update={"full_channels": 64})
    wide, narrow = (device.seconds(1e12, 0, "bf16", channels) - device.launch_seconds for channels in (128, 16))
    assert narrow == pytest.approx(4 * wide)
    work = account(
        trace(UNet(1, 2, filters=2), (1, 1, 32, 32, 32)), (1, 1, 32, 32, 32), precision="fp32", channels_last=False
    )
    issued = sum(len(cell.forward) + len(cell.backward) for cell in work.cells)
    assert model_cells(work, device, "fp32").seconds == pytest.approx(issued * device.host_seconds)


def test_what_waits_for_the_host_is_no_faster_in_slabs() -> None:
    with torch.device("meta"):
        meter = ModelMeter(UNet(1, 4, filters=8), (1, 1, 32, 32, 32), 1, A100, NVLINK)
    of_whole, of_slab = (meter.profile(cut, "fp32", False, False) for cut in (Slabs(), Slabs((2,), (2,))))
    assert of_slab.seconds >= of_whole.seconds > 0.9 * len(of_whole.cells) * A100.host_seconds


def test_small_cases_take_less_together_than_one_by_one_on_described_hardware() -> None:
    """A small case keeps a GPU waiting for the host; several at once do not."""
    with torch.device("meta"):
        network = UNet(1, 3, filters=16)
    one, many = (make_plan(network, (cases, 1, 64, 64, 64), hardware="h100-80g", precision="bf16") for cases in (1, 8))
    assert many.micro_batches == 1
    assert one.step_seconds < many.step_seconds < 3 * one.step_seconds
    large = [make_plan(network, (cases, 1, 160, 160, 160), hardware="h100-80g") for cases in (1, 4)]
    assert 3 * large[0].step_seconds < large[1].step_seconds < 4 * large[0].step_seconds


def test_a_modelled_profile_grows_with_the_volume() -> None:
    network = UNet(1, 2, filters=4)
    seconds = []
    for side in (32, 64, 128):
        meter = ModelMeter(network, (1, 1, side, side, side), 1, A100, NVLINK)
        seconds.append(meter.profile(Slabs(), "fp32", False, False).seconds)
    assert seconds == sorted(seconds)
    assert math.isfinite(seconds[-1])
    assert profile_cells(trace(network, (1, 1, 32, 32, 32)), (1, 1, 32, 32, 32), precision="fp32", channels_last=False)


def test_where_not_all_cuts_are_tried_good_ones_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dynamic program, improved cell by cell, against every cut; the cells differ wildly."""
    ratios = []
    for seed in range(40):
        draw = random.Random(seed)
        shape = (4, 1, 8, 6, 4)
        meter = RandomMeter(chain(10), shape, seed)
        request = Request(shape, draw.choice((2, 3)), None, "fp32", False, data=1, space=(), recompute="never")
        search = Search(meter, request)
        option = draw.choice(list(options(request)))
        expected = min(cut.line.seconds for cut in every_cut(search, option))
        monkeypatch.setattr("lamp3d.plan.cut.FEW", 0)
        found = best_cut(
            search.costs(option, "never"), option.schedule, option.pipe, None, NVLINK.in_pipeline(option.pipe)
        )
        assert found is not None
        ratios.append(found.line.seconds / expected)
    assert min(ratios) >= 1 - 1e-12
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= 28, ratios
    assert sorted(ratios)[-3] < 1.1
    assert max(ratios) < 1.3


def test_an_interleaved_networks_stages_are_about_equally_long() -> None:
    """To improve the cut whose longest stage is shortest, and it alone, leaves a step that takes a tenth longer."""
    devices = 4
    with torch.device("meta"):
        network = UNet(1, 8, filters=64)
    meter = ModelMeter(network, (1, 1, 128, 128, 128), 1, A100, NVLINK)
    costs = StageCosts(meter.graph, meter.profile(Slabs(), "bf16", True, False), 8, "never")
    links = NVLINK.in_pipeline(devices)
    stages, n = 2 * devices, len(costs.graph.cells)
    done = list(itertools.accumulate((cell.seconds for cell in costs.profile.cells), initial=0.0))
    even = [min(range(n), key=lambda cell: abs(done[cell] - done[-1] * s / stages)) for s in range(stages)]
    found = best_cut(costs, "interleaved", devices, None, links)
    assert found is not None
    assert found.line.seconds <= Cut(costs, "interleaved", devices, links, even).line.seconds


def test_timings_are_kept_and_measured_again_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMP3D_CACHE", str(tmp_path))
    made: list[int] = []

    def measure() -> Timing:
        made.append(1)
        return Timing((CellSeconds(1.0, 2.0, 0.5), CellSeconds(0.25, 0.125)), 0.03)

    first = remembered({"shape": (1, 2)}, measure)
    assert remembered({"shape": (1, 2)}, measure) == first
    assert len(made) == 1
    remembered({"shape": (1, 3)}, measure)
    assert len(made) == 2
    remembered({"shape": (1, 2)}, measure, fresh=True)
    assert len(made) == 3
    for path in tmp_path.rglob("*.json"):
        path.write_text("{")
    assert remembered({"shape": (1, 2)}, measure) == first
    assert len(made) == 4
    monkeypatch.setenv("LAMP3D_CACHE", "/dev/null/nowhere")  # a home that cannot be written to
    assert remembered({"shape": (1, 2)}, measure) == first


def test_a_slow_loss_counts_and_moves_the_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMP3D_CACHE", str(tmp_path))
    network, shape, seen = chain(8), (2, 1, 8, 8, 8), []

    def slow(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.shape)
        time.sleep(0.2)  # cells take milliseconds
        return logits.sum()

    settings = {"pipe": 2, "schedule": "1f1b", "micro_batches": 2, "recompute": "never", "repeats": 1}
    without, counted = (make_plan(network, shape, 2, loss=loss, **settings) for loss in (None, slow))
    assert counted.step_seconds > without.step_seconds + 0.3  # of two micro-batches, one after the other
    assert counted.stages[-1].cells == ("7",)
    assert counted.stages[-1].backward_seconds > 0.2
    assert set(seen) == {(1, 2, 8, 8, 8)}

    of_slab = []
    for loss in (None, slow):  # cells are timed once, and then remembered
        meter = MeasuringMeter(network, (1, 1, 8, 8, 8), 1, NVLINK, workers=2, loss=loss, repeats=1)
        of_slab.append(meter.profile(Slabs((2,), (2,)), "fp32", False, False).cells[-1].backward_seconds)
    assert of_slab[1] - of_slab[0] == pytest.approx(meter.loss_cost("fp32", False).seconds / 2)


def test_of_a_large_volume_a_part_of_the_loss_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamp3d.plan.timing.LOSS_VOXELS", 128)
    seen = []

    def slow(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.shape)
        time.sleep(0.01)
        return logits.sum()

    graph = trace(chain(2), (3, 1, 8, 8, 8))
    work = account(graph, (3, 1, 8, 8, 8), precision="fp32", channels_last=True)
    cost = time_loss(slow, graph, work.values, torch.device("cpu"), repeats=1)
    assert set(seen) == {(1, 2, 2, 8, 8)}
    assert cost.extra_bytes < 200  # a few numbers
    assert cost.seconds >= 0.12  # three volumes of four such parts


def test_what_a_loss_has_alive_counts() -> None:
    shape = (4, 1, 8, 8, 8)
    logits = 4 * 2 * 8**3

    def careless(output: torch.Tensor) -> torch.Tensor:
        return (output * 2 * 3).exp().sum()

    settings = {"pipe": 2, "micro_batches": 4, "recompute": "never", "repeats": 1}
    costs = {}
    for declared in (False, True):
        loss = mean_over_cases(careless) if declared else careless
        meter = MeasuringMeter(chain(8), shape, 1, NVLINK, workers=2, loss=loss, repeats=1)
        request = Request(shape, 2, None, "fp32", False, by_case=declared)
        option = Option(1, Slabs(), 2, 4, "gpipe")
        costs[declared] = Search(meter, request).costs(option, "never")
        assert 0 < costs[declared].profile.loss_bytes <= 4 * logits
    assert costs[False].loss_bytes() == 8 * logits
    assert costs[True].loss_bytes() == logits
    assert costs[True].backward_bytes(7, 8) >= costs[True].profile.loss_bytes
    plans = [
        make_plan(chain(8), shape, 2, schedule="gpipe", loss=loss, **settings) for loss in (lambda x: x.sum(), careless)
    ]
    assert plans[1].peak_bytes < plans[0].peak_bytes


def test_a_volume_that_takes_long_is_timed_on_a_smaller_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMP3D_CACHE", str(tmp_path))
    # Two threads, beside other tests, wait for each other.
    monkeypatch.setattr("lamp3d.plan.measure.worker_threads", lambda _: 1)
    network, shape = UNet(1, 2, filters=2), (1, 1, 64, 64, 64)
    meter = MeasuringMeter(network, shape, 1, NVLINK, workers=1, repeats=1)
    real = meter.profile(Slabs(), "fp32", False, False)
    monkeypatch.setattr("lamp3d.plan.measure.BUDGET_SECONDS", 0.0)
    scaled = MeasuringMeter(network, shape, 1, NVLINK, workers=1, repeats=1).profile(Slabs(), "fp32", False, False)
    assert scaled.value_bytes == real.value_bytes
    assert [cell.internal_bytes for cell in scaled.cells] == [cell.internal_bytes for cell in real.cells]
    assert 0.1 * real.seconds < scaled.seconds < 10 * real.seconds  # of small volumes overheads are most
    shapes = [json.loads(path.read_text())["key"]["shape"] for path in tmp_path.rglob("*.json")]
    assert sorted(shapes)[0] == [1, 1, 32, 32, 32]


def test_several_cases_at_once_are_timed_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMP3D_CACHE", str(tmp_path))
    meter = MeasuringMeter(UNet(1, 2, filters=2), (8, 1, 32, 32, 32), 1, NVLINK, workers=1, repeats=1)

    def together(shape: tuple[int, ...], *_: object) -> Timing:
        cases = shape[0]  # no faster in pairs, and half as long for each of four
        seconds = cases if cases < 4 else cases / 2
        return Timing(tuple(CellSeconds(seconds, seconds) for _ in meter.graph.cells))

    monkeypatch.setattr(meter, "_time", together)
    monkeypatch.setattr("lamp3d.plan.measure.CASES_SECONDS", math.inf)

    def share(cases: int, slabs: Slabs = Slabs()) -> float:  # noqa: B008 (frozen)
        how = slabs, "fp32", False, False
        return meter.timing(*how, meter.timed_cases(*how, cases)).cells[0].forward

    assert {n: share(n) for n in (1, 2, 4, 8)} == {1: 1, 2: 1, 4: 0.5, 8: 0.5}
    alone = meter.timing(Slabs(), "fp32", False, False, 1).seconds
    monkeypatch.setattr("lamp3d.plan.measure.CASES_SECONDS", 4 * 2 * alone)  # four cases can be timed, after a warm-up
    assert share(8) == 0.5
    monkeypatch.setattr("lamp3d.plan.measure.CASES_SECONDS", 2 * 2 * alone)
    assert share(8) == 1
    assert share(4, Slabs((2,), (2,))) == share(1)


def test_no_two_of_many_devices_have_one_colour_and_no_legend_lies_over_the_cells() -> None:
    figure = cells_picture(find_plans(UNet(1, 3, filters=1), (12, 1, 32, 32, 32), 12, hardware="v100-16g", pipe=12))
    cells = figure.axes[0]
    boxes = [patch for patch in cells.patches if isinstance(patch, Rectangle)]
    assert len({box.get_facecolor() for box in boxes}) == 12
    figure.draw_without_rendering()
    legend = cells.get_legend()
    assert legend is not None
    assert legend.get_window_extent().y1 <= cells.get_window_extent().y0


def test_the_picture_shows_every_cell_and_what_passes_between_devices() -> None:
    found = find_plans(
        UNet(1, 3, filters=4), (4, 1, 32, 32, 32), 2, hardware="v100-16g", pipe=2, schedule="folded", micro_batches=4
    )
    figure = cells_picture(found)
    cells, line = figure.axes
    boxes = [patch for patch in cells.patches if isinstance(patch, Rectangle)]
    assert len(boxes) == sum(len(stage.cells) for stage in found.plan.stages)
    assert len({box.get_facecolor() for box in boxes}) == 2
    assert sum(box.get_width() for box in boxes) == pytest.approx(cells.get_xlim()[1])
    assert [patch for patch in cells.patches if isinstance(patch, Arc)]
    assert len(line.patches) == 4 * 2 * len(found.plan.stages)
    names = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert names == ["forward of micro-batch", "backward"]
    ticks = cells.get_yticks()
    assert len(ticks) > 2
    assert max(box.get_height() for box in boxes) >= max(ticks) * 0.9
