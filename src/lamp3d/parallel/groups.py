"""Process groups, each made once and, on CUDA, connected at once.

An engine that follows another on the same workers uses the same groups: they would otherwise stay, with their sockets
and threads (or a communicator's buffers), until the process ends.

NCCL connects two ranks at their first message, and both wait for each other meanwhile, so ranks whose first messages
are not to each other could wait in a circle. Here every worker connects all groups in the same order.

All functions are collective: every worker calls them with the same arguments, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

Made = TypeVar("Made")

_made: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Any, ...], Any]] = WeakKeyDictionary()
"""By the default group, with which all others end."""


def channel(origin: int, to: int, device: torch.device) -> dist.ProcessGroup | None:
    """What carries messages from one worker to another, and nothing else; on a CPU the default group (None).

    Gloo tells messages apart by their tags. NCCL does by their order, so that a receive which waits would hold up what
    goes the other way.
    """
    if device.type != "cuda":
        return None

    def make() -> dist.ProcessGroup:
        group: dist.ProcessGroup = dist.new_group([origin, to], backend="nccl")
        token = torch.zeros(1, device=device)
        if dist.get_rank() == origin:
            dist.send(token, to, group=group)
        elif dist.get_rank() == to:
            dist.recv(token, origin, group=group)
        return group

    return _once(("channel", origin, to), make)


def group_of(workers: tuple[int, ...], kind: str) -> dist.ProcessGroup:
    """The group of some workers; ``kind`` is the type of their devices."""
    return _once(("group", workers), lambda: _connected(dist.new_group(list(workers)), kind))


def mesh_of(kind: str, data: int, slabs: int, pipe: int) -> DeviceMesh:
    """The workers as replicas × slabs × ranks of a pipeline, with the axes "data", "space" and "pipe"."""

    def make() -> DeviceMesh:
        mesh = init_device_mesh(kind, (data, slabs, pipe), mesh_dim_names=("data", "space", "pipe"))
        for axis in ("data", "space"):
            _connected(mesh.get_group(axis), kind)
        return mesh

    return _once(("mesh", kind, data, slabs, pipe), make)


def _connected(group: dist.ProcessGroup, kind: str) -> dist.ProcessGroup:
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
