"""Starting worker processes with torch's elastic launcher, and saying clearly what happened when one fails."""

from __future__ import annotations

import json
import logging
import signal
import sys
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lamp3d import errors
from lamp3d.errors import RESUMED, ConfigError, LampError, PlanError, WorkerError, WorkerKilledError
from lamp3d.graph.allocator import keep_freed_memory
from lamp3d.parallel.lead import leads, share, under_torchrun
from lamp3d.parallel.worker import Result, join, reporting_memory, work
from lamp3d.plan.hardware import device_count, device_type


def launch(
    fn: Callable[..., Result], devices: int, args: Sequence[Any] = (), *, timeout: timedelta = timedelta(hours=1)
) -> list[Result]:
    """Run ``fn(*args)`` in ``devices`` worker processes, one a device, joined in a ``torch.distributed`` group.

    With ``devices=1`` it runs in this process and without a group; on a CPU the process keeps the memory that it
    frees from then on (:mod:`lamp3d.graph.allocator`). Under ``torchrun`` every process is a worker
    already: ``fn`` runs in it, with the first one's ``args`` (each would have made a plan of its own), and the list
    holds this worker's result alone (but see :mod:`lamp3d.parallel.lead`).

    Args:
        fn: a function at module level (workers import it, and the program around it: what starts them stands under
            ``if __name__ == "__main__":``).
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
    if under_torchrun():
        return share(fn, devices, args) if leads() else [work(fn, _of_the_first(args, timeout), timeout)]
    kind = device_type()
    if kind == "cuda" and devices > device_count(kind):
        raise PlanError(f"{devices} devices asked for, but this machine has {device_count(kind)}; use that many.")
    if devices == 1:
        if kind == "cpu":
            keep_freed_memory()
        return [reporting_memory(fn, args)]
    _check_importable(fn)
    # The launcher's own report of a failure says less than the error that follows.
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):  # which has its own level
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with TemporaryDirectory(prefix="lamp3d-") as logs:
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
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            local_addr="localhost",
        )
        try:
            results: dict[int, Result] = elastic_launch(config, work)(fn, tuple(args), timeout)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise _worker_error(rank, failure) from None
    return [results[rank] for rank in sorted(results)]


def _of_the_first(args: Sequence[Any], timeout: timedelta) -> Sequence[Any]:
    """The first worker's arguments."""
    join(timeout)
    box = [tuple(args)]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


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


def _worker_error(rank: int, failure: ProcessFailure) -> LampError:
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        reason = " (often the system's reaction to memory running out)" if name == "SIGKILL" else ""
        kind_of_error = WorkerKilledError if name == "SIGKILL" else WorkerError
        return kind_of_error(
            f"worker {rank} was killed by {name}{reason}; all other workers have been ended. Nothing that was saved is "
            f"lost: a training run goes on {RESUMED}."
        )
    try:
        with open(failure.error_file, encoding="utf-8") as file:
            details = json.load(file)["message"]
        text = details["extraInfo"]["py_callstack"]
        name, _, message = details["message"].partition(": ")
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, LampError):
            return kind(message)  # the user's to put right: the message says all
    except FileNotFoundError:  # it did not come as far as to leave one
        text = f"none; it ended with exit status {failure.exitcode}, and what it wrote is above."
    except (OSError, ValueError, KeyError, TypeError):
        text = str(failure.message)
    return WorkerError(f"worker {rank} failed; all other workers have been ended. Its traceback:\n{text}")
