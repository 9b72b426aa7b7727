"""What all ranks must agree on before a step may change anything: a finite loss, finite gradients, and their norm."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lamp3d.errors import RESUMED
from lamp3d.parallel import Engine
from lamp3d.train.curriculum import TrainConfig

CASES_SHOWN = 5


@dataclass(frozen=True)
class StepCheck:
    """One step as all ranks see it."""

    loss: float
    gradient_norm: float
    """Of the whole network."""
    first_bad_gradient: str | None
    """The first parameter, in the network's order, whose gradient is not finite."""
    peak_bytes: list[int]
    """Peak memory by rank."""

    @property
    def finite(self) -> bool:
        """Whether the step may be made."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)

    def __str__(self) -> str:
        bad = "" if self.first_bad_gradient is None else f", first non-finite gradient: {self.first_bad_gradient}"
        return f"loss {self.loss:g}{bad}"


def check_step(engine: Engine, names: Sequence[str], loss: Tensor) -> StepCheck:
    """Share loss, gradients' norms and peak memory in one small all-reduce.

    Every parameter has a place of its own in the vector that is summed, and all others add exact zeros to it: the norm
    does not depend on which rank a parameter lies on.

    Args:
        engine: after its `step`.
        names: all parameters of the network, the same on every rank.
        loss: 0-dim, the same on every rank; a non-finite one on any rank counts for all.
    """
    place = {name: index for index, name in enumerate(names)}
    shared = torch.zeros(len(names) + 1 + engine.world_size, dtype=torch.float64)
    counted = engine.parameters.items() if engine.is_first_copy else ()  # the others' gradients are the same
    own = [(place[name], p.grad) for name, p in counted if p.grad is not None]
    if own:
        places, gradients = zip(*own, strict=True)
        norms = [torch.linalg.vector_norm(gradient).double() for gradient in gradients]
        shared[list(places)] = torch.stack(norms).cpu().square()
    shared[len(names)] = 0 * loss.detach().cpu()  # zero, or not a number
    shared[len(names) + 1 + engine.rank] = engine.peak_bytes()
    if dist.is_initialized():
        dist.all_reduce(shared)
    squares = shared[: len(names)]
    bad = (~squares.isfinite()).nonzero()
    return StepCheck(
        loss=float(loss.detach() + shared[len(names)].to(loss.device)),
        gradient_norm=float(squares.sum().sqrt()),
        first_bad_gradient=names[int(bad[0])] if len(bad) else None,
        peak_bytes=[int(x) for x in shared[len(names) + 1 :]],
    )


@torch.no_grad()
def clip_gradients(parameters: Mapping[str, nn.Parameter], norm: float, limit: float) -> None:
    """Scale this rank's gradients so that the whole network's norm is at most the limit."""
    if norm > limit:
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(limit / norm)


def diagnosis(config: TrainConfig, stage: int, precision: str, when: str, last: StepCheck, cases: Sequence[str]) -> str:
    """Why a run of bad steps stops the training, and what to try.

    Args:
        config: settings of the run.
        stage: index into the curriculum.
        precision: that the engine computes in.
        when: epoch and step.
        last: the last of the bad steps.
        cases: names in all of them, with repetitions.
    """
    counted = Counter(cases).most_common()
    named = ", ".join(f"{name} ({n}x)" if n > 1 else name for name, n in counted[:CASES_SHOWN])
    more = f" and {len(counted) - CASES_SHOWN} more" if len(counted) > CASES_SHOWN else ""
    rate = config.curriculum[stage].learning_rate
    advice = []
    if precision != "fp32":
        advice.append(f"train.precision=fp32 (it is {precision})")
    advice.append(f"train.curriculum.{stage}.learning_rate={rate / 3:.1g} (it is {rate:g})")
    if config.clip_norm is None:
        advice.append("train.clip_norm=1 (it is off)")
    if len(counted) <= CASES_SHOWN:
        advice.append("a look at these few cases for broken intensities or labels")
    return (
        f"{config.max_bad_steps} steps in a row had a non-finite loss or gradient; they changed nothing. "
        f"Stage {stage + 1} of {len(config.curriculum)} ({config.curriculum[stage]}), precision {precision}, {when}; "
        f"the last one: {last}. Cases: {named}{more}. "
        f"To try: {'; '.join(advice)}. Then go on from the last checkpoint {RESUMED}."
    )
