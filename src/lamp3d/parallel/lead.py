"""A whole program under ``torchrun``, on one machine or several: the first rank runs it, the others join its launches.

What lies between launches, such as plans and scores, is so decided and written once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lamp3d.errors import ConfigError, WorkerError
from lamp3d.parallel.worker import Result, join, telling_lost_peers, work

WAITING = timedelta(days=1)
"""How long ranks wait for the first one's next launch; where it fails, torchrun ends them."""

_Task = tuple[Callable[..., Any], tuple[Any, ...]]

_leads = False
_failed = False


def under_torchrun() -> bool:
    """Whether this process is one of ``torchrun``'s (or a worker that `launch` has started)."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def leads() -> bool:
    """Whether this process runs a program whose launches others join."""
    return _leads


def lead(program: Callable[[], object]) -> None:
    """Run a program on the first rank, while the others do their part of what it launches.

    Args:
        program: may end by `sys.exit`.
    """
    global _leads
    if int(os.environ["RANK"]):
        while (task := _handed_out(None)) is not None:
            _do(*task)
        return
    _leads = True
    try:
        program()
    except SystemExit as end:
        if end.code:
            raise  # torchrun ends the others
    _handed_out(None)
    sys.exit()


def share(fn: Callable[..., Result], devices: int, args: Sequence[Any]) -> list[Result]:
    """`launch` of the rank that leads: all ranks call a function.

    Args:
        fn: what to call.
        devices: as many as there are ranks.
        args: of the function; picklable.

    Returns:
        the results by rank.

    Raises:
        ConfigError: ``devices`` are not as many as ranks.
        WorkerError: an earlier launch has failed, so that the others listen no more.
    """
    global _failed
    ranks = int(os.environ["WORLD_SIZE"])
    if devices != ranks:
        raise ConfigError(f"torchrun has started {ranks} workers, not {devices}: give --devices {ranks}.")
    if _failed:
        raise WorkerError("the workers that torchrun has started are lost; start it again (a training with --resume).")
    _failed = True  # until it has not
    _handed_out((fn, tuple(args)))
    results = _do(fn, tuple(args))
    _failed = False
    return results


def _handed_out(task: _Task | None) -> _Task | None:
    """What the first rank gives all to do; None is the end."""
    box = [task]
    with telling_lost_peers():
        join(WAITING)
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def _do(fn: Callable[..., Result], args: tuple[Any, ...]) -> list[Result]:
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, work(fn, args, WAITING))
    return results
