"""Sends under way, let go of as soon as they have arrived.

Gloo's send only says that it is done to whoever waits for it, so on a CPU a thread for each destination does. Messages
to one destination arrive in the order in which they are sent: the receiver asks for them in that order.
"""

from __future__ import annotations

import weakref
from collections import deque
from queue import Queue
from threading import Thread

import torch.distributed as dist
from torch import Tensor

Parcel = tuple[dist.Work, Tensor]


class ThreadedOutbox:
    """Sends to one destination, with a thread that waits for them."""

    def __init__(self) -> None:
        self._queue: Queue[Parcel | None] = Queue()
        self._errors: list[Exception] = []
        Thread(target=_wait_for_all, args=(self._queue, self._errors), daemon=True, name="lamp3d-outbox").start()
        weakref.finalize(self, self._queue.put, None)

    def put(self, work: dist.Work, tensor: Tensor) -> None:
        """One more."""
        self._queue.put((work, tensor))

    def __len__(self) -> int:
        """How many are under way."""
        return self._queue.unfinished_tasks

    def flush(self) -> None:
        """Wait until all have arrived; raises what went wrong with any of them."""
        self._queue.join()
        if self._errors:
            raise self._errors[0]


class PolledOutbox:
    """The same for a backend whose sends say by themselves when they are done (NCCL)."""

    def __init__(self) -> None:
        self._pending: deque[Parcel] = deque()

    def put(self, work: dist.Work, tensor: Tensor) -> None:
        """One more; those that have arrived are let go of."""
        self._pending.append((work, tensor))
        while self._pending and self._pending[0][0].is_completed():
            self._pending.popleft()[0].wait()

    def __len__(self) -> int:
        """How many are under way."""
        return len(self._pending)

    def flush(self) -> None:
        """Wait until all have arrived."""
        while self._pending:
            self._pending.popleft()[0].wait()


def _wait_for_all(queue: Queue[Parcel | None], errors: list[Exception]) -> None:
    """The thread's work; it must not hold on to the last parcel while it waits for the next."""
    while _wait_for_next(queue, errors):
        pass


def _wait_for_next(queue: Queue[Parcel | None], errors: list[Exception]) -> bool:
    parcel = queue.get()
    if parcel is not None:
        try:
            parcel[0].wait()
        except Exception as error:  # a lost peer: for the engine to tell
            errors.append(error)
    more = parcel is not None
    del parcel
    queue.task_done()
    return more
