"""Plans: made from measurements, optimal under a memory limit, readable, and honest about what does not fit."""

import copy
import itertools
import json
import math
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from lamp3d.errors import ConfigError, PlanError
from lamp3d.graph import Stage, arithmetic, trace
from lamp3d.nets import UNet
from lamp3d.plan import Plan, format_bytes, make_plan, parse_bytes
from lamp3d.plan.costs import StageCosts
from lamp3d.plan.profile import Profile
from lamp3d.plan.timing import profile_cells
from tests.networks import Aged, Branches, Counting, InPlace, conv
from tests.plans import plan_at

SMALL = (4, 1, 4, 5, 6)
SHAPE = (4, 1, 16, 16, 32)


def plan(network: nn.Module, shape: tuple[int, ...] = SMALL, devices: int = 2, **settings: object) -> Plan:
    """A straight pipeline, if nothing else is asked for."""
    fixed = {"repeats": 1, "channels_last": False, "schedule": "gpipe", "data": 1, "space": 1}
    return make_plan(network, shape, devices, **fixed | settings)  # type: ignore[arg-type]


def peak(plan: Plan) -> int:
    return max(device.peak_bytes for device in plan.per_device)


@pytest.fixture(scope="module")
def u_net_plan() -> Plan:
    return plan(UNet(1, 3, filters=2), SHAPE, 3, micro_batches=2, memory="1GB")


def test_a_plan_covers_all_cells_in_order(u_net_plan: Plan) -> None:
    network = UNet(1, 3, filters=2)
    names = [cell.name for cell in trace(network, SHAPE).cells]
    assert [name for stage in u_net_plan.stages for name in stage.cells] == names
    assert u_net_plan.starts == [stage.first_cell for stage in u_net_plan.stages]
    for rank, stage in enumerate(u_net_plan.stages):
        assert stage.rank == rank
        assert len(stage.cells) == stage.last_cell - stage.first_cell + 1
        assert min(stage.forward_seconds, stage.backward_seconds, stage.sent_bytes) > 0
    assert all(0 < device.saved_bytes < device.peak_bytes <= 1_000_000_000 for device in u_net_plan.per_device)
    assert sum(stage.parameter_bytes for stage in u_net_plan.stages) == 4 * sum(p.numel() for p in network.parameters())
    slowest = max(stage.forward_seconds + stage.backward_seconds for stage in u_net_plan.stages)
    assert 2 * slowest <= u_net_plan.step_seconds
    assert 0 < u_net_plan.bubble < 1
    assert (u_net_plan.devices, u_net_plan.micro_batches, u_net_plan.recompute) == (3, 2, "never")
    assert u_net_plan.memory_limit_bytes == 1_000_000_000


def test_a_plan_is_frozen_and_comes_back_from_json(u_net_plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        u_net_plan.devices = 4
    path = tmp_path / "plan.json"
    u_net_plan.save(path)
    assert Plan.load(path) == u_net_plan
    assert list(tmp_path.iterdir()) == [path]  # nothing temporary is left
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"speed": "high"}))
    with pytest.raises(
        PlanError, match=r"plan\.json is not a plan .* \(speed: Extra inputs are not permitted\); make it anew"
    ):
        Plan.load(path)
    path.write_text("{")
    with pytest.raises(PlanError, match=r"is not a plan .* \(Invalid JSON.*--resume plans anew\.$"):
        Plan.load(path)
    with pytest.raises(PlanError, match=r"no plan at .*absent\.json; make one with"):
        Plan.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("edited", "says"),
    [
        ({"devices": 3}, r"devices is 3, and must be data × space × the stages' ranks: 1 × 1 × 2\)"),
        ({"data": 2}, "devices is 2, .*: 2 × 1 × 2"),
        ({"data": 0}, "data has 0, and must be 1 or more"),
        ({"micro_batches": -1}, "micro_batches has -1"),
        ({"space": [0], "space_dims": [2]}, "space has 0"),
        ({"space": [2], "devices": 4}, r"space is \(2,\) and space_dims \(\): they want an entry an axis"),
        ({"space": [2], "space_dims": [1], "devices": 4}, "2, 3 or 4, each at most once"),
        ({"space": [2, 2], "space_dims": [2, 2], "devices": 8}, "2, 3 or 4, each at most once"),
        ({"stages": []}, r"ranks are \(\)"),
        ({"per_device": []}, "per_device has 0 entries for 2 ranks"),
        ({"stages.1.rank": -1}, r"ranks are \(0, -1\), and must be one or more, from 0 on"),
        ({"stages.1.rank": 0}, "devices is 2, .*: 1 × 1 × 1"),
        ({"stages.1.first_cell": 0}, "stages.1 has cells 0 to .* this one begins at 1"),
        ({"stages.0.cells": []}, "stages.0 has cells 0 to .* and names 0"),
        ({"stages.0.forward_seconds": -1.0}, "stages.0.forward_seconds: .* greater than or equal to 0"),
        ({"per_device.0.peak_bytes": -1}, "per_device.0.peak_bytes: .* greater than or equal to 0"),
        ({"schedule": "fastest"}, "schedule: there is no schedule 'fastest'"),
    ],
)
def test_a_plan_that_was_edited_by_hand_is_told_what_does_not_hang_together(
    edited: dict[str, Any], says: str, tmp_path: Path
) -> None:
    content = plan_at(nn.Identity(), SMALL, [0, 1], names=["a", "b", "c"]).model_dump(mode="json")
    for key, value in edited.items():
        *path, last = (int(part) if part.isdigit() else part for part in key.split("."))
        place: Any = content
        for part in path:
            place = place[part]
        place[last] = value
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=f"is not a plan that this version of lamp3d reads \\((?!Value).*{says}"):
        Plan.load(path)


def test_the_table_shows_every_stage(u_net_plan: Plan) -> None:
    console = Console(width=160, record=True)
    console.print(u_net_plan.table())
    text = console.export_text()
    for word in ("UNet", "4×1×16×16×32", "fp32", "gpipe, 2 micro-batches, recompute never", "of 1 GB a device"):
        assert word in text
    for stage in u_net_plan.stages:
        assert f"{stage.first_cell}-{stage.last_cell}  {stage.cells[0].split(' + ')[0]}" in text
        assert format_bytes(u_net_plan.per_device[stage.rank].peak_bytes) in text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("16GB", 16 * 10**9),
        ("15.5 GiB", int(15.5 * 2**30)),
        ("512kB", 512_000),
        ("1.1MB", 1_100_000),
        (" 3 mib ", 3 * 2**20),
        ("7", 7),
        (12345, 12345),
        ("2TB", 2 * 10**12),
    ],
)
def test_amounts_of_memory_are_read(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "0", "3 XB", "1e9", "12 GB of it", "1,5GB"])
def test_other_texts_are_no_amounts_of_memory(text: str) -> None:
    with pytest.raises(ConfigError, match=f"'{re.escape(text)}' is not an amount of memory; write it like 16GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345, "12.3 kB"), (999_600, "1 MB"), (16 * 10**9, "16 GB"),
     (1_234_567_890_123, "1.23 TB"), (5 * 10**15, "5000 TB"), (1e6, "1 MB")],
)  # fmt: skip
def test_bytes_are_written_for_people(count: float, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(1, 10**15))
def test_what_is_written_is_read_back_within_half_a_percent_and_rounded_up_on_demand(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.0051)
    assert count <= parse_bytes(format_bytes(count, up=True)) <= 1.011 * count


@pytest.mark.parametrize("make", [Branches, InPlace, Counting])
def test_making_a_plan_leaves_the_network_as_it_is(make: Callable[[], nn.Module]) -> None:
    network = make()
    next(network.parameters()).grad = torch.ones_like(next(network.parameters()))
    next(network.children()).eval()
    gradients = [p.grad if p.grad is None else p.grad.clone() for p in network.parameters()]
    before = copy.deepcopy(network)
    modes = [module.training for module in network.modules()]
    identities = [id(p) for p in network.parameters()]
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    plan(network, micro_batches=1)
    plan(network, devices=1, micro_batches=1, channels_last=None)
    assert [id(p) for p in network.parameters()] == identities
    for (name, new), old in zip(network.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(new, old), name
        assert new.stride() == old.stride(), name
    for parameter, old in zip(network.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (old is None)
        assert old is None or torch.equal(parameter.grad, old)
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def suggestions(error: PlanError) -> tuple[str, list[tuple[int, str]]]:
    """The memory suggested for the devices asked for, and the (devices, memory) pairs suggested besides."""
    message = str(error).split("These would do")[1]
    memory = re.search(r"([0-9.]+ \w?B) a device on", message)
    more = re.findall(r"([0-9]+) devices of ([0-9.]+ \w?B)", message)
    assert memory, message
    return memory[1], [(int(devices), amount) for devices, amount in more]


@pytest.mark.parametrize("recompute", [None, "never", "always"])
@pytest.mark.parametrize("devices", [1, 2])
def test_what_the_message_suggests_does_fit(recompute: str | None, devices: int) -> None:
    layers = itertools.chain(*((conv(1 if i == 0 else 4, 4), nn.Tanh()) for i in range(6)))
    network = nn.Sequential(*layers, conv(4, 1))  # whose one output leaves the loss little to hold
    roomy = plan(network, SHAPE, devices, recompute=recompute or "always")
    limit, error = peak(roomy), None
    while error is None:
        limit = limit * 2 // 3
        try:
            plan(network, SHAPE, devices, memory=limit, recompute=recompute)
        except PlanError as found:
            error = found
    assert "does not fit" in str(error)
    memory, more = suggestions(error)
    fitted = plan(network, SHAPE, devices, memory=memory, recompute=recompute)
    assert peak(fitted) <= parse_bytes(memory)
    for count, _ in more:
        assert count > devices
        assert plan(network, SHAPE, count, memory=limit, recompute=recompute).devices == count
    if devices == 1 and recompute == "never":
        assert more, "the network's cells are of equal size, so more devices must help"
    if "recompute left to the planner" in str(error):
        assert recompute is not None
        assert plan(network, SHAPE, devices, memory=limit).recompute != recompute
    if batch := re.search(r"a batch of ([0-9]+)", str(error)):
        plan(network, (int(batch[1]), *SHAPE[1:]), devices, memory=limit, recompute=recompute)
    if "precision bf16" in str(error):
        plan(network, SHAPE, devices, memory=limit, recompute=recompute, precision="bf16")
    if sides := re.search(r"volumes of ([0-9]+)×([0-9]+)×([0-9]+)", str(error)):
        plan(network, (*SHAPE[:2], *map(int, sides.groups())), devices, memory=limit, recompute=recompute)


def test_where_nothing_but_more_memory_helps_nothing_else_is_suggested() -> None:
    network = nn.Sequential(nn.Conv3d(1, 64, 1))
    with pytest.raises(PlanError) as caught:
        plan(network, (1, 1, 4, 4, 4), 1, memory=100)
    message = str(caught.value)
    assert "devices of" not in message
    assert "recompute" not in message.split("These would do")[1]
    assert "batch" not in message


def test_recomputation_is_chosen_only_where_it_is_needed() -> None:
    network = UNet(1, 3, filters=2)
    never = plan(network, SHAPE, micro_batches=4, recompute="never")
    always = plan(network, SHAPE, micro_batches=4, recompute="always")
    least = peak(always)
    most = peak(never)
    assert least < most
    assert plan(network, SHAPE, micro_batches=4).recompute == "never"
    assert plan(network, SHAPE, micro_batches=4, memory=int(1.05 * least)).recompute != "never"
    assert all(stage.backward_seconds > 0 for stage in always.stages)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"devices": 0}, "at least one device, not 0"),
        ({"devices": 999}, "cells cannot be cut into 999 stages"),
        ({"space": 3}, "space 3 of 2 devices"),
        ({"space": (2, 2, 2), "devices": 8}, r"space=\(2, 2, 2\)"),
        ({"space": 99, "devices": 99}, "planes cannot be cut into 99 slabs"),
        ({"devices": 2, "pipe": 3}, "pipe 3 of 2 devices"),
        ({"data": 3, "devices": 3}, "cannot be shared evenly among 3 replicas"),
        ({"micro_batches": -1}, "at least one micro-batch; -1 are not"),
        ({"micro_batches": 0}, "at least one micro-batch; 0 are not"),
    ],
)
def test_impossible_plans_are_refused(settings: dict[str, int], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        plan(InPlace(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("space", "devices", "mesh", "dims"), [(2, 2, (2,), (3,)), ((2, 2), 4, (2, 2), (3, 2)), ((1, 2), 4, (2,), (3,))]
)
def test_volumes_are_cut_along_their_longest_axes(
    space: int | tuple[int, ...], devices: int, mesh: tuple[int, ...], dims: tuple[int, ...]
) -> None:
    network = nn.Sequential(conv(1, 4), nn.Tanh(), conv(4, 4), nn.Tanh(), conv(4, 1))
    found = plan(network, (1, 1, 32, 64, 16), devices, space=space, recompute="never")
    assert (found.space, found.space_dims, found.pipe) == (mesh, dims, devices // found.slabs)
    whole = plan(network, (1, 1, 32, 64, 16), found.pipe, recompute="never")
    assert max(d.saved_bytes for d in found.per_device) < 0.8 * max(d.saved_bytes for d in whole.per_device)


@pytest.mark.parametrize(("batch", "asked", "given"), [(4, 2, 2), (4, 3, 3), (4, 9, 4), (1, 2, 1)])
def test_there_are_no_more_micro_batches_than_images(batch: int, asked: int, given: int) -> None:
    assert plan(InPlace(), (batch, *SMALL[1:]), micro_batches=asked).micro_batches == given


def saved_bytes(stage: Stage, inputs: list[Tensor], also: Collection[str]) -> int:
    """Bytes that a forward keeps for backward, each storage once, parameters not counted; inputs and ``also`` are."""
    parameters = [*stage.parameters_by_name().values(), *stage.buffers_by_name().values()]
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept = {x.untyped_storage().data_ptr(): x for x in inputs}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, arithmetic(torch.device("cpu"), "fp32"):
        outputs = dict(zip(stage.outputs, stage(*inputs), strict=True))
    for name in also:
        if name in outputs:
            pack(outputs[name])
    size = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    assert outputs
    return size


def costs_of(network: nn.Module, shape: tuple[int, ...], recompute: str = "never") -> StageCosts:
    graph = trace(network, shape)
    profile = profile_cells(graph, shape, precision="fp32", channels_last=False, repeats=1)
    return StageCosts(graph, profile, 3, recompute)  # type: ignore[arg-type]


@pytest.mark.parametrize("network", [UNet(1, 3, filters=2), UNet(1, 2, filters=2, norm="group"), InPlace(), Branches()])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_counted_bytes_are_those_that_a_stage_keeps(network: nn.Module, parts: int) -> None:
    shape = (1, *(SHAPE if isinstance(network, UNet) else SMALL)[1:])
    costs = costs_of(network, shape)
    graph, n = costs.graph, len(costs.graph.cells)
    starts = [round(i * n / parts) for i in range(parts)]
    values = {graph.inputs[0]: torch.randn(shape)}  # as received: each a tensor of its own
    for stage, (begin, end) in zip(graph.cut(starts), itertools.pairwise([*starts, n]), strict=True):
        inputs = [values[name].detach().clone().requires_grad_(values[name].requires_grad) for name in stage.inputs]
        measured = saved_bytes(stage, inputs, graph.outputs if end == n else ())  # outputs wait for the loss
        if end == n:  # also those that earlier stages have made, and that no cell here uses
            elsewhere = {name for name in graph.outputs if name not in (*stage.inputs, *stage.outputs)}
            measured += sum(values[name].nbytes for name in elsewhere)
        static = costs.parameter_bytes(begin, end) * 4  # parameters, gradients, two moments
        loss = costs.loss_bytes() if end == n else 0
        values |= dict(zip(stage.outputs, stage(*inputs), strict=True))
        workspace = costs.workspace_bytes[begin, end]
        assert costs.peak(3)[begin, end] == static + 3 * measured + loss + workspace, stage.cells


def test_the_loss_holds_the_mini_batchs_outputs_joined_and_their_gradient() -> None:
    costs = costs_of(UNet(1, 3, filters=2), (1, *SHAPE[1:]))
    logits = 4 * 3 * math.prod(SHAPE[2:])  # fp32, three classes
    assert costs.loss_bytes() == 2 * 3 * logits  # three micro-batches; the outputs themselves are held by the stage
    assert replace(costs, micro_batches=1).loss_bytes() == logits  # nothing to join
    assert replace(costs, loss_at_once=False).loss_bytes() == logits  # a micro-batch at a time


def test_recomputation_keeps_what_was_received_and_one_micro_batch() -> None:
    network = UNet(1, 3, filters=2)
    shape = (1, *SHAPE[1:])
    never, always = costs_of(network, shape), costs_of(network, shape, "always")
    n = len(never.graph.cells)
    begin, end = n // 2, n
    received = sum(never.profile.value_bytes[value] for value in never.received(begin, end))
    static = never.parameter_bytes(begin, end) * 4 + never.loss_bytes()
    static += never.workspace_bytes[begin, end]
    one = (never.peak(3)[begin, end] - static) // 3
    outputs = sum(never.profile.value_bytes[value] for value in never.graph.outputs)
    assert sum(always.held(begin, end).values()) == received + outputs
    # The search's bound: what is brought back may have been counted before it was known to be held.
    bound = static + 3 * (received + outputs) + (one - received - outputs)
    assert bound <= always.peak(3)[begin, end] <= bound + received + outputs
    assert always.forward_seconds(begin, end) < always.backward_seconds(begin, end)


def test_profiling_notes_values_once_however_many_cells_save_them() -> None:
    network = Branches()
    graph = trace(network, SMALL)
    profile = profile_cells(graph, SMALL, precision="fp32", channels_last=False, repeats=1)
    assert isinstance(profile, Profile)
    savers = [cell.name for cell in profile.cells if "act" in cell.saved_values]
    assert len(savers) >= 2  # the activation saves its output, the next convolution its input: the same bytes
    assert profile.value_bytes["act"] == 4 * 4 * 4 * 4 * 5 * 6


def test_what_is_no_volume_is_planned_without_slabs_and_a_volume_is_found_wherever_it_is() -> None:
    flat = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert make_plan(flat, (1, 1, 8, 8), 2, repeats=1).pipe == 2
    with pytest.raises(PlanError, match=r"is cut along one axis or two; space=\(2,\) is not that"):
        make_plan(flat, (2, 1, 8, 8), 2, space=2)
    shapes = {"age": (2, 3), "image": (2, 1, 8, 6, 6)}
    assert make_plan(Aged(), shapes, 2, repeats=1).devices == 2
    shared = make_plan(Aged(), shapes, 2, space=2, repeats=1)
    assert (shared.space_dims, shared.image_shape) == ((2,), (2, 1, 8, 6, 6))


class Deep(nn.Module):
    """Halves a volume six times, and does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv3d(1 if i == 0 else 2, 2, 2, 2) for i in range(6))
        self.up = nn.ModuleList(nn.ConvTranspose3d(2, 2, 2, 2) for _ in range(5))
        self.last = nn.ConvTranspose3d(2, 2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
        for layer, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = layer(x) + skip
        return self.last(x)


def test_a_network_that_does_not_take_a_slabs_size_is_planned_without_slabs(capfd: pytest.CaptureFixture[str]) -> None:
    shape = (1, 1, 192, 64, 64)  # of which a slab would be 96: no multiple of 64
    plan = make_plan(Deep(), shape, 2, repeats=1)
    assert (plan.space, plan.pipe) == ((), 2)
    with pytest.raises(PlanError, match=r"1×1×96×64×64, and Deep does not take that .* attribute `divisor`, now 32"):
        make_plan(Deep(), shape, 2, repeats=1, space=2)
    with pytest.raises(PlanError, match="does not fit 2 devices of 1 MB"):
        make_plan(Deep(), shape, 2, repeats=1, memory="1MB")
    assert capfd.readouterr().err == ""
    knows = Deep()
    knows.divisor = 64  # type: ignore[assignment]
    assert make_plan(knows, shape, 2, repeats=1, space=2).space == (2,)


def test_a_network_that_slabs_refuse_is_planned_without_them() -> None:
    network = nn.Sequential(conv(1, 2), nn.Flatten(1, 2), nn.Unflatten(1, (2, 16)), conv(2, 2))
    shape = (1, 1, 16, 8, 8)
    plan = make_plan(network, shape, 2, repeats=1)
    assert (plan.space, plan.pipe) == ((), 2)
    with pytest.raises(PlanError, match=r"'flatten' on .* cannot be done exactly on a volume that is cut into slabs"):
        make_plan(network, shape, 2, space=2, repeats=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp16"}, "precision is fp32, bf16 or auto, not 'fp16'"),
        ({"recompute": "sometimes"}, "recompute is never, always, or blocks of cells, not 'sometimes'"),
        ({"input_shape": ()}, "an input has at least the batch as its axis"),
        ({"input_shape": (1, 1, 2, 2, 2), "devices": 4, "pipe": 1}, "4 devices cannot share 1×1×2×2×2"),
        ({"input_shape": (0, 1, 8, 8, 8)}, r"each at least 1; \(0, 1, 8, 8, 8\) is no such shape"),
        ({"input_shape": {"input": (2, 1, 8.0, 8, 8)}}, r"are whole numbers, .* \(2, 1, 8\.0, 8, 8\) is no such shape"),
        ({"recompute": [["zz"]]}, r"recompute names cells that the network has not: zz; it has 0, 1"),
        ({"recompute": [["0"], 1]}, r"or blocks of cells, not \[\['0'\], 1\]"),
        ({"repeats": 0}, "at least one pass; repeats=0"),
        ({"hardware": 3090}, "no device '3090'; there are a100-40g"),
        ({"devices": "2"}, "devices is a whole number, not '2'"),
        ({"optimizer_copies": -1}, "optimizer_copies=-1 is less"),
        ({"space": (2, "2")}, r"space is a whole number or two, not \(2, '2'\)"),
    ],
)
def test_settings_that_no_plan_has_are_told(settings: dict[str, Any], message: str) -> None:
    network = nn.Sequential(conv(1, 2), conv(2, 2))
    with pytest.raises((ConfigError, PlanError), match=message):
        make_plan(network, **{"input_shape": SMALL, "repeats": 1} | settings)


def test_blocks_of_cells_are_taken_as_lists() -> None:
    network = nn.Sequential(conv(1, 2), nn.Tanh(), conv(2, 2))
    assert plan(network, devices=1, recompute=[["0", "1"], ["2"]]).recompute == (("0", "1"), ("2",))


def test_a_network_that_takes_no_time_has_a_plan() -> None:
    plan = make_plan(nn.Flatten(2), (1, 1, 16, 16, 16), 1, hardware="rtx3090")
    assert (plan.step_seconds, plan.time_line().bubble) == (0.0, 0.0)


@pytest.mark.parametrize("settings", [{}, {"hardware": "rtx3090"}])
@pytest.mark.parametrize("network", [nn.Identity(), nn.Sequential()])
def test_a_network_without_operations_is_refused(network: nn.Module, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{type(network).__name__} has nothing to compute"):
        make_plan(network, SMALL, repeats=1, **settings)


def test_a_loss_over_all_cases_can_be_planned_for_one_case() -> None:
    plan = make_plan(nn.Sequential(conv(1, 2), conv(2, 2)), (1, 1, 8, 8, 8), 2, any_loss=True, space=1, repeats=1)
    assert (plan.pipe, plan.schedule) == (2, "gpipe")


def test_a_batch_norm_gets_whole_mini_batches() -> None:
    network = UNet(1, 2, filters=2, norm="batch")
    plan = make_plan(network, (4, 1, 32, 32, 32), devices=2)
    assert (plan.micro_batches, plan.data) == (1, 1)
    for settings in ({"micro_batches": 2}, {"data": 2}):
        with pytest.raises(PlanError, match="is a BatchNorm in training mode"):
            make_plan(network, (4, 1, 32, 32, 32), devices=2, **settings)
    frozen = make_plan(network.eval(), (4, 1, 32, 32, 32), devices=2, data=2)
    assert frozen.data == 2
