"""Mini-batches on their way to the engine: read ahead, only what a rank needs, and moved to its device."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from torch import Tensor

from lamp3d.data import Batch, Batches
from lamp3d.parallel import Engine


def prefetched(batches: Batches, engine: Engine) -> Generator[Batch, None, None]:
    """An epoch's mini-batches, what this rank needs of them; the next one is read while one is worked on."""
    read = partial(batches.read, images=engine.reads_input, labels=engine.holds_output)
    with ThreadPoolExecutor(1, "lamp3d-batches") as pool:
        coming = pool.submit(read, 0)
        for i in range(len(batches)):
            batch = coming.result()
            if i + 1 < len(batches):
                coming = pool.submit(read, i + 1)
            yield batch


def on_device(batch: Batch, engine: Engine) -> tuple[Any, Any]:
    """Images and targets as `Engine.step` wants them: tensors, or lists with one entry a volume, or None."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(engine.device, non_blocking=True)

    images: Any = batch.images
    if images is not None:
        images = [move(image) for image in images] if isinstance(images, list) else move(images)
    targets: Any = None
    if batch.labels is not None:
        annotated = move(batch.annotated)
        if isinstance(batch.labels, list):
            targets = [(move(label), annotated[i : i + 1]) for i, label in enumerate(batch.labels)]
        else:
            targets = (move(batch.labels), annotated)
    return images, targets
