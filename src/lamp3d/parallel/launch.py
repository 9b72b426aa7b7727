"""Starting worker processes with torch's elastic launcher, and saying clearly what happened when one fails."""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lamp3d import errors
from lamp3d.errors import ConfigError, DeviceMemoryError, LampError, PlanError, WorkerError, WorkerKilledError
from lamp3d.graph.allocator import keep_freed_memory, return_freed_memory
from lamp3d.plan.hardware import device_count, device_type, worker_threads, workers_per_gpu

Result = TypeVar("Result")

OUT_OF_MEMORY = ("can't allocate memory", "could not create a primitive", "could not create a memory", "bad_alloc")
"""What torch, oneDNN (on cells that had been timed before) and C++ say when a CPU's memory runs out."""

LOST_PEER_SECONDS = 5.0
"""How long a worker that has lost a peer waits for the launcher to find the peer's own failure, which is the cause."""


def launch(
    fn: Callable[..., Result], devices: int, args: Sequence[Any] = (), *, timeout: timedelta = timedelta(hours=1)
) -> list[Result]:
    """Run ``fn(*args)`` in ``devices`` worker processes, one a device, joined in a ``torch.distributed`` group.

    With ``devices=1`` it runs in this process and without a group; on a CPU the process keeps the memory that it
    frees from then on (:mod:`lamp3d.graph.allocator`). Under ``torchrun`` every process is a worker
    already: ``fn`` runs in it, and the list holds this worker's result alone.

    Args:
        fn: a function at module level (workers import it).
        devices: number of workers; on CUDA at most the devices of this machine.
        args: passed to every worker; must be picklable.
        timeout: after which a collective operation without progress fails.

    Returns:
        the results by rank.

    Raises:
        ConfigError: workers cannot import ``fn``.
        LampError: as the worker raised it.
        DeviceMemoryError: a worker ran out of memory.
        WorkerError: a worker failed otherwise (its own traceback is in the message) or was killed. All others have
            been ended.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ:
        return [_work(fn, args, timeout)]
    kind = device_type()
    if kind == "cuda" and devices > device_count(kind):
        raise PlanError(f"{devices} devices asked for, but this machine has {device_count(kind)}; use that many.")
    if devices == 1:
        if kind == "cpu":
            keep_freed_memory()
        return [_reporting_memory(fn, args)]
    _check_importable(fn)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(),
        local_addr="localhost",
    )
    # The launcher's own report of a failure says less than the error that follows.
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):  # which has its own level
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        results: dict[int, Result] = elastic_launch(config, _work)(fn, tuple(args), timeout)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise _worker_error(rank, failure) from None
    return [results[rank] for rank in sorted(results)]


def _check_importable(fn: Callable[..., Any]) -> None:
    """Refuse what a new interpreter could not import; it would fail with a traceback that says nothing."""
    name = getattr(fn, "__qualname__", repr(fn))
    if "<locals>" in name or "<lambda>" in name:
        raise ConfigError(f"workers import the function that they run: move {name} to the top level of its module.")
    file = getattr(sys.modules["__main__"], "__file__", None)
    if (file is None and getattr(fn, "__module__", "") == "__main__") or (file and not Path(file).exists()):
        raise ConfigError(
            f"workers import the function that they run, and the program around them, but no file has {name}'s "
            "program (a notebook, a prompt, or standard input): save it to one and run that."
        )


def _work(fn: Callable[..., Result], args: Sequence[Any], timeout: timedelta) -> Result:
    """A worker's life: its device, its threads, its group, its work."""
    local_rank, workers = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device_type() == "cuda":
        sharing = workers_per_gpu()
        if sharing > 1:  # NCCL refuses two ranks on one GPU of one machine
            os.environ["NCCL_HOSTID"] = f"{socket.gethostname()}-{local_rank}"
        torch.cuda.set_device(local_rank // sharing)
        torch.cuda.init()  # type: ignore[no-untyped-call]
        backend = "cpu:gloo,cuda:nccl"
    else:
        torch.set_num_threads(worker_threads(workers))
        keep_freed_memory()
        backend = "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timeout)
        # Under torchrun the next launch in this process uses the same group: a second one would meet the addresses
        # of the first in torchrun's store.
        atexit.register(_leave_group)
    try:
        result = _reporting_memory(fn, args)
    except RuntimeError as error:
        if _lost_peer(error):
            time.sleep(LOST_PEER_SECONDS)
        raise
    dist.all_reduce(torch.zeros(1))  # no one leaves while another still wants to hear from it
    return result


def _reporting_memory(fn: Callable[..., Result], args: Sequence[Any]) -> Result:
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
    return any(sign in str(error).lower() for sign in signs)


def _worker_error(rank: int, failure: ProcessFailure) -> LampError:
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        reason = " (often the system's reaction to memory running out)" if name == "SIGKILL" else ""
        kind_of_error = WorkerKilledError if name == "SIGKILL" else WorkerError
        return kind_of_error(
            f"worker {rank} was killed by {name}{reason}; all other workers have been ended. Nothing that was saved is "
            "lost: a training run goes on with --resume."
        )
    try:
        with open(failure.error_file) as file:
            details = json.load(file)["message"]
        text = details["extraInfo"]["py_callstack"]
        name, _, message = details["message"].partition(": ")
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, LampError):
            return kind(message)  # the user's to put right: the message says all
    except (OSError, ValueError, KeyError, TypeError):
        text = str(failure.message)
    return WorkerError(f"worker {rank} failed; all other workers have been ended. Its traceback:\n{text}")
