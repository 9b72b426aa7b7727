"""Work for the other cores while cells are timed: workers on one machine share its memory's bandwidth and its clock."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import torch
from torch import nn

from lamp3d.graph import arithmetic

CHANNELS, SIDE = 16, 48


@contextmanager
def neighbours_at_work(count: int, precision: str) -> Iterator[None]:
    """Keep ``count`` other cores at a U-Net's work: convolution, norm and activation, forward and backward."""
    done = Event()

    def work() -> None:
        block = nn.Sequential(nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1), nn.InstanceNorm3d(CHANNELS), nn.LeakyReLU())
        image = torch.zeros(1, CHANNELS, SIDE, SIDE, SIDE, requires_grad=True)
        with arithmetic(torch.device("cpu"), precision):
            while not done.is_set():
                torch.autograd.backward(block(image).sum())

    with ThreadPoolExecutor(max(1, count), "lamp3d-neighbours") as pool:
        works = [pool.submit(work) for _ in range(count)]
        try:
            yield
        finally:
            done.set()
    for finished in works:
        finished.result()
