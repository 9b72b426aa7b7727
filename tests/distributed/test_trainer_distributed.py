"""Training over two workers: as on one device, with weights that change ranks between stages, and exactly resumable."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamp3d
from lamp3d.data import Batch
from lamp3d.errors import LampError
from lamp3d.plan import Plan
from lamp3d.space.sharded import whole
from lamp3d.train import Checkpoint, HybridLoss, LossConfig, TrainConfig, Trainer, read_history

ORGANS = ("Left",)
CONFIG = TrainConfig.model_validate(
    {
        "curriculum": [
            {"patch": 4, "batch": 4, "epochs": 2, "learning_rate": 0.01},
            {"patch": "whole", "batch": 2, "epochs": 2, "learning_rate": 0.005},
        ],
        "optimizer": "adamw",
        "lr_schedule": "cosine",
        "clip_norm": 0.5,
        "ema_decay": 0.9,
        "precision": "fp32",
    }
)


def network(dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.InstanceNorm3d(4, affine=True),
        nn.LeakyReLU(),
        nn.Dropout3d(dropout),
        nn.Conv3d(4, 2, 3, padding=1),
    )


class FakeBatches:
    """Noise, with its sign as label; every rank is given what it asks for, or an error late in the second stage.

    A KeyboardInterrupt comes to all ranks, as Ctrl-C does; another error to the one that holds the output.
    """

    def __init__(self, stage: int, epoch: int, error: BaseException | None) -> None:
        self.place = (stage, epoch)
        self.error = error

    def __len__(self) -> int:
        return 3

    def share_of(self, planned: Sequence[int]) -> float:
        return 256 / math.prod(planned)

    def read(self, i: int, *, images: bool = True, labels: bool = True, part: Any = None) -> Batch:
        if self.error and (*self.place, i) == (1, 1, 1) and (labels or isinstance(self.error, KeyboardInterrupt)):
            raise self.error
        stage, epoch = self.place
        generator = torch.Generator().manual_seed(100 * stage + 10 * epoch + i)
        shapes = [(4, 4, 4)] * 4 if stage == 0 else [(4, 6, 4), (4, 4, 8)]
        volumes = [torch.randn(1, 1, *shape, generator=generator) for shape in shapes]
        truth = [(volume > 0).long() for volume in volumes]
        if (epoch, i) == (0, 1):
            volumes[0][..., 0] = math.nan  # in both stages one step is bad
        if part is not None:
            volumes, truth = ([v[(..., *part(v.shape[2:]))] for v in of] for of in (volumes, truth))
        pictures: Tensor | list[Tensor] = torch.cat(volumes) if stage == 0 else volumes
        maps: Tensor | list[Tensor] = torch.cat(truth) if stage == 0 else truth
        names = tuple(f"case{i}{letter}" for letter in "abcd"[: len(shapes)])
        return Batch(
            pictures if images else None,
            maps if labels else None,
            torch.ones(len(shapes), 2).bool(),
            names,
            tuple(shapes),
        )


def score(engine: lamp3d.Engine) -> dict[str, float]:
    logits = whole(engine.forward(torch.linspace(-1, 1, 64).reshape(1, 1, 4, 4, 4) if engine.reads_input else None))
    counts = engine.holds_output and engine.is_first_copy
    shared = logits[:, 1].sigmoid().mean().reshape(1).cpu() if counts else torch.zeros(1)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(shared)
    return {"Left": float(shared)}


def train(
    run: Path, plans: Sequence[Plan], dropout: float, resume: bool, error: BaseException | None = None
) -> list[str]:
    """Returns the names of the parameters that this rank ended with."""
    # Every rank begins with other weights: the first one's must count.
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    held: list[str] = []

    def validate(engine: lamp3d.Engine) -> dict[str, float]:
        held[:] = engine.parameters
        return score(engine)

    Trainer(
        network(dropout),
        plans,
        CONFIG,
        HybridLoss(LossConfig(), ORGANS),
        lambda stage, epoch: FakeBatches(stage, epoch, error),  # type: ignore[arg-type, return-value]
        validate,
        run,
    ).fit(resume)
    return held


def cut_at(plan: Plan, start: int) -> Plan:
    """The plan with its second stage beginning at another cell."""
    cells = [cell for stage in plan.stages for cell in stage.cells]
    one, two = plan.stages
    stages = (
        one.model_copy(update={"last_cell": start - 1, "cells": tuple(cells[:start])}),
        two.model_copy(update={"first_cell": start, "cells": tuple(cells[start:])}),
    )
    return plan.model_copy(update={"stages": stages})


def make_plans(devices: int) -> list[Plan]:
    # One layout, not the faster one: where a sum is rounded otherwise, Adam makes much of a gradient that is zero.
    layout = {"precision": "fp32", "channels_last": False}
    plan = lamp3d.make_plan(
        network(0.0), (4, 1, 4, 4, 4), devices=devices, data=1, space=1, schedule="gpipe", micro_batches=2, **layout
    )
    if devices == 1:
        return [plan, plan]
    n_cells = sum(len(stage.cells) for stage in plan.stages)
    slabs = lamp3d.make_plan(network(0.0), (2, 1, 4, 6, 8), devices=2, space=2, schedule="1f1b", **layout)
    return [cut_at(plan, 1), cut_at(plan, n_cells - 1), slabs]


def tensors(path: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(path)
    return {f"{part}/{k}": v for part in ("model", "optimizer", "ema") for k, v in checkpoint.read(part).items()}


def train_several(folder: Path, plans: Sequence[Plan]) -> list[str]:
    """In one launch: as on one device; and with dropout, straight and interrupted on all ranks and resumed."""
    *plans, slabs = plans
    held = train(folder / "together", plans, 0.0, False)
    train(folder / "slabs", [plans[0], slabs], 0.0, False)
    train(folder / "straight", plans, 0.3, False)
    with pytest.raises(KeyboardInterrupt):
        train(folder / "interrupted", plans, 0.3, False, KeyboardInterrupt())
    exists = Path.exists
    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank() == 1:  # another machine, which sees new files late
            patch.setattr(Path, "exists", lambda path: path.suffix not in (".safetensors", ".json") and exists(path))
        train(folder / "interrupted", plans, 0.3, True)
    return held


def test_two_workers_train_what_one_device_trains_and_resume_exactly(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each worker has: two round a sum otherwise than one
    try:
        train(tmp_path / "alone", make_plans(1), 0.0, False)
    finally:
        torch.set_num_threads(threads)
    held = lamp3d.launch(train_several, devices=2, args=(tmp_path, make_plans(2)))
    assert set(held[0]).isdisjoint(held[1])
    assert sorted([*held[0], *held[1]]) == sorted(dict(network(0.0).named_parameters()))
    alone, together, slabs, straight, interrupted = (
        tmp_path / name for name in ("alone", "together", "slabs", "straight", "interrupted")
    )
    for name in ("last.safetensors", "best.safetensors"):
        one = tensors(alone / name)
        for run in (together, slabs):
            other = tensors(run / name)
            assert one.keys() == other.keys()
            for key in one:
                if run == slabs and key.endswith("/0.bias"):
                    continue  # in front of a norm: its gradient is a rounding error, of which Adam makes much
                torch.testing.assert_close(other[key], one[key], rtol=1e-4, atol=1e-6, msg=f"{run.name} {key}")
        one, two = tensors(straight / name), tensors(interrupted / name)
        assert one.keys() == two.keys()
        for key in one:
            assert torch.equal(one[key], two[key]), key
        assert Checkpoint(straight / name).progress == Checkpoint(interrupted / name).progress
    pairs = [zip(read_history(run), read_history(alone), strict=True) for run in (together, slabs)]
    for ours, theirs in itertools.chain(*pairs):
        assert ours.bad_cases == theirs.bad_cases
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.mean_dice == pytest.approx(theirs.mean_dice, rel=1e-4)
        assert len(ours.peak_bytes) == 2
        assert min(ours.peak_bytes) > 0
    assert [record.bad_steps for record in read_history(together)] == [1, 0, 1, 0]
    unstable = {"seconds_per_step", "peak_bytes"}
    histories = [[r.model_dump(exclude=unstable) for r in read_history(run)] for run in (straight, interrupted)]
    assert histories[0] == histories[1]


def test_a_worker_that_breaks_down_leaves_a_run_that_one_device_can_finish(tmp_path: Path) -> None:
    error = OSError("the disk of this worker is gone")
    with pytest.raises(LampError, match="the disk of this worker is gone"):
        lamp3d.launch(train, devices=2, args=(tmp_path, make_plans(2)[:2], 0.0, False, error))
    assert Checkpoint(tmp_path / "last.safetensors").progress["epochs"] == 3
    train(tmp_path, make_plans(1), 0.0, True)
    assert [len(record.peak_bytes) for record in read_history(tmp_path)] == [2, 2, 2, 1]
