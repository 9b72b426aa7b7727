"""The ranks that share one volume, and the messages between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Place = tuple[int, ...]
"""A rank's coordinate in the mesh of those that share a volume."""


class Space:
    """This rank's place among those that share a volume, and its messages to them.

    On fake tensors nothing is sent: shapes alone are worked out.

    Args:
        sizes: of the mesh, such as (4,) or (2, 2).
        dims: for each of its axes, the dimension of a (B, C, D, H, W) tensor that is spread over it: 2, 3 or 4.
        workers: of the mesh, in order, the last axis fastest.
        rank: this worker.
        group: of these workers (None: all there are, or there is but one).
        least: planes that the thinnest slab must have; a level with fewer is gathered, and computed by every rank.
        channels_last: how volumes are mostly laid out; planes travel in that order.

    Attributes:
        coordinate: of this rank in the mesh.
        bytes_sent, messages: so far.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        dims: Sequence[int],
        workers: Sequence[int],
        rank: int,
        group: dist.ProcessGroup | None = None,
        *,
        least: int = 1,
        channels_last: bool = False,
    ) -> None:
        self.sizes, self.dims = tuple(sizes), tuple(dims)
        self.least, self.channels_last = least, channels_last
        assert len(workers) == math.prod(sizes), (workers, sizes)
        self._at = dict(zip(itertools.product(*(range(size) for size in sizes)), workers, strict=True))
        self.coordinate = next(place for place, worker in self._at.items() if worker == rank)
        self._group = group
        self.bytes_sent = self.messages = 0

    @property
    def count(self) -> int:
        """How many ranks share the volume."""
        return math.prod(self.sizes)

    @property
    def index(self) -> int:
        """This rank's number among them."""
        return list(self._at).index(self.coordinate)

    def along(self, axis: int, index: int) -> Place:
        """The place of another rank along one axis of the mesh."""
        return (*self.coordinate[:axis], index, *self.coordinate[axis + 1 :])

    def exchange(self, sends: Mapping[Place, Tensor], receives: Mapping[Place, Tensor]) -> Exchange:
        """Send tensors to other ranks, and receive others from them; returns at once.

        Args:
            sends: planes of volumes, by the receiver's place; copied where they do not lie as they travel.
            receives: room for planes, laid out as they travel, by the sender's place.
        """
        if any(isinstance(tensor, FakeTensor) for tensor in (*sends.values(), *receives.values())):
            return Exchange([], [])
        sends, receives = (
            {place: self._on_the_wire(tensor) for place, tensor in given.items()} for given in (sends, receives)
        )
        operations = [
            *(dist.P2POp(dist.irecv, tensor, self._at[place], self._group) for place, tensor in receives.items()),
            *(dist.P2POp(dist.isend, tensor, self._at[place], self._group) for place, tensor in sends.items()),
        ]
        self.bytes_sent += sum(tensor.nbytes for tensor in sends.values())
        self.messages += len(sends)
        if not operations:
            return Exchange([], [])
        return Exchange(dist.batch_isend_irecv(operations), list(sends.values()))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in a tensor of its own."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def maximum(self, tensor: Tensor) -> Tensor:
        """The largest over all ranks, in a tensor of its own."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def stack(self, tensor: Tensor) -> Tensor:
        """Everyone's tensor, in the order of the ranks, along a new first axis."""
        every = tensor.new_zeros((self.count, *tensor.shape))
        every[self.index] = tensor
        return self._reduced(every, dist.ReduceOp.SUM, own=True)

    def _on_the_wire(self, planes: Tensor) -> Tensor:
        """Planes as contiguous memory, in an order agreed for all: by their strides, ranks would disagree."""
        return (planes.movedim(1, -1) if self.channels_last else planes).contiguous()

    def _reduced(self, tensor: Tensor, how: dist.ReduceOp.RedOpType, *, own: bool = False) -> Tensor:
        tensor = tensor if own else tensor.clone(memory_format=torch.contiguous_format)
        if self.count > 1 and not isinstance(tensor, FakeTensor):
            dist.all_reduce(tensor, how, group=self._group)
            self.bytes_sent += 2 * tensor.nbytes * (self.count - 1) // self.count  # a ring's
            self.messages += 1
        return tensor


class Exchange:
    """Messages under way."""

    def __init__(self, works: Sequence[dist.Work], alive: list[Tensor]) -> None:
        self._works = works
        self._alive = alive  # what is sent must stay until it has been

    def wait(self) -> None:
        """Wait until all have arrived."""
        for work in self._works:
            work.wait()
        self._alive.clear()
