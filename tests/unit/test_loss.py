"""The hybrid loss against its formula written out naively, and against automatic differentiation."""

import itertools

import pytest
import torch
from torch import Tensor

from lamp3d.errors import ConfigError
from lamp3d.train import loss as loss_module
from lamp3d.train.loss import HybridLoss, LossConfig

ORGANS = ("BrainStem", "Mandible", "Chiasm")
WEIGHTS = {"background": 0.25, "Chiasm": 3.0}


def naive(logits: Tensor, labels: Tensor, annotated: Tensor, weights: Tensor, focal_weight: float) -> Tensor:
    """The formula, case by case and class by class, with one-hot volumes and nothing shared."""
    total = logits.new_zeros(())
    for b in range(logits.shape[0]):
        log_p = torch.log_softmax(logits[b], 0)
        p = log_p.exp()
        focal = logits.new_zeros(logits.shape[2:])
        for c in range(logits.shape[1]):
            if not annotated[b, c]:
                continue
            g = (labels[b, 0] == c).to(p.dtype)
            tp, fn, fp = (p[c] * g).sum(), ((1 - p[c]) * g).sum(), (p[c] * (1 - g)).sum()
            total = total + weights[c] * (1 - tp / (tp + 0.5 * fn + 0.5 * fp))
            focal = focal - weights[c] * (1 - p[c]) ** 2 * g * log_p[c]
        total = total + focal_weight * focal.mean()
    return total / logits.shape[0]


def example(dtype: torch.dtype = torch.float64, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(batch, 4, 5, 6, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (batch, 1, 5, 6, 7), generator=generator)  # the last class is never present
    annotated = torch.ones(batch, 4, dtype=torch.bool)
    annotated[-1, [0, 2]] = False
    return logits.to(dtype), labels, annotated


def hybrid(focal_weight: float = 0.7) -> HybridLoss:
    return HybridLoss(LossConfig(class_weights=WEIGHTS, focal_weight=focal_weight), ORGANS)


@pytest.fixture(autouse=True, params=[64, 1 << 13], ids=["pieces", "whole"])
def piece_voxels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CPU_PIECE_VOXELS", request.param)


@pytest.mark.parametrize(("focal_weight", "channels_last"), list(itertools.product([0.0, 0.7], [False, True])))
def test_value_and_gradient_equal_the_formula(focal_weight: float, channels_last: bool) -> None:
    logits, labels, annotated = example()
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last_3d)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = hybrid(focal_weight)(ours, (labels, annotated))
    expected = naive(theirs, labels, annotated, torch.tensor([0.25, 1.0, 1.0, 3.0]).double(), focal_weight)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (2 * loss).backward()
    (2 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-15)


def test_gradient_of_logits_in_a_strange_layout() -> None:
    logits, labels, annotated = example()
    strange = logits.permute(0, 4, 3, 2, 1).contiguous().permute(0, 4, 3, 2, 1).requires_grad_()
    plain = logits.clone().requires_grad_()
    for z in (strange, plain):
        hybrid()(z, (labels, annotated)).backward()
    assert torch.equal(strange.grad, plain.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_logits_are_judged_in_float32_whatever_autocast_says(dtype: torch.dtype) -> None:
    logits, labels, annotated = example(dtype)
    logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = hybrid()(logits, (labels, annotated))
    loss.backward()
    hybrid()(exact, (labels, annotated)).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), hybrid()(exact.detach(), (labels, annotated)), rtol=1e-6, atol=0)
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    atol = tolerance * float(exact.grad.abs().max())
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=atol)


def test_a_missing_organ_has_no_say() -> None:
    """Neither the value nor the gradient changes with the labels' claim about a class that is not annotated."""
    logits, labels, _ = example(batch=1)
    annotated = torch.tensor([[False, True, False, True]])  # background is off, since an organ is missing
    relabelled = torch.where(labels == 2, 0, labels)
    gradients = []
    for target in (labels, relabelled):
        z = logits.clone().requires_grad_()
        hybrid()(z, (target, annotated)).backward()
        gradients.append(z.grad)
    assert torch.equal(*gradients)


def test_nothing_annotated_is_nothing_lost() -> None:
    logits, labels, annotated = example()
    logits.requires_grad_()
    loss = hybrid()(logits, (labels, torch.zeros_like(annotated)))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_extreme_logits_stay_finite() -> None:
    """Probabilities that underflow to 0, of the true class and of a whole class that is absent."""
    _, labels, annotated = example()
    logits = torch.full((2, 4, 5, 6, 7), -500.0)
    logits[:, 2] = 500.0
    logits.requires_grad_()
    loss = hybrid()(logits, (labels, annotated))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    # The wrong and certain voxels still feel the focal term: its slope is that of the cross entropy.
    assert (logits.grad[0, 1][labels[0, 0] == 1] < 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_show_in_the_loss(value: float) -> None:
    logits, labels, annotated = example()
    logits[0, 1, 2, 3, 4] = value
    assert not hybrid()(logits, (labels, annotated)).isfinite()


def test_errors_name_the_classes() -> None:
    with pytest.raises(ConfigError, match=r"Liver.*background, BrainStem"):
        HybridLoss(LossConfig(class_weights={"Liver": 1.0}), ORGANS)
    logits, labels, annotated = example()
    with pytest.raises(ConfigError, match=r"3 channels.*4 classes"):
        hybrid()(logits[:, :3], (labels, annotated[:, :3]))
