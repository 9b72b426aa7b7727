"""Mini-batches on their way to the engine: read ahead, only what a rank needs, and moved to its device."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lamp3d.data import Batch, Batches
from lamp3d.data.augment import Region
from lamp3d.parallel import Engine
from lamp3d.plan.hardware import worker_threads
from lamp3d.sides import Shape3
from lamp3d.space.ranks import Space
from lamp3d.space.sharded import even_cut
from lamp3d.space.slabs import slab_of

MOST_READERS = 12
"""Mini-batches that a rank reads at once; each takes its room in the machine's memory."""


def prefetched(batches: Batches, engine: Engine) -> Generator[Batch, None, None]:
    """An epoch's mini-batches, what this rank needs of them; the next ones are read while one is worked on.

    Of volumes that ranks share each reads its slab.
    """
    read = partial(
        batches.read,
        images=engine.reads_input,
        labels=engine.holds_output,
        part=None if engine.space is None else partial(_own_part, space=engine.space),
    )

    if engine.device.type != "cuda":  # the cores are the devices, and at work
        return read_ahead(read, len(batches), 1)
    return read_ahead(lambda number: _pinned(read(number)), len(batches), reading_threads())


def read_ahead(read: Callable[[int], Batch], count: int, threads: int) -> Generator[Batch, None, None]:
    """Mini-batches 0 to ``count`` - 1 in order; ``threads`` of them are being read while one is worked on."""
    single = (torch.set_num_threads, (1,)) if threads > 1 else (None, ())
    with ThreadPoolExecutor(threads, "lamp3d-batches", *single) as pool:
        coming = deque(pool.submit(read, number) for number in range(min(threads, count)))
        for number in range(count):
            batch = coming.popleft().result()
            if number + threads < count:
                coming.append(pool.submit(read, number + threads))
            yield batch


def reading_threads() -> int:
    """How many mini-batches a rank reads at once while its GPU works: its share of the machine's cores but one."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_READERS, worker_threads(ranks) - 1))


def on_device(batch: Batch, engine: Engine) -> tuple[Any, Any]:
    """Images and targets as `Engine.step` wants them: tensors, or lists with one entry a volume, or None."""

    def move(tensor: Tensor, extents: Shape3) -> Tensor:
        tensor = tensor.to(engine.device, non_blocking=True)
        return tensor if engine.space is None else slab_of(tensor, extents, engine.space)

    def moved(tensors: Tensor | list[Tensor] | None) -> Any:
        if isinstance(tensors, list):
            return [move(tensor, extents) for tensor, extents in zip(tensors, batch.extents, strict=True)]
        return None if tensors is None else move(tensors, batch.extents[0])

    labels: Any = moved(batch.labels)
    targets: Any = None
    if labels is not None:
        annotated = batch.annotated.to(engine.device, non_blocking=True)
        if isinstance(labels, list):
            targets = [(label, annotated[i : i + 1]) for i, label in enumerate(labels)]
        else:
            targets = (labels, annotated)
    return moved(batch.images), targets


def _pinned(batch: Batch) -> Batch:
    """In memory from which a GPU copies by itself, while the CPU goes on."""

    def pin(tensors: Any) -> Any:
        return pytree.tree_map_only(Tensor, Tensor.pin_memory, tensors)

    return replace(batch, images=pin(batch.images), labels=pin(batch.labels))


def _own_part(extents: Shape3, space: Space) -> Region:
    depth, height, width = (slice(*ends) for ends in even_cut(extents, space).part(space.coordinate))
    return depth, height, width
