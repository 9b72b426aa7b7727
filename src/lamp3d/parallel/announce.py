"""A pipeline's first worker tells the others the shapes of the micro-batches to come, without waiting for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lamp3d.errors import ConfigError, PlanError
from lamp3d.graph.shapes import InputSpec

MicroBatchSpec = tuple[InputSpec, ...]
"""Shape and dtype of every input of one micro-batch."""

_DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool,
)  # fmt: skip
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
        """Tell the other ranks the shapes and dtypes of every micro-batch to come; returns at once.

        Args:
            micro_batches: of each.
            whole: whether they are pieces of one mini-batch.

        Raises:
            ConfigError: a dtype that cannot be announced.
        """
        body = [len(micro_batches), int(whole)]
        for inputs in micro_batches:
            body.append(len(inputs))
            for shape, dtype in inputs:
                if dtype not in _DTYPES:
                    raise ConfigError(f"images of {dtype} cannot be given to the engine; convert them to float32.")
                body += [_DTYPES.index(dtype), len(shape), *shape]
        self._send([len(body)], body)

    def refuse(self) -> None:
        """Tell the other ranks that there is nothing to come, and wait until they have heard."""
        self._send([0])
        self.flush()

    def flush(self) -> None:
        """Wait until all announcements have been heard: one that is dropped earlier never arrives."""
        while self._pending:
            self._pending.popleft()[0].wait()

    def hear(self) -> tuple[list[MicroBatchSpec], bool]:
        """What :meth:`announce` said on the first worker.

        Raises:
            PlanError: it has refused what it was given.
        """
        (length,) = self._receive(1, 0)
        if not length:
            raise PlanError(f"worker {self._first} has refused the mini-batch; its own message says why.")
        numbers = iter(self._receive(length, 1))
        count, whole = next(numbers), bool(next(numbers))
        micro_batches = []
        for _ in range(count):
            inputs = []
            for _ in range(next(numbers)):
                dtype, dimensions = _DTYPES[next(numbers)], next(numbers)
                inputs.append((tuple(next(numbers) for _ in range(dimensions)), dtype))
            micro_batches.append(tuple(inputs))
        return micro_batches, whole

    def _send(self, *messages: list[int]) -> None:
        for worker in self._others:
            for offset, numbers in enumerate(messages):
                message = torch.tensor(numbers)
                work = dist.isend(message, worker, tag=_TAG + offset)
                assert work is not None
                self._pending.append((work, message))
        while len(self._pending) > _PENDING:
            self._pending.popleft()[0].wait()

    def _receive(self, length: int, offset: int) -> list[int]:
        message = torch.empty(length, dtype=torch.int64)
        dist.recv(message, self._first, tag=_TAG + offset)
        return [int(number) for number in message]
