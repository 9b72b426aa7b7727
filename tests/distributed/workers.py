"""What the tests run in worker processes: functions that a fresh interpreter can import.

One launch costs seconds, so a worker runs many checks in a row; each reports what it found, and the tests judge it.
"""

import copy
import gc
import itertools
import math
import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lamp3d import Engine, SEUNet, UNet, mean_over_cases
from lamp3d.errors import ConfigError, PlanError
from lamp3d.graph import arithmetic
from lamp3d.graph.allocator import return_freed_memory
from lamp3d.graph.footprint import LiveBytes
from lamp3d.parallel.loss import LossFunction
from lamp3d.plan import SCHEDULES, Plan
from lamp3d.plan.schedule import PLACEMENTS
from lamp3d.space.sharded import whole
from tests.full import FULL
from tests.networks import (
    Branches,
    Chancy,
    Conditioned,
    Counting,
    InPlace,
    RandomDag,
    Shaped,
    Shuffled,
    Sided,
    Tied,
    conv,
)
from tests.plans import cell_names, plan_at, random_starts

SHAPE = (4, 1, 16, 16, 32)
SMALL = (4, 1, 4, 5, 6)


@dataclass
class Finding:
    """What one check found on one rank.

    Attributes:
        errors: largest relative error of each quantity against the plain network's.
        gradients: the parameters whose gradients this rank compared.
        says: the message of the error that was raised, if one was expected.
        facts: anything else.
    """

    errors: dict[str, float] = field(default_factory=dict)
    gradients: set[str] = field(default_factory=set)
    says: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def relative(found: Any, expected: Any, floor: float = 1e-30) -> float:
    """The largest difference between two tensors (or trees of them), relative to the largest expected value.

    Below ``floor`` an expected value counts as ``floor``: it is a zero with rounding errors.
    """
    pairs = list(zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True))
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    assert all(a.shape == b.shape for a, b in pairs)
    pairs = [(a.cpu(), b.cpu()) for a, b in pairs]
    return max(float((a.double() - b.double()).abs().max() / b.abs().max().clamp_min(floor)) for a, b in pairs)


def squared(output: Any, targets: Tensor) -> Tensor:
    """A loss that is no mean over the batch: only the whole mini-batch's outputs give the right number."""
    leaves = pytree.tree_leaves(output)
    targets = targets.to(leaves[0].device)
    return torch.stack([((leaf - targets).square().mean() + 0.1).sqrt() for leaf in leaves]).sum()


@mean_over_cases
def by_case(output: Any, targets: Tensor) -> Tensor:
    """A loss that is the mean over its cases, of a function that is not linear."""
    leaves = pytree.tree_leaves(output)
    targets = targets.to(leaves[0].device)
    axes = [tuple(range(1, leaf.dim())) for leaf in leaves]
    errors = [(leaf - targets).square().mean(dim) for leaf, dim in zip(leaves, axes, strict=True)]
    return torch.stack([(error + 0.1).sqrt().mean() for error in errors]).sum()


def volumes(shape: Sequence[int], seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images and targets, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return images, torch.randn(shape[0], 1, *shape[2:], generator=generator, dtype=torch.float64)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make().double()


def gradients_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@dataclass
class Plain:
    """The plain network's output, loss, gradients and buffers."""

    output: Any
    loss: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def run_plain(network: nn.Module, images: Any, targets: Any, loss_of: LossFunction = squared) -> Plain:
    """One step of a copy of the network, on this process alone."""
    network = copy.deepcopy(network)
    if isinstance(images, Tensor | dict):
        output = network(**images) if isinstance(images, dict) else network(images)
        loss = loss_of(output, targets)
    else:
        output = [network(**image) if isinstance(image, dict) else network(image) for image in images]
        loss = torch.stack([squared(o, t) for o, t in zip(output, targets, strict=True)]).mean()
    loss.backward()
    return Plain(
        pytree.tree_map(lambda leaf: leaf.detach(), output),
        loss.detach(),
        gradients_of(network),
        {name: buffer.clone() for name, buffer in network.named_buffers()},
    )


def compare(engine: Engine, plain: Plain, loss: Tensor, output: Any = None, *, steps: int = 1) -> Finding:
    """Compare what this rank has after ``steps`` equal steps with the plain network's."""
    errors = {"loss": relative(loss, plain.loss)}
    if output is not None:
        errors["output"] = relative(output, plain.output)
    # A bias in front of a norm has the gradient zero, and rounding errors for it.
    floor = 1e-4 * steps * max(float(gradient.abs().max()) for gradient in plain.gradients.values())
    for name, parameter in engine.parameters.items():
        if name in plain.gradients:
            assert parameter.grad is not None, name
            errors[name] = relative(parameter.grad, plain.gradients[name] * steps, floor)
        elif parameter.grad is not None:
            # Its value crosses a cut, but does not influence the loss: a zero comes back, not nothing.
            errors[name] = float(parameter.grad.abs().max())
    return Finding(errors, {name for name in engine.parameters if name in plain.gradients})


def one_step(
    network: nn.Module,
    plan: Plan,
    images: Any,
    targets: Any,
    plain: Plain | None = None,
    *,
    loss_fn: LossFunction = squared,
    forward: bool = False,
) -> Finding:
    """Output, loss and gradients of the engine against the plain network's (computed here if not given)."""
    plain = plain or run_plain(network, images, targets, loss_fn)
    engine = Engine(copy.deepcopy(network), plan)
    images = images if engine.reads_input else None
    seen = 0

    def watched(output: Any, targets: Any) -> Tensor:
        nonlocal seen
        seen += 1
        return loss_fn(output, targets)

    if hasattr(loss_fn, "mean_over_cases"):
        mean_over_cases(watched)
    loss = engine.step(images, targets if engine.holds_output else None, watched)
    assert bool(seen) == engine.holds_output
    finding = compare(engine, plain, loss)
    finding.facts["sent"] = engine.bytes_sent
    if forward:
        output = engine.forward(images)
        assert (output is not None) == engine.holds_output
        if output is not None:
            finding.errors["output of forward"] = relative(pytree.tree_map(whole, output), plain.output)
    return finding


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def first_cells(network: nn.Module, shape: Sequence[int], seed: int) -> list[int]:
    return random_starts(len(cell_names(network, shape)), world(), seed)


def some_of(cases: Iterable[Any], part: int) -> list[tuple[int, Any]]:
    """One in ``part`` of the cases, with their numbers: on each number of devices others.

    All of them everywhere with LAMP3D_FULL=1.
    """
    numbered = list(enumerate(cases))
    return numbered if FULL else numbered[world() % part :: part]


# The checks. Each takes nothing and returns findings by name.


def check_exactness() -> dict[str, Finding]:
    """UNet and SEUNet, every M, both recompute modes, another random cut each time."""
    findings = {}
    images, targets = volumes(SHAPE)
    for kind in (UNet, SEUNet):
        network = seeded(lambda kind=kind: kind(1, 3, filters=2))  # type: ignore[misc]
        plain = run_plain(network, images, targets)
        names = cell_names(network, SHAPE)
        for seed, (micro_batches, recompute) in some_of(itertools.product((1, 2, 3, 4), ("never", "always")), 3):
            starts = random_starts(len(names), world(), seed)
            plan = plan_at(network, SHAPE, starts, micro_batches, names, recompute=recompute)
            name = f"{kind.__name__} M={micro_batches} recompute={recompute} cut at {starts[1:]}"
            findings[name] = one_step(network, plan, images, targets, plain, forward=True)
    return findings


def check_every_cut() -> dict[str, Finding]:
    """Networks full of in-place operations, tuples, several outputs, tangles: every cut (random ones for K > 2)."""
    findings = {}
    images, targets = volumes(SMALL)
    makers: dict[str, Callable[[], nn.Module]] = {"InPlace": InPlace, "Branches": Branches}
    makers |= {f"RandomDag({seed})": lambda seed=seed: RandomDag(seed) for seed in range(12)}  # type: ignore[misc]
    for network_name, make in makers.items():
        network = seeded(make)
        try:
            plain = run_plain(network, images, targets)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            continue  # a random graph that autograd refuses: it overwrites what backward needs
        names = cell_names(network, SMALL)
        n_cells = len(names)
        if world() == 2 and not network_name.startswith("Random"):
            cuts = [[0, cut] for cut in range(1, n_cells)]
        else:
            cuts = [random_starts(n_cells, world(), seed) for seed in range(2)]
        for index, starts in enumerate(cuts):
            recompute = ("never", "always")[index % 2]
            plan = plan_at(network, SMALL, starts, 1 + index % 3, names, recompute=recompute)
            name = f"{network_name} cut at {starts[1:]} recompute={recompute}"
            findings[name] = one_step(network, plan, images, targets, plain, forward=True)
    return findings


def check_schedules() -> dict[str, Finding]:
    """Every schedule and placement, several stages on a rank, every way to recompute, another random cut each time."""
    findings = {}
    seed = 0
    for kind, shape in ((SEUNet, SHAPE), (InPlace, SMALL), (Branches, SMALL), (lambda: RandomDag(3), SMALL)):
        network = seeded((lambda: SEUNet(1, 3, filters=2)) if kind is SEUNet else kind)  # type: ignore[arg-type]
        images, targets = volumes(shape)
        plain = run_plain(network, images, targets, by_case)
        names = cell_names(network, shape)
        every = itertools.product(SCHEDULES, ("never", "always", "some"))
        for _, (schedule, recompute) in some_of(every, 4 if kind is SEUNet else 2):
            seed += 1
            ranks = PLACEMENTS[schedule](world())
            starts = random_starts(len(names), len(ranks), seed)
            again = tuple(random.Random(seed).sample(names, len(names) // 2)) if recompute == "some" else recompute
            plan = plan_at(network, shape, starts, 1 + seed % 4, names, schedule=schedule, ranks=ranks, recompute=again)
            name = f"{type(network).__name__} {schedule} M={1 + seed % 4} recompute={recompute} cut at {starts[1:]}"
            findings[name] = one_step(network, plan, images, targets, plain, loss_fn=by_case, forward=True)
    return findings


def check_any_placement() -> dict[str, Finding]:
    """GPipe, 1F1B and zero bubble with stages on any ranks; lists of volumes; a loss that is no mean over cases."""
    findings = {}
    network = seeded(lambda: UNet(1, 2, filters=1))
    names = cell_names(network, SHAPE)
    pairs = [volumes(shape, i) for i, shape in enumerate(((1, *SHAPE[1:]), (1, 1, 32, 16, 16), (1, 1, 16, 32, 32)))]
    images, targets = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    plain = run_plain(network, images, targets)
    for seed, schedule in enumerate(("gpipe", "1f1b", "folded", "zero_bubble_v")):
        chance = random.Random(seed)
        ranks = [0, *(chance.randrange(world()) for _ in range(5)), world() - 1]
        starts = random_starts(len(names), len(ranks), seed)
        plan = plan_at(network, SHAPE, starts, 3, names, schedule=schedule, ranks=ranks)
        findings[f"{schedule} on {ranks}"] = one_step(network, plan, images, targets, plain, forward=True)
        if schedule == "gpipe":
            findings["mini-batch"] = one_step(network, plan, *volumes(SHAPE))
        else:
            try:
                one_step(network, plan, *volumes(SHAPE))
            except PlanError as error:
                findings[f"refused: {schedule}"] = Finding(says=str(error))
    engine = Engine(copy.deepcopy(network), plan)
    many = [volumes((1, *SHAPE[1:]), i)[0] for i in range(5)]
    with torch.no_grad():
        expected = [network(image) for image in many]
    for taken in (2, 5):  # the caller may stop early; nothing of what was under way disturbs the next stream
        stream = engine.stream(many if engine.reads_input else [None] * len(many))
        results = [next(stream) for _ in range(taken)]
        stream.close()
        if engine.holds_output:
            findings[f"stream of {taken}"] = Finding({"output": relative(results, expected[:taken])})
    return findings


def check_shapes() -> dict[str, Finding]:
    """Lists of volumes, shapes that change from step to step, streams."""
    findings = {}
    for made in (lambda: UNet(1, 2, filters=1), Shaped):
        findings |= {f"{name} of {made().__class__.__name__}": f for name, f in _check_shapes(made).items()}
    return findings


def _check_shapes(make: Callable[[], nn.Module]) -> dict[str, Finding]:
    findings = {}
    network = seeded(make)
    shapes = [(1, 1, 16, 16, 32), (1, 1, 32, 16, 16), (1, 1, 16, 32, 32)]
    pairs = [volumes(shape, seed) for seed, shape in enumerate(shapes)]
    images, targets = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    plain = run_plain(network, images, targets)
    plan = plan_at(network, (4, *shapes[0][1:]), first_cells(network, shapes[0], 5), 2)
    findings["list"] = one_step(network, plan, images, targets, plain, forward=True)
    findings["list, recomputed"] = one_step(
        network, plan.model_copy(update={"recompute": "always"}), images, targets, plain
    )
    engine = Engine(copy.deepcopy(network), plan)
    for batch, shape in ((3, shapes[0]), (2, shapes[2]), (1, shapes[1])):
        image, target = volumes((batch, *shape[1:]), batch)
        network.zero_grad()
        for parameter in engine.parameters.values():
            parameter.grad = None
        given = image if engine.reads_input else None
        output = engine.forward(given)
        loss = engine.step(given, target if engine.holds_output else None, squared)
        findings[f"batch {batch} of {shape}"] = compare(engine, run_plain(network, image, target), loss, output)
    many = [volumes(shapes[i % 3], i)[0] for i in range(5)]
    for repeat in range(2):
        results = list(engine.stream(many if engine.reads_input else [None] * len(many)))
        assert len(results) == len(many)
        if engine.holds_output:
            with torch.no_grad():
                expected = [network(image) for image in many]
            findings[f"stream {repeat}"] = Finding({"output": relative(results, expected)})
        else:
            assert results == [None] * len(many)
    return findings


def check_dropout() -> dict[str, Finding]:
    """Recomputing draws the same random numbers, and leaves the generator where it would have been."""
    network = seeded(Chancy)
    images, targets = volumes(SMALL)
    results = []
    for recompute in ("never", "always"):
        plan = plan_at(network, SMALL, first_cells(network, SMALL, 0), 2, recompute=recompute)
        engine = Engine(copy.deepcopy(network), plan)
        torch.manual_seed(7)
        for _ in range(2):
            loss = engine.step(images, targets, squared)
        gradients = {name: p.grad for name, p in engine.parameters.items()}
        results.append((loss, gradients, torch.rand(1)))
    same = all(torch.equal(a, b) for a, b in zip(*map(pytree.tree_leaves, results), strict=True))
    return {"dropout": Finding(facts={"same": same})}


def check_batch_norm() -> dict[str, Finding]:
    """Statistics of the whole mini-batch, counted once; refused where micro-batches would change them."""
    findings = {}
    network = seeded(Counting)
    images, targets = volumes(SMALL)
    starts = first_cells(network, SMALL, 1)
    for recompute in ("never", "always"):
        plan = plan_at(network, SMALL, starts, 1, recompute=recompute)
        mine, plain = copy.deepcopy(network), copy.deepcopy(network)
        engine = Engine(mine, plan)
        for _ in range(2):
            squared(plain(images), targets).backward()
            engine.step(images, targets, squared)
        expected = dict(plain.named_buffers())
        errors = {name: relative(buffer, expected[name]) for name, buffer in engine.buffers.items()}
        expected = gradients_of(plain)
        errors |= {name: relative(p.grad, expected[name]) for name, p in engine.parameters.items()}
        findings[f"M=1 recompute={recompute}"] = Finding(errors, facts={"buffers": set(engine.buffers)})
        frozen = copy.deepcopy(plain).eval()
        plan = plan_at(frozen, SMALL, starts, 3, recompute=recompute)
        before = {name: buffer.clone() for name, buffer in frozen.named_buffers()}
        findings[f"eval M=3 recompute={recompute}"] = one_step(frozen, plan, images, targets)
        assert all(torch.equal(buffer, before[name]) for name, buffer in frozen.named_buffers())
    try:
        Engine(copy.deepcopy(network), plan_at(network, SMALL, starts, 2))
    except PlanError as error:
        findings["M=2"] = Finding(says=str(error))
    return findings


def check_frozen() -> dict[str, Finding]:
    """Parameters without gradient at the front: nothing comes back, and nobody waits for it; thawing is noticed."""
    network = seeded(InPlace)
    images, targets = volumes(SMALL)
    findings = {}
    for parameter in (*network.a.parameters(), *network.b.parameters()):
        parameter.requires_grad_(False)
    for seed, recompute in enumerate(("never", "always")):
        plan = plan_at(network, SMALL, first_cells(network, SMALL, seed), 2, recompute=recompute)
        findings[f"frozen, recompute={recompute}"] = one_step(network, plan, images, targets)
    engine = Engine(copy.deepcopy(network), plan)
    engine.step(images, targets, squared)
    for net in (network, engine.graph.root):
        for parameter in net.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
    loss = engine.step(images, targets, squared)
    findings["thawed"] = compare(engine, run_plain(network, images, targets), loss)
    return findings


def check_inputs() -> dict[str, Finding]:
    """Several inputs by name, some left at their defaults: mini-batches, lists, forward, stream, refusals."""
    findings = {}
    network = seeded(Conditioned)
    images, targets = volumes((4, 1, 16, 16, 16))
    prior = volumes((4, 2, 16, 16, 16), seed=2)[0]
    code = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    given = {"input": images, "prior": prior, "code": code}
    some = {"code": code, "input": images}
    for name, inputs in (("three", given), ("two, in another order", some)):
        shapes = {key: tuple(tensor.shape) for key, tensor in inputs.items()}
        for seed, schedule in enumerate(("gpipe", "1f1b")):
            starts = random_starts(len(cell_names(network, shapes)), world(), seed)
            plan = plan_at(network, shapes, starts, 2 + seed, schedule=schedule)
            findings[f"{name} {schedule}"] = one_step(network, plan, inputs, targets, loss_fn=by_case, forward=True)
    plan = plan_at(network, {key: tuple(tensor.shape) for key, tensor in given.items()}, starts, 2)
    listed = [{key: tensor[i : i + 1, ..., : 8 + i] if tensor.dim() == 5 else tensor[i : i + 1]
               for key, tensor in given.items()} for i in range(3)]  # fmt: skip
    findings["list"] = one_step(network, plan, listed, [targets[i : i + 1, ..., : 8 + i] for i in range(3)])
    engine = Engine(copy.deepcopy(network), plan)
    plain = run_plain(network, listed, [targets[i : i + 1, ..., : 8 + i] for i in range(3)])
    outputs = list(engine.stream(listed if engine.reads_input else [None] * 3))
    if engine.holds_output:
        findings["stream"] = Finding({"output": relative(outputs, plain.output)})
    for name, wrong in (("names", some), ("batch", {**given, "code": code[:3]})):
        try:
            engine.forward(wrong)
        except (PlanError, ConfigError) as error:
            findings[f"refused: {name}"] = Finding(says=str(error))
    loss = engine.step(given, targets, squared)
    findings["after refusals"] = compare(engine, run_plain(network, given, targets), loss)
    return findings


def check_space() -> dict[str, Finding]:
    """Volumes that ranks share, alone and with pipelines and replicas: every schedule, lists, recomputation.

    Every network in every mesh only with LAMP3D_FULL=1.
    """
    findings = {}
    meshes: dict[int, list[tuple[tuple[int, ...], tuple[int, ...], int, set[int]]]] = {
        2: [((2,), (2,), 1, {0, 1, 2})],
        3: [((3,), (4,), 1, {0, 1, 2})],
        4: [((4,), (2,), 1, {0, 2}), ((2, 2), (2, 4), 1, {0, 1}), ((2,), (3,), 1, {0}), ((2,), (4,), 2, {1})],
    }  # mesh, dimensions, replicas, networks; what is left is the pipeline
    kinds: tuple[tuple[Callable[[], nn.Module], tuple[int, ...]], ...] = (
        (lambda: UNet(1, 3, filters=2), (2, 1, 48, 16, 32)),
        (lambda: SEUNet(1, 3, filters=2, norm="group", stem_stride=2), (2, 1, 64, 32, 32)),
        (lambda: UNet(1, 3, filters=2, norm="batch"), (2, 1, 32, 16, 48)),
    )
    for (mesh, dims, data, some), (number, (make, shape)) in itertools.product(meshes[world()], enumerate(kinds)):
        network = seeded(make)
        has_batch_norm = number == 2
        if (has_batch_norm and data > 1) or (number not in some and not FULL):
            continue
        images, targets = volumes(shape)
        names = cell_names(network, shape)
        plain = run_plain(network, images, targets, by_case)
        pipe = world() // (data * math.prod(mesh))
        every = tuple(SCHEDULES) if pipe > 1 else ("gpipe", "zero_bubble_v")
        for seed, schedule in enumerate(every if number == 0 else every[-1:]):
            ranks = PLACEMENTS[schedule](pipe)
            plan = plan_at(
                network, shape, random_starts(len(names), len(ranks), seed), 1 if has_batch_norm else 2 // data, names,
                schedule=schedule, ranks=ranks, recompute=("never", "always")[seed % 2], devices=world(), data=data,
                space=mesh, space_dims=dims, least_planes=1 + seed % 3,
            )  # fmt: skip
            case = f"{type(network).__name__} {number} {mesh} {dims} data={data} {schedule}"
            findings[case] = one_step(network, plan, images, targets, plain, loss_fn=by_case, forward=True)
    several = [volumes((1, 1, 16 * (3 + i), 16, 32), seed=i) for i in range(2)]
    listed = [image for image, _ in several], [target for _, target in several]
    network = seeded(kinds[0][0])
    plan = plan_at(
        network, (1, 1, 48, 16, 32), [0], 2, devices=world(), space=(world(),), space_dims=(2,), least_planes=2
    )  # fmt: skip
    findings["list"] = one_step(network, plan, *listed)
    shuffled = lambda: nn.Sequential(conv(1, 1), Shuffled())  # noqa: E731
    for name, wrong in (("thin", seeded(lambda: nn.Sequential(conv(1, 2)))), ("unknown", seeded(shuffled))):
        few = (1, 1, 1, 8, 8) if name == "thin" else (1, 1, 8, 8, 8)
        plan = plan_at(wrong, few, [0], devices=world(), space=(world(),), space_dims=(2,))
        try:
            Engine(wrong, plan).forward(torch.randn(few, dtype=torch.float64))
        except PlanError as error:
            findings[f"refused: {name}"] = Finding(says=str(error))
    return findings


def check_dropped_engine() -> dict[str, Finding]:
    """An engine may be dropped as soon as its call returns, also while the last rank has yet to begin that call."""
    network = seeded(lambda: nn.Sequential(conv(1, 2), conv(2, 2), conv(2, 2)))
    images, targets = volumes(SMALL)
    plan = plan_at(network, SMALL, list(range(world())), 2)

    def predict(engine: Engine) -> None:
        if engine.holds_output:
            time.sleep(0.5)
        engine.forward(images)

    def first_of_stream(engine: Engine) -> None:
        if engine.holds_output:
            time.sleep(0.5)
        for _ in zip(engine.stream([images, images]), range(1), strict=False):
            pass

    for use in (predict, first_of_stream):
        use(Engine(copy.deepcopy(network), plan))
        gc.collect()
    return {"the next engine": one_step(network, plan, images, targets)}


def check_refusals() -> dict[str, Finding]:
    """What the engine refuses, on all ranks alike."""
    findings = {}
    images, _ = volumes(SMALL)
    tied = seeded(Tied)
    other = plan_at(InPlace(), SMALL, [0])
    for name, network, starts, plan in (
        ("tied", tied, [0, *range(5 - world(), 4)], None),
        ("devices", tied, [0, 1, 2][: world() % 3 + 1], None),
        ("network", tied, [0], other.model_copy(update={"devices": world()})),
    ):
        try:
            Engine(copy.deepcopy(network), plan or plan_at(network, SMALL, starts))
        except (PlanError, ConfigError) as error:
            findings[name] = Finding(says=str(error))
        else:
            findings[name] = Finding()
    sided = seeded(Sided)
    engine = Engine(sided, plan_at(sided, SMALL, list(range(world())), 2))
    sided.eval()
    try:
        output = engine.forward(images if engine.reads_input else None)
    except PlanError as error:
        findings["mode"] = Finding(says=str(error))
    else:
        findings["mode"] = Finding(errors={"output": float((output - sided(images)).detach().abs().max())})
    engine._flush()
    return findings


def check_reduced_precision() -> dict[str, Finding]:
    """bf16 and channels-last, together and alone, against the plain network under the same conditions.

    A maximum or a kink may fall to the other side when a sum is rounded otherwise, as it is for another size of batch.
    So the U-Net runs with one micro-batch; with several, a smooth network does.
    """
    findings = {}
    makers: tuple[tuple[type[nn.Module], Callable[[], nn.Module], tuple[int, ...], int], ...] = (
        (UNet, lambda: UNet(1, 2, filters=2), SHAPE, 1),
        (Branches, Branches, SMALL, 3),
    )
    for (kind, make, shape, micro_batches), (channels_last, precision, recompute) in itertools.product(
        makers, ((True, "fp32", "never"), (True, "bf16", "always"), (False, "bf16", "never"))
    ):
        network = seeded(make).float()
        if channels_last:
            network = network.to(memory_format=torch.channels_last_3d)
        images, targets = (tensor.float() for tensor in volumes(shape))
        with arithmetic(torch.device("cpu"), precision):
            layout = torch.channels_last_3d if channels_last else torch.contiguous_format
            plain = run_plain(network, images.contiguous(memory_format=layout), targets)
        plan = plan_at(
            network,
            shape,
            first_cells(network, shape, 2),
            micro_batches,
            precision=precision,
            channels_last=channels_last,
            recompute=recompute,
        )
        name = f"{precision} {kind.__name__} channels_last={channels_last} recompute={recompute}"
        # The engine gets fresh weights in their ordinary layout: bringing them into the plan's is its own affair.
        findings[name] = one_step(seeded(make).float(), plan, images, targets, plain)
    return findings


def check_slabs_in_bf16() -> dict[str, Finding]:
    """Uneven slabs in bf16, also such that the convolution of one of them alone would be computed in fp32."""
    findings = {}

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for inputs in (1, 4):  # a bias in front of a norm would have no gradient to compare
            layers += [nn.Conv3d(inputs, 4, 3, padding=1, bias=False), nn.InstanceNorm3d(4, affine=True), nn.Tanh()]
        return nn.Sequential(*layers, conv(4, 2))

    for depth, channels_last in itertools.product((5, 3 * world() + 1, 8 * world()), (True, False)):
        network = seeded(make).float()
        images, targets = (tensor.float() for tensor in volumes((2, 1, depth, 16, 16)))
        with arithmetic(torch.device("cpu"), "bf16"):
            plain = run_plain(network, images, targets, by_case)
        plan = plan_at(
            network, images.shape, [0], 2, devices=world(), space=(world(),), space_dims=(2,), precision="bf16",
            channels_last=channels_last,
        )  # fmt: skip
        name = f"depth {depth} channels_last={channels_last}"
        findings[name] = one_step(network, plan, images, targets, plain, loss_fn=by_case)
    return findings


def check_mixed_layouts() -> dict[str, Finding]:
    """Values cross where only the makers' weights decide on their layout, and the users' ranks do not hold these.

    A volume of one channel is in both layouts at once, so what a convolution makes of it is laid out as its weights.
    """
    network = seeded(lambda: nn.Sequential(conv(1, 4), conv(4, 3), nn.Tanh(), conv(3, 2))).float()
    images, targets = (tensor.float() for tensor in volumes(SMALL))
    plain = run_plain(network, images, targets)
    names = cell_names(network, SMALL)
    plan = plan_at(network, SMALL, list(range(world())), 2, names, channels_last=True)
    return {"channels-last": one_step(network, plan, images, targets, plain, forward=True)}


def check_accumulation() -> dict[str, Finding]:
    """Gradients of two steps add up; steps leave nothing behind."""
    network = seeded(lambda: nn.Sequential(conv(1, 2), nn.ReLU(inplace=True), conv(2, 2), nn.ReLU(), conv(2, 2)))
    shape = (4, 1, 24, 24, 24)
    images, targets = volumes(shape)
    plain = run_plain(network, images, targets)
    engine = Engine(copy.deepcopy(network), plan_at(network, shape, first_cells(network, shape, 0), 2))
    for _ in range(2):
        loss = engine.step(images, targets, squared)
    finding = compare(engine, plain, loss, steps=2)
    counts = []
    for _ in range(2):
        for _ in range(16):
            engine.step(images, targets, squared)
            engine.forward(images)
        gc.collect()
        return_freed_memory()  # which the engine's workers keep: how much of it there is, is chance
        counts.append((sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()), _resident_bytes()))
    finding.facts["tensors"] = counts[1][0] - counts[0][0]
    finding.facts["bytes"] = counts[1][1] - counts[0][1]
    return {"two steps": finding}


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_replicas() -> dict[str, Finding]:
    """Two pipelines of half of the workers each: every schedule, several steps, lists, shared parameters."""
    findings = {}
    images, targets = volumes(SHAPE)
    network = seeded(lambda: SEUNet(1, 3, filters=2))
    names = cell_names(network, SHAPE)
    plain = run_plain(network, images, targets, by_case)
    pipe = world() // 2
    for seed, (schedule, recompute) in enumerate(zip(SCHEDULES, itertools.cycle(("never", "always")), strict=False)):
        ranks = PLACEMENTS[schedule](pipe)
        starts = random_starts(len(names), len(ranks), seed)
        plan = plan_at(network, SHAPE, starts, 1 + seed % 2, names, schedule=schedule, ranks=ranks,
                       recompute=recompute, devices=world(), data=2)  # fmt: skip
        engine = Engine(copy.deepcopy(network), plan)
        for step in (1, 2):  # the second one's gradients are added to the first one's
            loss = engine.step(images, targets, by_case)
            findings[f"{schedule} {recompute} step {step}"] = compare(engine, plain, loss, steps=step)
        findings[f"{schedule} {recompute} step 2"].facts["hooks"] = sum(
            len(p._post_accumulate_grad_hooks or ()) for p in engine.parameters.values()
        )
        output = engine.forward(images)
        if output is not None:
            findings[f"{schedule} {recompute} output"] = Finding({"output": relative(output, plain.output)})
    several = [volumes((1, 1, 16, 16, 32 * (1 + i % 2)), seed=i) for i in range(4)]
    listed = [image for image, _ in several], [target for _, target in several]
    plain_list = run_plain(network, *listed)
    findings["list"] = one_step(network, plan, *listed, plain_list)
    tied = seeded(lambda: nn.Sequential(Tied(), conv(2, 1)))
    tied_names = cell_names(tied, SMALL)
    for schedule in ("folded", "zero_bubble_v"):  # two stages of the first rank use it
        shared = plan_at(tied, SMALL, [0, 2, 3], 2, tied_names, schedule=schedule, ranks=[0, 1, 0],
                         devices=world(), data=2)  # fmt: skip
        findings[f"tied {schedule}"] = one_step(tied, shared, *volumes(SMALL), loss_fn=by_case)
    for name, batch, loss_fn in (("loss", 4, squared), ("uneven", 3, by_case)):
        try:
            engine.step(images[:batch], targets[:batch], loss_fn)
        except PlanError as error:
            findings[f"refused: {name}"] = Finding(says=str(error))
    findings["after refusals"] = compare(engine, plain, engine.step(images, targets, by_case), steps=3)
    return findings


CHECKS: dict[str, Callable[[], dict[str, Finding]]] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_exactness,
        check_every_cut,
        check_schedules,
        check_any_placement,
        check_shapes,
        check_dropout,
        check_batch_norm,
        check_frozen,
        check_inputs,
        check_space,
        check_dropped_engine,
        check_refusals,
        check_reduced_precision,
        check_slabs_in_bf16,
        check_mixed_layouts,
        check_accumulation,
        check_replicas,
    )
}


def run_checks(names: Sequence[str]) -> dict[str, dict[str, Finding]]:
    """Run the named checks one after the other, warnings as errors."""
    torch.set_num_threads(1)
    results = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in names:
            begin = time.process_time()
            results[name] = CHECKS[name]()
            if os.environ.get("LAMP3D_TEST_TIMES"):
                print(f"K={world()} {name}: {time.process_time() - begin:.1f} CPU s", flush=True)
    return results


# Networks of MONAI.


@mean_over_cases
def by_case_of_any(output: Any, targets: Tensor) -> Tensor:
    """The same for outputs of any number of axes and any size, as deep supervision gives them."""
    goals = targets.mean((1, 2, 3, 4)).square()
    leaves = pytree.tree_leaves(output)
    goal = [goals.view(-1, *[1] * (leaf.dim() - 1)) for leaf in leaves]
    errors = [(leaf - g).square().mean(tuple(range(1, leaf.dim()))) for leaf, g in zip(leaves, goal, strict=True)]
    return torch.stack([(error + 0.1).sqrt().mean() for error in errors]).sum()


def run_monai(full: bool) -> dict[str, Finding]:
    """MONAI's networks: all of them with all schedules and ways to recompute, or every second one with one of each.

    The cut is another random one each time.
    """
    from tests.monai_networks import NETWORKS, networks_on  # which takes seconds, and other checks do not need it

    torch.set_num_threads(1)
    findings = {}
    every = list(itertools.product(SCHEDULES, ("never", "always", "some")))
    for number, name in networks_on(world(), full=full):
        network, shape, images, targets, plain = _monai_network(*NETWORKS[name])
        batch_norm = any(isinstance(module, nn.BatchNorm3d) for module in network.modules())
        names = cell_names(network, shape)
        chosen = every if full else [every[(number * 4 + world() * 7) % len(every)]]
        for seed, (schedule, recompute) in enumerate(chosen):
            ranks = PLACEMENTS[schedule](world())
            starts = random_starts(len(names), len(ranks), seed + number)
            again = tuple(random.Random(seed).sample(names, len(names) // 2)) if recompute == "some" else recompute
            micro_batches = 1 if batch_norm else 2
            plan = plan_at(
                network, shape, starts, micro_batches, names, schedule=schedule, ranks=ranks, recompute=again
            )
            case = f"{name}: {schedule}, recompute={recompute}, cut at {starts[1:]}"
            findings[case] = one_step(network, plan, images, targets, plain, loss_fn=by_case_of_any, forward=True)
            findings[case].facts["expected"] = set(plain.gradients)
    return findings


def run_monai_on_slabs() -> dict[str, Finding]:
    """MONAI's networks on volumes that all ranks share: exact, or refused by name."""
    from tests.monai_networks import NETWORKS

    torch.set_num_threads(1)
    findings = {}
    for number, (name, (make, side)) in enumerate(NETWORKS.items()):
        network, shape, images, targets, plain = _monai_network(make, side)
        plan = plan_at(network, shape, [0], devices=world(), space=(world(),), space_dims=(2 + number % 3,))
        try:
            findings[name] = one_step(network, plan, images, targets, plain, loss_fn=by_case_of_any, forward=True)
        except PlanError as error:
            findings[name] = Finding(says=str(error))
    return findings


def _monai_network(
    make: Callable[[], nn.Module], side: int | tuple[int, int, int]
) -> tuple[nn.Module, tuple[int, ...], Tensor, Tensor, Plain]:
    """A network without chance, the shape of its mini-batch, images, targets, and what it makes of them by itself."""
    shape = (2, 1, *(side if isinstance(side, tuple) else (side,) * 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = seeded(make)
    for module in network.modules():  # whose numbers would be others for a micro-batch than for the mini-batch
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    images, targets = volumes(shape)
    found: list[Any] = [None]
    if dist.get_rank() == 0:  # one for all: in float64 some of these take gigabytes
        found = [run_plain(network, images, targets, by_case_of_any)]
        return_freed_memory()
    dist.broadcast_object_list(found)
    (plain,) = found
    return network, shape, images, targets, plain


def measure_memory(plans: dict[str, Plan]) -> dict[str, int]:
    """The most that this rank held between two actions of a step, in bytes, by plan."""
    torch.set_num_threads(1)
    peaks = {}
    for name, plan in plans.items():
        torch.manual_seed(0)
        engine = Engine(UNet(1, 3, filters=4), plan)
        images = torch.randn(plan.input_shape)
        for _ in range(2):  # parameters' gradients are made by the first step, and belong to no action
            live = LiveBytes()
            engine.on_action = live.note
            with live:
                engine.step(images, images, by_case)
        peaks[name] = live.peak
        assert live.now < 100, name  # a number or two on their way out
    return peaks


def measure_sent_bytes(plans: dict[str, Plan], networks: dict[str, nn.Module]) -> dict[str, int]:
    """What this rank sends in a step, in bytes, by plan."""
    torch.set_num_threads(1)
    sent = {}
    for name, plan in plans.items():
        engine, images = Engine(networks[name], plan), torch.randn(plan.input_shape)
        engine.step(images, images, by_case)  # what is agreed upon once, and where the gradients are made
        before = engine.bytes_sent
        engine.step(images, images, by_case)
        sent[name] = engine.bytes_sent - before
    return sent


# Workers that fail.


def fail_in_rank_1() -> None:
    """Rank 1 raises while rank 0 waits for it."""
    if dist.get_rank() == 1:
        raise_an_error()
    dist.recv(torch.zeros(1), 1)


def take_too_much_memory() -> None:
    """More than any machine has."""
    torch.empty(2**58)


def raise_an_error() -> None:
    raise ValueError("case_0042 has a label of 99")


def be_killed_in_mid_step(victim: int, note: Path) -> None:
    """``victim`` gets SIGKILL in its second forward, while the others wait for its values; it notes when."""
    network = seeded(lambda: nn.Sequential(conv(1, 2), conv(2, 2), conv(2, 2)))
    engine = Engine(network, plan_at(network, SMALL, list(range(world())), 2))
    images, targets = volumes(SMALL)
    engine.step(images, targets, squared)

    def kill(*_: Any) -> None:
        note.write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    if engine.rank == victim:
        for layer in network.children():
            layer.register_forward_hook(kill)
    engine.step(images, targets, squared)


def describe(*args: Any) -> tuple[int, tuple[Any, ...], int, Tensor]:
    """Rank, arguments, threads and a tensor, to see what comes back."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return rank, args, torch.get_num_threads(), torch.full((3,), float(rank))
