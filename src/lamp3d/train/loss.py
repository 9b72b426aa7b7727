"""The hybrid loss for few and many voxels alike: soft Dice of each class plus a focal term, with missing organs masked.

For one case with probabilities p = softmax(logits), truth g, annotated mask m, class weights w, focal exponent e::

    sum_c m_c w_c (1 - TP_c / (TP_c + FN_c / 2 + FP_c / 2))
        + lambda * mean over voxels of sum_c m_c w_c (-(1 - p_c)^e g_c log p_c)

With e = 2 it is AnatomyNet's hybrid loss, which the paper takes (§1); with e = 0 the second term is the cross entropy.
The denominator is (sum p_c + sum g_c) / 2, so class-wise sums and the probability of the true class say everything.
Both passes walk over the volume in pieces that stay in the processor's cache, and the backward pass computes the
softmax again instead of keeping it: beside the logits, the only thing as large as them is their gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from lamp3d.errors import ConfigError
from lamp3d.parallel import mean_over_cases
from lamp3d.settings import Settings
from lamp3d.space.ranks import Space
from lamp3d.space.sharded import ShardedVolume

CPU_PIECE_VOXELS = 1 << 13  # with ten classes some 300 kB: a core's own cache
GPU_PIECE_VOXELS = 1 << 22  # enough work for a kernel, little beside the volume's activations


class LossConfig(Settings):
    """Settings of `HybridLoss`."""

    class_weights: dict[str, NonNegativeFloat] | Literal["annotation_counts"] = Field(default={})
    """Weight by organ name, or of "background"; 1 for those not named. "annotation_counts": by how few training cases
    have the class annotated, see `resolved_for`."""
    focal_weight: float = Field(default=0.5, ge=0)
    """lambda, the weight of the focal term beside the Dice term."""
    focal_exponent: int = Field(default=2, ge=0)
    """How strongly voxels that are already right are passed over; 0 makes the focal term the cross entropy."""
    missing: Literal["mask", "merge"] = "mask"
    """What the background is in a case without the contours of some organs: "mask" leaves it out of the loss (the
    paper's form); "merge" takes background and missing organs as one class, whose probability is the sum of theirs, so
    that false positives are still seen."""

    def resolved_for(self, annotated: Sequence[Sequence[str]], organs: Sequence[str]) -> LossConfig:
        """The settings with "annotation_counts" replaced by the weights that it means; others as they are.

        Class c that may be judged in n_c of N cases weighs N / n_c: AnatomyNet's inverse of the number of annotations,
        scaled so that all weights are 1 where nothing is missing. Over an epoch every class then has the same say. The
        background may be judged where no organ is missing, or everywhere if `missing` is "merge". A class that may be
        judged nowhere weighs 1, which has no effect.

        Args:
            annotated: of each training case, the organs that it has contours of.
            organs: names of labels 1, 2, ...
        """
        if self.class_weights != "annotation_counts":
            return self
        cases = [set(names) for names in annotated]
        counts = {organ: sum(organ in names for names in cases) for organ in organs}
        complete = sum(names.issuperset(organs) for names in cases)
        counts["background"] = len(cases) if self.missing == "merge" else complete
        weights = {name: len(cases) / count for name, count in counts.items() if count}
        return self.model_copy(update={"class_weights": weights})


class HybridLoss(nn.Module):
    """Dice and focal loss over the annotated classes of each case, averaged over the batch (AnatomyNet's hybrid loss).

    A class that is annotated but absent from the patch costs its full weight and has no Dice gradient; its false
    positives are pushed down through the classes that are there.

    Args:
        config: weights.
        organs: names of labels 1, 2, ...; label 0 is the background.
        heads: logits of so many levels lie behind each other along the channels (deep supervision); each level's loss
            weighs half of that before it, all together 1.

    Raises:
        ConfigError: a class weight names an unknown organ, or the weights are not resolved yet.
    """

    class_weights: Tensor
    mean_over_cases = True
    """So a schedule may compute it a micro-batch at a time (`lamp3d.mean_over_cases`)."""

    def __init__(self, config: LossConfig, organs: Sequence[str], heads: int = 1) -> None:
        super().__init__()
        classes = ["background", *organs]
        if isinstance(config.class_weights, str):
            raise ConfigError(
                f"class_weights={config.class_weights!r} depends on the training cases: use what "
                "LossConfig.resolved_for makes of them, or give the weights by name."
            )
        unknown = sorted(set(config.class_weights) - set(classes))
        if unknown:
            raise ConfigError(f"class_weights names {', '.join(unknown)}; the classes are {', '.join(classes)}.")
        weights = [config.class_weights.get(name, 1.0) for name in classes]
        self.register_buffer("class_weights", torch.tensor(weights, dtype=torch.float64), persistent=False)
        self.focal_weight, self.focal_exponent = config.focal_weight, config.focal_exponent
        self.merges = config.missing == "merge"
        self.heads = heads

    def forward(self, logits: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of a mini-batch.

        Args:
            logits: (B, heads * C, D, H, W), any floating type; computed in float32, or float64 if they are. Of a volume
                that ranks share each adds up its slab; only the sums are exchanged.
            targets: labels (B, 1, D, H, W), integers; and annotated (B, C), bool: may the class be judged in the case?

        Returns:
            0-dim tensor.

        Raises:
            ConfigError: the network's number of output channels is not the number of classes, or it gives more levels.
        """
        labels, annotated = targets
        classes = len(self.class_weights)
        if logits.dim() != 5:
            raise ConfigError(
                f"The network gives a tensor of {logits.dim()} dimensions and not logits (B, C, D, H, W): switch "
                "its deep supervision off."
            )
        if logits.shape[1] != self.heads * classes:
            raise ConfigError(
                f"The network gives {logits.shape[1]} channels, but there are {classes} classes "
                "(background and the organs): set the network's out_channels to that number"
                + (f", with {self.heads} levels of logits." if self.heads > 1 else ".")
            )
        assert labels.shape == (logits.shape[0], 1, *logits.shape[2:]), (labels.shape, logits.shape)
        assert annotated.shape == (logits.shape[0], classes), (annotated.shape, logits.shape)
        annotated = annotated.to(logits.device)
        voxels, space = math.prod(logits.shape[2:]), None
        if isinstance(logits, ShardedVolume):
            space, placement = logits.space if logits.placement.cuts else None, logits.placement
            assert isinstance(labels, ShardedVolume), "the engine shares targets as it shares inputs"
            logits, labels = logits.local, labels.relaid(placement).local
        labels, loss = labels.to(logits.device), logits.new_zeros((), dtype=_working_dtype(logits))
        # A slice, even of everything, would cost another gradient as large as the logits.
        for head, of_head in enumerate(logits.chunk(self.heads, dim=1) if self.heads > 1 else (logits,)):
            judged = annotated
            if self.merges:
                of_head, judged = _merged(of_head, annotated)
            weights = self.class_weights.to(logits.device) * judged
            share = 0.5**head / (2 - 0.5 ** (self.heads - 1))
            loss = loss + share * _HybridLoss.apply(  # type: ignore[no-untyped-call]
                of_head, labels, weights, self.focal_weight, self.focal_exponent, voxels, space
            )
        return loss


def with_drawn_targets(loss: HybridLoss) -> Callable[[Tensor], Tensor]:
    """The loss of logits alone, to be timed: labels are drawn once for every shape, and all organs are annotated."""

    @functools.cache
    def targets(shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
        classes = len(loss.class_weights)
        labels = torch.randint(classes, (shape[0], 1, *shape[2:]), dtype=torch.uint8, device=device)
        return labels, torch.ones(shape[0], classes, dtype=torch.bool, device=device)

    @mean_over_cases
    def timed(logits: Tensor) -> Tensor:
        value: Tensor = loss(logits, targets(logits.shape, logits.device))
        return value

    return timed


def _merged(logits: Tensor, annotated: Tensor) -> tuple[Tensor, Tensor]:
    """Logits whose background stands for itself and all missing organs, and the mask in which it may be judged."""
    merged = []
    for case, known in zip(logits, annotated, strict=True):
        absent = ~known
        absent[0] = True
        scores = case.to(_working_dtype(case))
        background = scores[absent].logsumexp(0, keepdim=True)
        # Minus infinity is probability zero: a missing organ has no part of its own in what follows.
        organs = scores[1:].masked_fill(absent[1:, None, None, None], -torch.inf)
        merged.append(torch.cat([background, organs]))
    judged = annotated.clone()
    judged[:, 0] = True
    return torch.stack(merged), judged


class _HybridLoss(torch.autograd.Function):
    """The formula above with its derivative written out, piece by piece over the voxels.

    ``logits`` and ``labels`` are a rank's slab where there is a ``space``; ``voxels`` are those of the whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor,
        focal_weight: float,
        exponent: int,
        voxels: int,
        space: Space | None,
    ) -> Tensor:
        logits = _flattenable(logits)
        batch, n_classes = logits.shape[:2]
        # Float64 for what is added over millions of voxels: C numbers a case, so it costs nothing.
        sums = torch.zeros(4, batch, n_classes, dtype=torch.float64, device=logits.device)
        predicted, true, hit, focal_by_class = sums
        focal = focal_by_class[:, 0]  # one number a case, beside the others so that they travel together
        weights_here = weights.to(_working_dtype(logits))
        classes = torch.arange(n_classes, device=logits.device)[:, None]
        for case, piece in _pieces(logits):
            p, label, p_true, log_p_true = _softmax(logits, labels, case, piece)
            mask = label == classes
            predicted[case] += p.sum(1, dtype=torch.float64)
            true[case] += mask.sum(1)
            hit[case] += (p * mask).sum(1, dtype=torch.float64)
            weight = weights_here[case][label]
            focal[case] -= ((1 - p_true).pow(exponent) * log_p_true * weight).sum(dtype=torch.float64)

        if space is not None:
            predicted, true, hit, focal_by_class = space.sum(sums)
            focal = focal_by_class[:, 0]
        # An absent class has hit = 0 and stays at 0 whatever the clamp; a present one has at least half a voxel here.
        union = ((predicted + true) / 2).clamp_min(1e-30)
        dice = (weights * (1 - hit / union)).sum(1)
        ctx.save_for_backward(logits, labels, weights)
        ctx.by_predicted = weights * hit / (2 * union.square())  # d dice / d p_c at every voxel, through the union
        ctx.by_hit = -weights / union  # and at the class's own voxels, through the overlap
        ctx.focal_weight, ctx.exponent, ctx.voxels, ctx.space = focal_weight, exponent, voxels, space
        loss: Tensor = (dice + focal_weight / voxels * focal).mean().to(_working_dtype(logits))
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, weights = ctx.saved_tensors
        dtype, voxels, exponent = _working_dtype(logits), ctx.voxels, ctx.exponent
        of_loss = grad_outputs[0].double()
        if ctx.space is not None:  # each rank has a part of the gradient of what all have alike
            of_loss = ctx.space.sum(of_loss)
        scale = of_loss / logits.shape[0]
        by_predicted = (ctx.by_predicted * scale).to(dtype)
        by_hit = (ctx.by_hit * scale).to(dtype)
        by_focal = (weights * scale * (ctx.focal_weight / voxels)).to(dtype)
        grad = torch.empty_like(logits)
        for case, piece in _pieces(logits):
            p, label, p_true, log_p_true = _softmax(logits, labels, case, piece)
            # p_y * d loss / d p_y at the voxel's true class y. In the focal term the product is formed before anything
            # is divided by p_y, so a probability of zero is no special case.
            rest = 1 - p_true
            at_true = by_hit[case][label] * p_true
            slope_of_focal = -rest.pow(exponent)
            if exponent:
                slope_of_focal += exponent * rest.pow(exponent - 1) * p_true * log_p_true
            at_true += by_focal[case][label] * slope_of_focal
            everywhere = by_predicted[case][:, None]
            # Softmax: d loss / d z_c = p_c (d_c - sum_k p_k d_k).
            mean = (p * everywhere).sum(0).add_(at_true)
            slope = p.mul_(everywhere - mean).scatter_add_(0, label[None], at_true[None])
            grad[case].flatten(1)[:, piece] = slope
        return grad, None, None, None, None, None, None


def _softmax(logits: Tensor, labels: Tensor, case: int, piece: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one piece: probabilities (C, n), label (n,), and the label's probability and its logarithm (n,)."""
    # Pointwise operations and sums only: autocast, which lowers products, has nothing to touch here.
    scores = torch.log_softmax(logits[case].flatten(1)[:, piece].to(_working_dtype(logits)), 0)
    label = labels[case].flatten()[piece].long()
    log_p_true = scores.gather(0, label[None])[0]
    return scores.exp_(), label, log_p_true.exp(), log_p_true


def _pieces(logits: Tensor) -> Iterator[tuple[int, slice]]:
    """(case, slice of its flattened voxels), in order."""
    length = CPU_PIECE_VOXELS if logits.device.type == "cpu" else GPU_PIECE_VOXELS
    voxels = logits[0, 0].numel()
    for case in range(logits.shape[0]):
        for start in range(0, voxels, length):
            yield case, slice(start, min(start + length, voxels))


def _working_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _flattenable(logits: Tensor) -> Tensor:
    """Logits in a layout whose voxels flatten without a copy (either memory format does)."""
    if logits.is_contiguous() or logits.is_contiguous(memory_format=torch.channels_last_3d):
        return logits
    return logits.contiguous()
