"""Values on their way between ranks: posted early, sent without blocking, laid out so that the wire needs no copy.

A transfer is named by a tag that both ends compute alike. Gloo matches messages by tag, so one group serves all. NCCL
matches them by order, so every ordered pair of ranks has a communicator of its own: a receive that waits then never
stands in the way of a send.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from lamp3d.graph import ValueSpec
from lamp3d.parallel.mesh import Place


class Receipt:
    """A receive under way; ``wait`` gives the tensor."""

    def __init__(self, tensor: Tensor, work: dist.Work):
        self._tensor = tensor
        self._work = work

    def wait(self) -> Tensor:
        """The received tensor, once it is there (on CUDA: ordered on the current stream)."""
        self._work.wait()
        return self._tensor


class Transfer:
    """Point-to-point messages of one rank.

    Args:
        device: where the tensors live.
        place: of this worker; ranks are those of its pipeline.
        pairs: the ordered (from, to) pairs of ranks that exchange values, the same in every pipeline.
        pending: how many sends may be under way before the oldest is waited for; bounds the memory they hold.
    """

    def __init__(self, device: torch.device, place: Place, pairs: Iterable[tuple[int, int]], pending: int = 32):
        self._pending: deque[tuple[dist.Work, Tensor]] = deque()
        self._limit = pending
        self._groups: dict[tuple[int, int], dist.ProcessGroup | None] = {}
        self.bytes_sent = 0
        self._place = place
        self._device = device
        for pipeline, pair in itertools.product(place.pipelines, sorted(set(pairs))):
            # new_group is collective: every worker makes every group, in the same order.
            ends = [pipeline[rank] for rank in pair]
            group = dist.new_group(ends, backend="nccl") if device.type == "cuda" else None
            if pipeline == place.pipeline:
                self._groups[pair] = group

    def send(self, tensor: Tensor, spec: ValueSpec, to: int, tag: int) -> None:
        """Send a tensor in the layout of ``spec``; returns at once."""
        wire = _wire(tensor.detach(), spec)
        group = self._groups[self._place.pipe_rank, to]
        work = dist.isend(wire, self._place.pipeline[to], group=group, tag=tag)
        assert work is not None
        self.bytes_sent += wire.nbytes
        self._pending.append((work, wire))
        while self._pending and (self._pending[0][0].is_completed() or len(self._pending) > self._limit):
            self._pending.popleft()[0].wait()

    def receive(self, spec: ValueSpec, origin: int, tag: int) -> Receipt:
        """Post a receive of a tensor as ``spec`` describes it; returns at once."""
        layout = torch.channels_last_3d if spec.channels_last else torch.contiguous_format
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self._device, memory_format=layout)
        group = self._groups[origin, self._place.pipe_rank]
        work = dist.irecv(_wire(tensor, spec), self._place.pipeline[origin], group=group, tag=tag)
        assert work is not None
        return Receipt(tensor, work)

    def flush(self) -> None:
        """Wait until all sends are done and let go of their tensors."""
        while self._pending:
            self._pending.popleft()[0].wait()


def _wire(tensor: Tensor, spec: ValueSpec) -> Tensor:
    """The tensor as contiguous memory: a channels-last volume is contiguous when its channels are moved to the end."""
    if spec.channels_last:
        return tensor.contiguous(memory_format=torch.channels_last_3d).permute(0, 2, 3, 4, 1)
    return tensor.contiguous()
