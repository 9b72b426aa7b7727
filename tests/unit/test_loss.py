"""The hybrid loss against its formula written out naively, and against automatic differentiation."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from lamp3d.errors import ConfigError
from lamp3d.train import loss as loss_module
from lamp3d.train.loss import HybridLoss, LossConfig

ORGANS = ("BrainStem", "Mandible", "Chiasm")
WEIGHTS = {"background": 0.25, "Chiasm": 3.0}


def naive(
    logits: Tensor, labels: Tensor, annotated: Tensor, weights: Tensor, focal_weight: float, exponent: int
) -> Tensor:
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
            focal = focal - weights[c] * (1 - p[c]) ** exponent * g * log_p[c]
        total = total + focal_weight * focal.mean()
    return total / logits.shape[0]


def example(dtype: torch.dtype = torch.float64, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(batch, 4, 5, 6, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (batch, 1, 5, 6, 7), generator=generator)  # the last class is never present
    annotated = torch.ones(batch, 4, dtype=torch.bool)
    annotated[-1, [0, 2]] = False
    return logits.to(dtype), labels, annotated


def hybrid(focal_weight: float = 0.7, exponent: int = 2, missing: str = "mask") -> HybridLoss:
    settings = {"class_weights": WEIGHTS, "focal_weight": focal_weight, "focal_exponent": exponent, "missing": missing}
    return HybridLoss(LossConfig.model_validate(settings), ORGANS)


def in_numpy(
    logits: Tensor, labels: Tensor, annotated: Tensor, focal_weight: float, exponent: int, missing: str
) -> float:
    """The documented loss without torch: in "merge" the probabilities of background and missing organs are added up."""
    weights = np.array([0.25, 1.0, 1.0, 3.0])
    total = 0.0
    for z, label, known in zip(logits.numpy(), labels.numpy()[:, 0], annotated.numpy(), strict=True):
        e = np.exp(z - z.max(0))
        p = e / e.sum(0)
        judged = known.copy()
        if missing == "merge":
            unknown = [c for c in range(1, len(p)) if not known[c]]
            p[0] += p[unknown].sum(0)
            judged[0] = True
        for c in np.flatnonzero(judged):
            g = label == c
            overlap = (p[c] * g).sum()
            total += weights[c] * (1 - 2 * overlap / (p[c].sum() + g.sum()))
            true = p[c][g]
            total -= focal_weight * weights[c] * ((1 - true) ** exponent * np.log(true)).sum() / label.size
    return total / len(logits)


@pytest.fixture(autouse=True, params=[64, 1 << 13], ids=["pieces", "whole"])
def piece_voxels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CPU_PIECE_VOXELS", request.param)


@pytest.mark.parametrize(("exponent", "missing"), list(itertools.product([0, 1, 2], ["mask", "merge"])))
def test_value_is_that_of_numpy_and_the_gradient_that_of_finite_differences(exponent: int, missing: str) -> None:
    logits, labels, annotated = example()
    labels[-1][labels[-1] == 2] = 0  # as in a label map whose organ 2 was not contoured
    loss_fn = hybrid(exponent=exponent, missing=missing)
    expected = in_numpy(logits, labels, annotated, 0.7, exponent, missing)
    assert loss_fn(logits, (labels, annotated)).item() == pytest.approx(expected, rel=1e-12, abs=0)
    small, of_small = logits[:, :, :2, :2, :2].clone().requires_grad_(), (labels[..., :2, :2, :2], annotated)
    assert torch.autograd.gradcheck(lambda z: loss_fn(z, of_small), small)


@pytest.mark.parametrize(
    ("focal_weight", "exponent", "channels_last"),
    list(itertools.product([0.0, 0.7], [0, 2], [False, True])),
)
def test_value_and_gradient_equal_the_formula(focal_weight: float, exponent: int, channels_last: bool) -> None:
    logits, labels, annotated = example()
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last_3d)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = hybrid(focal_weight, exponent)(ours, (labels, annotated))
    weights = torch.tensor([0.25, 1.0, 1.0, 3.0]).double()
    expected = naive(theirs, labels, annotated, weights, focal_weight, exponent)
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


@pytest.mark.parametrize("exponent", [0, 2])
def test_extreme_logits_stay_finite(exponent: int) -> None:
    """Probabilities that underflow to 0, of the true class and of a whole class that is absent."""
    _, labels, annotated = example()
    logits = torch.full((2, 4, 5, 6, 7), -500.0)
    logits[:, 2] = 500.0
    logits.requires_grad_()
    loss = hybrid(exponent=exponent)(logits, (labels, annotated))
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


@pytest.mark.parametrize(("missing", "background"), [("mask", 4.0), ("merge", 1.0)])
def test_weights_from_annotation_counts_give_every_class_the_same_say(missing: str, background: float) -> None:
    """Mandible is contoured in two of four cases and Chiasm in none; one case has every organ but Chiasm."""
    config = LossConfig.model_validate({"class_weights": "annotation_counts", "missing": missing})
    cases = [("BrainStem", "Mandible"), ("BrainStem",), ("BrainStem", "Mandible"), ("BrainStem",)]
    resolved = config.resolved_for(cases, ORGANS)
    expected = {"BrainStem": 1.0, "Mandible": 2.0}
    assert resolved.class_weights == (expected | {"background": 1.0} if missing == "merge" else expected)
    assert resolved.missing == missing
    HybridLoss(resolved, ORGANS)
    complete = config.resolved_for([ORGANS, *cases[1:]], ORGANS)
    assert complete.class_weights == expected | {"Chiasm": 4.0, "background": background}
    assert set(config.resolved_for([ORGANS] * 3, ORGANS).class_weights.values()) == {1.0}
    by_hand = LossConfig(class_weights=WEIGHTS)
    assert by_hand.resolved_for(cases, ORGANS) == by_hand
    with pytest.raises(ConfigError, match="resolved_for"):
        HybridLoss(config, ORGANS)


@pytest.mark.parametrize("missing", ["mask", "merge"])
def test_levels_of_logits_weigh_half_of_those_before_them(missing: str) -> None:
    logits, labels, annotated = example()
    labels[-1][labels[-1] == 2] = 0  # as in a label map whose organ 2 was not contoured
    levels = [logits, logits.flip(2), 0.5 * logits]
    config = LossConfig.model_validate({"class_weights": WEIGHTS, "missing": missing})
    parts = [HybridLoss(config, ORGANS)(level, (labels, annotated)) for level in levels]
    stacked = torch.cat(levels, 1).requires_grad_()
    loss = HybridLoss(config, ORGANS, heads=3)(stacked, (labels, annotated))
    torch.testing.assert_close(loss, (4 * parts[0] + 2 * parts[1] + parts[2]) / 7)
    loss.backward()
    assert all(part.abs().max() > 0 for part in stacked.grad.chunk(3, 1))
    with pytest.raises(ConfigError, match=r"8 channels.*4 classes.*3 levels"):
        HybridLoss(config, ORGANS, heads=3)(stacked[:, :8], (labels, annotated))


def test_errors_name_the_classes() -> None:
    with pytest.raises(ConfigError, match=r"Liver.*background, BrainStem"):
        HybridLoss(LossConfig(class_weights={"Liver": 1.0}), ORGANS)
    logits, labels, annotated = example()
    with pytest.raises(ConfigError, match=r"3 channels.*4 classes"):
        hybrid()(logits[:, :3], (labels, annotated[:, :3]))
    with pytest.raises(ConfigError, match=r"6 dimensions.*deep supervision off"):
        hybrid()(logits[:, None], (labels, annotated))
