"""Process groups, each made once and, on CUDA, connected at once.

An engine that follows another on the same workers uses the same groups: they would otherwise stay, with their sockets
and threads (or a communicator's buffers), until the process ends.

NCCL connects two ranks at their first message, and both wait for each other meanwhile, so ranks whose first messages
are not to each other could wait in a circle. Here every worker connects all groups in the same order.

All functions are collective: every worker calls them with the same arguments, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

Made = TypeVar("Made")

_made: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Any, ...], Any]] = WeakKeyDictionary()
"""By the default group, with which all others end."""

_timeout: timedelta | None = None


def channel(origin: int, to: int, device: torch.device) -> dist.ProcessGroup | None:
    """What carries messages from one worker to another, and nothing else; on a CPU the default group (None).

    Gloo tells messages apart by their tags. NCCL does by their order, so that a receive which waits would hold up what
    goes the other way.
    """
    if device.type != "cuda":
        return None

    def make() -> dist.ProcessGroup:
        group = _new_group([origin, to], "nccl")
        token = torch.zeros(1, device=device)
        if dist.get_rank() == origin:
            dist.send(token, to, group=group)
        elif dist.get_rank() == to:
            dist.recv(token, origin, group=group)
        return group

    return _once(("channel", origin, to), make)


def group_of(sets: Sequence[tuple[int, ...]], purpose: str, kind: str) -> dist.ProcessGroup:
    """The group of this worker's set of workers.

    Args:
        sets: of workers, each in one of them.
        purpose: groups for different purposes do not wait for each other.
        kind: the type of the workers' devices.
    """
    groups = {workers: _once((purpose, workers), partial(_connected_group, workers, kind)) for workers in sets}
    return next(group for workers, group in groups.items() if dist.get_rank() in workers)


def _new_group(workers: Sequence[int], backend: str | None = None) -> dist.ProcessGroup:
    """One whose operations may take as long as those of all workers' group."""
    group: dist.ProcessGroup = dist.new_group(list(workers), timeout=_timeout, backend=backend)
    return group


def set_timeout(timeout: timedelta) -> None:
    """What the collective operations of all groups made after this may take."""
    global _timeout
    _timeout = timeout


def _connected_group(workers: Sequence[int], kind: str) -> dist.ProcessGroup:
    group = _new_group(workers)
    if kind == "cuda" and dist.get_rank(group) >= 0:
        dist.all_reduce(torch.zeros(1, device="cuda"), group=group)
    return group


def _once(key: tuple[Any, ...], make: Callable[[], Made]) -> Made:
    world = dist.group.WORLD
    assert world is not None
    known: dict[tuple[Any, ...], Made] = _made.setdefault(world, {})
    if key not in known:
        known[key] = make()
    return known[key]
