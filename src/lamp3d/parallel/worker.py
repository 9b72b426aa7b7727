"""A worker's life: its device, its threads, its group, its work, and what it says when its memory runs out."""

from __future__ import annotations

import atexit
import gc
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lamp3d.errors import RESUMED, DeviceMemoryError, PlanError, WorkerError
from lamp3d.graph.allocator import keep_freed_memory, return_freed_memory
from lamp3d.parallel.groups import set_timeout
from lamp3d.plan.hardware import device_type, worker_threads, workers_per_gpu

Result = TypeVar("Result")

OUT_OF_MEMORY = ("can't allocate memory", "could not create a primitive", "could not create a memory", "bad_alloc")
"""What torch, oneDNN (on cells that had been timed before) and C++ say when a CPU's memory runs out."""

LOST_PEER_SECONDS = 5.0
"""How long a worker that has lost a peer waits for the launcher to find the peer's own failure, which is the cause."""


def work(fn: Callable[..., Result], args: Sequence[Any], timeout: timedelta) -> Result:
    """Call a function as one of several workers, which all call it.

    Args:
        fn: what to call.
        args: of it.
        timeout: of collective operations.
    """
    join(timeout)
    with telling_lost_peers():
        result = reporting_memory(fn, args)
        dist.all_reduce(torch.zeros(1))  # no one leaves while another still wants to hear from it
    return result


def join(timeout: timedelta) -> None:
    """Take this rank's device and threads, and join the others' group."""
    if dist.is_initialized():
        return
    local_rank, workers = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device_type() == "cuda":
        sharing = workers_per_gpu()
        if sharing > 1:  # NCCL refuses two ranks on one GPU of one machine
            os.environ["NCCL_HOSTID"] = f"{socket.gethostname()}-{local_rank}"
        if local_rank // sharing >= torch.cuda.device_count():
            raise PlanError(
                f"worker {local_rank} of this machine has no GPU: it sees {torch.cuda.device_count()} for {workers} "
                "workers; start as many as it has (--nproc-per-node), and let each see all of them."
            )
        torch.cuda.set_device(local_rank // sharing)
        torch.cuda.init()  # type: ignore[no-untyped-call]
        backend = "cpu:gloo,cuda:nccl"
    else:
        torch.set_num_threads(worker_threads(workers))
        keep_freed_memory()
        backend = "gloo"
    dist.init_process_group(backend, timeout=timeout)
    set_timeout(timeout)
    # Under torchrun the next launch in this process uses the same group: a second one would meet the addresses of the
    # first in torchrun's store.
    atexit.register(_leave_group)


@contextmanager
def telling_lost_peers() -> Iterator[None]:
    """That a peer has gone is said in words, where no launcher knows better: under torchrun, on another machine.

    Raises:
        WorkerError: one has.
    """
    try:
        yield
    except RuntimeError as error:
        if not _lost_peer(error):
            raise
        time.sleep(LOST_PEER_SECONDS)
        said = str(error).splitlines()[0]
        raise WorkerError(
            f"a worker lost another one, and why is said there, or on its machine ({said}). Nothing that was saved is "
            f"lost: a training run goes on {RESUMED}."
        ) from error


def reporting_memory(fn: Callable[..., Result], args: Sequence[Any]) -> Result:
    """Call a function; that memory ran out is said in words that tell what to do."""
    try:
        return fn(*args)
    except (RuntimeError, MemoryError) as error:
        first = (str(error).splitlines() or [""])[0]
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in first for sign in OUT_OF_MEMORY):
            rank = dist.get_rank() if dist.is_initialized() else 0
            _let_go(error)
            raise DeviceMemoryError(
                f"device {rank} ran out of memory: {first}. Set a lower limit (memory), so that the plan recomputes "
                "more or uses more devices; or take smaller volumes or batches."
            ) from error
        raise


def _let_go(error: BaseException) -> None:
    """Empty the frames that a failure came through: with what they hold, a safer plan would have no room either."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    gc.collect()
    if device_type() == "cuda":
        torch.cuda.empty_cache()
    else:
        return_freed_memory()


def _leave_group() -> None:
    if dist.is_initialized():
        gc.collect()  # a dropped engine's transfers hold on to the group; let them go before it
        dist.destroy_process_group()


def _lost_peer(error: BaseException) -> bool:
    signs = (
        "connection closed by peer",
        "connection reset by peer",
        "broken pipe",
        "remote process has exited",
        "socket",
    )
    return isinstance(error, dist.DistNetworkError) or any(sign in str(error).lower() for sign in signs)
