"""Data parallelism: the gradients of equal pipelines, averaged while the rest of the backward runs.

Every replica takes its share of a mini-batch and weighs its loss with it, so that the gradients' sum over the replicas
is the mini-batch's. A stage's parameters are summed in buckets, each as soon as the last backward has reached all of
its parameters, last layers first (the way of torch's ``DistributedDataParallel``).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

BUCKET_BYTES = 25 * 10**6


@dataclass(eq=False)
class _Bucket:
    """Parameters that are summed in one message."""

    parameters: list[nn.Parameter]
    missing: set[nn.Parameter] = field(default_factory=set)
    """Those that the last backward has yet to reach."""
    flat: Tensor | None = None
    work: dist.Work | None = None

    def start(self, group: dist.ProcessGroup) -> None:
        """Begin to sum.

        Other replicas may have gradients where this one has none, so that all parameters are summed, and for each how
        many replicas have it.
        """
        here = torch.tensor([parameter.grad is not None for parameter in self.parameters])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.flat = torch.cat([*(gradient.flatten() for gradient in gradients), here.to(gradients[0])])
        self.work = dist.all_reduce(self.flat, group=group, async_op=True)

    def finish(self) -> None:
        """Wait for the sum and hand it to the parameters that have a gradient anywhere."""
        assert self.flat is not None
        assert self.work is not None
        self.work.wait()
        *sums, counts = torch.split(self.flat, [*(p.numel() for p in self.parameters), len(self.parameters)])
        for index, (parameter, summed) in enumerate(zip(self.parameters, sums, strict=True)):
            if parameter.grad is not None:
                parameter.grad.copy_(summed.view(parameter.shape))
            elif counts[index]:
                parameter.grad = torch.empty_like(parameter).copy_(summed.view(parameter.shape))


class GradientSum:
    """The sum over replicas of one step's gradients on one rank.

    Args:
        group: the ranks that hold the same stages, one of each replica.
        stages: this rank's parameters, by stage.
    """

    def __init__(self, group: dist.ProcessGroup, stages: Mapping[int, Sequence[nn.Parameter]]):
        self._group = group
        uses = Counter(parameter for parameters in stages.values() for parameter in parameters)
        self._buckets = {
            stage: _buckets([p for p in reversed(parameters) if uses[p] == 1]) for stage, parameters in stages.items()
        }
        # What several stages of this rank use is complete with the last of them.
        self._shared = _buckets([parameter for parameter, count in uses.items() if count > 1])
        every = ((stage, bucket) for stage, buckets in self._buckets.items() for bucket in buckets)
        self._of = {p: (stage, bucket) for stage, bucket in every for p in bucket.parameters}
        # The gradients that were there before: they have been summed already.
        self._before = {parameter: parameter.grad for parameter in uses if parameter.grad is not None}
        for parameter in self._before:
            parameter.grad = None
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(self._reached)  # type: ignore[no-untyped-call]
            for parameter in self._of
            if parameter.requires_grad
        ]

    def last_backward(self, stage: int) -> None:
        """The next action is the stage's last one."""
        for bucket in self._buckets[stage]:
            bucket.missing = set(bucket.parameters)

    def complete(self, stage: int) -> None:
        """The stage's gradients are complete."""
        self._start(self._buckets[stage])

    def finish(self) -> None:
        """Wait until every parameter's gradient is the sum, added to what was there before."""
        self._start(self._shared)
        for bucket in [*(bucket for buckets in self._buckets.values() for bucket in buckets), *self._shared]:
            bucket.finish()
        for parameter, before in self._before.items():
            if parameter.grad is not None:
                before += parameter.grad
        self.discard()

    def discard(self) -> None:
        """Leave nothing behind on the parameters but what was there before."""
        for handle in self._handles:
            handle.remove()
        for parameter, before in self._before.items():
            parameter.grad = before

    def _reached(self, parameter: nn.Parameter) -> None:
        stage, bucket = self._of[parameter]
        if bucket.missing:
            bucket.missing.discard(parameter)
            if not bucket.missing:
                self._start(itertools.takewhile(lambda other: not other.missing, self._buckets[stage]))

    def _start(self, buckets: Iterable[_Bucket]) -> None:
        """All that have not begun, in the same order on every replica."""
        for bucket in buckets:
            if bucket.work is None:
                bucket.start(self._group)


def _buckets(parameters: Sequence[nn.Parameter]) -> list[_Bucket]:
    buckets: list[_Bucket] = []
    size = 0
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        same = buckets and buckets[-1].parameters[0].dtype == parameter.dtype
        if same and size + parameter.nbytes <= BUCKET_BYTES:
            buckets[-1].parameters.append(parameter)
            size += parameter.nbytes
        else:
            buckets.append(_Bucket([parameter]))
            size = parameter.nbytes
    return buckets
