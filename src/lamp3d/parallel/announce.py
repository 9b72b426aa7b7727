"""A pipeline's first worker tells the others the shapes of the micro-batches to come, without waiting for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lamp3d.errors import ConfigError

MicroBatchSpec = tuple[tuple[int, ...], torch.dtype]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int16, torch.int32)
_TAG = 2**30  # beyond the tags of values
_PENDING = 64


class Announcer:
    """Small messages from a pipeline's first worker to its others; they stay alive until they are read.

    Args:
        workers: of the pipeline, in order.
    """

    def __init__(self, workers: Sequence[int]) -> None:
        self._first, *self._others = workers
        self._pending: deque[tuple[dist.Work, Tensor]] = deque()

    def announce(self, micro_batches: Sequence[MicroBatchSpec], whole: bool) -> None:
        """Tell the other ranks the shape and dtype of every micro-batch to come; returns at once.

        Args:
            micro_batches: shape and dtype of each.
            whole: whether they are pieces of one tensor.
        """
        for _, dtype in micro_batches:
            if dtype not in _DTYPES:
                raise ConfigError(f"images of {dtype} cannot be given to the engine; convert them to float32.")
        head = torch.tensor([len(micro_batches), len(micro_batches[0][0]), int(whole)])
        body = torch.tensor([[*shape, _DTYPES.index(dtype)] for shape, dtype in micro_batches])
        for worker in self._others:
            for offset, message in enumerate((head, body)):
                work = dist.isend(message, worker, tag=_TAG + offset)
                assert work is not None
                self._pending.append((work, message))
        while len(self._pending) > _PENDING:
            self._pending.popleft()[0].wait()

    def flush(self) -> None:
        """Wait until all announcements have been heard: one that is dropped earlier never arrives."""
        while self._pending:
            self._pending.popleft()[0].wait()

    def hear(self) -> tuple[list[MicroBatchSpec], bool]:
        """What :meth:`announce` said on the first worker."""
        head = torch.empty(3, dtype=torch.int64)
        dist.recv(head, self._first, tag=_TAG)
        count, dimensions, whole = (int(number) for number in head)
        body = torch.empty((count, dimensions + 1), dtype=torch.int64)
        dist.recv(body, self._first, tag=_TAG + 1)
        return [(tuple(row[:-1]), _DTYPES[row[-1]]) for row in body.tolist()], bool(whole)
