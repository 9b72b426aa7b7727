"""What one GPU can show: the engine's numbers, its memory as planned, and the commands on a GPU as on a CPU."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
import pytest
import torch
from monai.networks.nets import DynUNet
from torch import Tensor, nn

import lamp3d
from lamp3d.data import write_phantom_dataset
from lamp3d.plan import make_plan
from lamp3d.train import HybridLoss, LossConfig

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
ORGANS = 3
CONFIG = """
network: {kind: unet, filters: 8, max_filters: 64}
preprocess: {window: [-200, 600], crop_foreground: true, foreground_above: -500}
loss: {missing: merge}
train:
  optimizer: adamw
  clip_norm: 1.0
  curriculum:
    - {patch: 32, batch: 4, epochs: 3, patches_per_case: 8, learning_rate: 5.0e-3}
    - {patch: whole, batch: 2, epochs: 2, learning_rate: 4.0e-3}
"""


def network(kind: str, filters: int = 4) -> nn.Module:
    """With the same weights everywhere."""
    torch.manual_seed(0)
    if kind == "DynUNet":
        widths = [filters * 2**level for level in range(3)]
        return DynUNet(3, 1, ORGANS + 1, [3] * 3, [1, 2, 2], [2] * 2, filters=widths)
    return lamp3d.UNet(1, ORGANS + 1, filters) if kind == "UNet" else lamp3d.SEUNet(1, ORGANS + 1, filters)


def data(side: int, batch: int = 2) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 1, side, side, side, generator=generator).cuda()
    labels = torch.randint(0, ORGANS + 1, images.shape, generator=generator, dtype=torch.uint8).cuda()
    return images, (labels, torch.ones(batch, ORGANS + 1, dtype=torch.bool, device="cuda"))


def loss_fn() -> HybridLoss:
    return HybridLoss(LossConfig(), [f"organ {i}" for i in range(ORGANS)])


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected.cpu().double()).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["UNet", "SEUNet", "DynUNet"])
@pytest.mark.parametrize("recompute", ["never", "always"])
def test_float64_loss_and_gradients_equal_the_plain_networks(kind: str, recompute: Literal["never", "always"]) -> None:
    net = network(kind).double()
    images, targets = data(32)
    plain = copy.deepcopy(net).cuda()
    expected = loss_fn()(plain(images.double()), targets)
    torch.autograd.backward(expected)
    plan = make_plan(net, (2, 1, 32, 32, 32), 1, recompute=recompute, micro_batches=1)
    assert plan.device_type == "cuda"
    engine = lamp3d.Engine(net, plan)
    loss = engine.step(images.double(), targets, loss_fn())
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-10)
    largest = max(float(p.grad.norm()) for p in plain.parameters() if p.grad is not None)
    for name, parameter in plain.named_parameters():
        mine = engine.parameters[name].grad
        assert parameter.grad is not None
        assert mine is not None
        assert mine.is_cuda
        assert float((mine - parameter.grad).norm()) < 1e-9 * largest, name


@pytest.mark.parametrize("split", [False, True])
def test_bf16_is_near_fp32(split: bool) -> None:
    images, targets = data(64)
    schedule: dict[str, Any] = {"schedule": "zero_bubble_v", "micro_batches": 2} if split else {}
    found = {}
    for precision in ("fp32", "bf16"):
        net = network("UNet", 8)
        plan = make_plan(net, tuple(images.shape), 1, precision=precision, hardware="h100-80g", **schedule)
        engine = lamp3d.Engine(net, plan)
        loss = engine.step(images, targets, lamp3d.mean_over_cases(loss_fn()))
        found[precision] = float(loss), list(engine.parameters.values())[-2].grad
    (exact, of_exact), (reduced, of_reduced) = found.values()
    assert reduced == pytest.approx(exact, rel=1e-2)
    assert of_exact is not None
    assert of_reduced is not None
    assert distance(of_reduced, of_exact) < 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["never", "always"])
def test_memory_is_as_planned(precision: str, recompute: Literal["never", "always"]) -> None:
    net = network("UNet", 16)
    images, targets = data(96, 1)
    loss = loss_fn()
    plan = make_plan(
        net, (1, 1, 96, 96, 96), 1, precision=precision, recompute=recompute, repeats=1, fresh=True,
        loss=lambda logits: loss(logits, targets),
    )  # fmt: skip
    engine = lamp3d.Engine(net, plan)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        engine.step(images, targets, loss)
    parameters = 4 * sum(p.numel() for p in net.parameters())
    predicted = plan.per_device[0].peak_bytes - 2 * parameters  # no optimizer here
    assert engine.peak_bytes() == pytest.approx(predicted, rel=0.15)


@pytest.mark.parametrize("devices", [1, 2])
def test_training_prediction_and_evaluation(tmp_path: Path, devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMP3D_WORKERS_PER_GPU", str(-(-devices // torch.cuda.device_count())))
    write_phantom_dataset(tmp_path / "data", train=4, validation=2, seed=0, missing_fraction=0.0)
    (tmp_path / "config.yaml").write_text(CONFIG)
    command(tmp_path, "train", "data", "--config", "config.yaml", "--out", "run", "--devices", str(devices))
    command(tmp_path, "evaluate", "run", "data", "--split", "validation", "--devices", str(devices))
    scan = next((tmp_path / "data").rglob("*image*/*.nii.gz"))
    command(tmp_path, "predict", "run", str(scan), "--out", "gpu", "--devices", str(devices))
    command(tmp_path, "predict", "run", str(scan), "--out", "cpu", CUDA_VISIBLE_DEVICES="")
    labels = [np.asarray(nibabel.load(next((tmp_path / out).rglob("*.nii.gz"))).dataobj) for out in ("gpu", "cpu")]
    assert labels[0].max() > 0
    assert (labels[0] == labels[1]).mean() > 0.999


def command(folder: Path, *arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lamp3d", *arguments], cwd=folder, env={**os.environ, **environment}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
