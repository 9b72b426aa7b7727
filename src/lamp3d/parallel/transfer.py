"""Values on their way between ranks: posted early, sent without blocking, laid out so that the wire needs no copy.

A transfer is named by a tag that both ends compute alike. Gloo matches messages by tag; NCCL by order, for every
ordered pair of ranks on a communicator of its own, so that a receive that waits never stands in the way of a send. On
CUDA each of them works on a stream of its own, beside the one that computes: a send starts when what was queued before
it is done, and only ``Receipt.wait`` makes the computing stream wait.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from lamp3d.graph import ValueSpec
from lamp3d.parallel.groups import channel
from lamp3d.parallel.mesh import Place
from lamp3d.parallel.outbox import PolledOutbox, ThreadedOutbox


class Receipt:
    """A receive under way; ``wait`` gives the tensor."""

    def __init__(self, tensor: Tensor, work: dist.Work):
        self._tensor = tensor
        self._work: dist.Work | None = work

    def wait(self) -> Tensor:
        """The received tensor, once it is there (on CUDA: ordered on the current stream)."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._tensor


class Transfer:
    """Point-to-point messages of one rank.

    Args:
        device: where the tensors live.
        place: of this worker; ranks are those of its pipeline.
        pairs: the ordered (from, to) pairs of ranks that exchange values, the same in every pipeline.
    """

    def __init__(self, device: torch.device, place: Place, pairs: Iterable[tuple[int, int]]):
        self._outboxes: dict[int, ThreadedOutbox | PolledOutbox] = {}
        self._groups: dict[tuple[int, int], dist.ProcessGroup | None] = {}
        self.bytes_sent = 0
        self._place = place
        self._device = device
        for pipeline, pair in itertools.product(place.pipelines, sorted(set(pairs))):
            group = channel(pipeline[pair[0]], pipeline[pair[1]], device)
            if pipeline == place.pipeline:
                self._groups[pair] = group
                if pair[0] == place.pipe_rank:
                    self._outboxes[pair[1]] = PolledOutbox() if device.type == "cuda" else ThreadedOutbox()

    def send(self, tensor: Tensor, spec: ValueSpec, to: int, tag: int) -> None:
        """Send a tensor in the layout of ``spec``; returns at once."""
        wire = _wire(tensor.detach(), spec)
        group = self._groups[self._place.pipe_rank, to]
        work = dist.isend(wire, self._place.pipeline[to], group=group, tag=tag)
        assert work is not None
        self.bytes_sent += wire.nbytes
        self._outboxes[to].put(work, wire)

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
        for outbox in self._outboxes.values():
            outbox.flush()

    def hold_back(self, most: int) -> None:
        """Where more sends than that are under way to one destination, wait until they are done."""
        for outbox in self._outboxes.values():
            if len(outbox) > most:
                outbox.flush()


def _wire(tensor: Tensor, spec: ValueSpec) -> Tensor:
    """The tensor as contiguous memory: a channels-last volume is contiguous when its channels are moved to the end."""
    if spec.channels_last:
        return tensor.contiguous(memory_format=torch.channels_last_3d).permute(0, 2, 3, 4, 1)
    return tensor.contiguous()
