"""Where oneDNN's gradient of a convolution's weight in bf16 is of no use: measured in docs/decisions/arithmetic.md."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

CACHE_BYTES = (400_000, 64_000_000)
"""The part of a core's cache that blocks are made for is between these, threads that share the channels included."""

Extents = tuple[int, ...]


class Reading(NamedTuple):
    """How a convolution reads a volume: by axis, and its channels.

    Attributes:
        read: extents of what is read; of a transposed convolution, which is one the other way round, its result.
        made: extents of the other.
        kernel, stride, padding: by axis; the kernel with what dilation leaves out.
        channels: of what is read, and of the other.
    """

    read: Extents
    made: Extents
    kernel: Extents
    stride: Extents
    padding: Extents
    channels: tuple[int, int]

    @classmethod
    def of(cls, image: Tensor, weight: Tensor, settings: tuple[Any, ...]) -> Reading:
        """That of torch's convolution with these arguments."""
        stride, padding, dilation, transposed, beyond, _ = settings
        here = _extents(image.shape[2:])
        kernel = _extents([step * (width - 1) + 1 for step, width in zip(dilation, weight.shape[2:], strict=True)])
        axes = zip(here, stride, padding, kernel, beyond, strict=True)
        if transposed:
            there = [(extent - 1) * step - 2 * pad + width + more for extent, step, pad, width, more in axes]
            read, made, channels = _extents(there), here, (weight.shape[1], image.shape[1])
        else:
            there = [(extent + 2 * pad - width) // step + 1 for extent, step, pad, width, _ in axes]
            read, made, channels = here, _extents(there), (image.shape[1], weight.shape[0])
        return cls(read, made, kernel, _extents(stride), _extents(padding), (int(channels[0]), int(channels[1])))


@lru_cache(maxsize=4096)
def outgrows_its_room(reading: Reading) -> bool:
    """Whether AMX's kernel may write more rows than it has room for, whatever the cache and the number of threads.

    It works on blocks of rows, and of planes, that fit a part of the cache. It has room for one block of rows in all
    planes, but puts the rows of all blocks there, of those planes that it works on at once.
    """
    read_row, made_row = (_row_bytes(*side) for side in zip(reading.channels, _row_columns(reading), strict=True))
    (read_planes, read_rows, _), (planes, rows, _) = reading.read, reading.made
    (deep, high, _), (step, down, _) = reading.kernel, reading.stride
    cache, largest = CACHE_BYTES
    while cache < largest:
        rows_at_once = _even((cache - high * read_row) // (read_row + made_row), rows)
        if rows_at_once == rows:
            return False
        of_planes = cache - deep * read_row * read_planes
        planes_at_once = _even(of_planes // (read_row * read_planes + made_row * planes), planes)
        rows_read = min(read_rows, (rows_at_once - 1) * down + high)
        planes_read = min(read_planes, (planes_at_once - 1) * step + deep)
        if planes_at_once * rows > planes * rows_at_once:
            return True
        if (planes_read - 1) * rows_read + read_rows > read_planes * rows_read:
            return True
        cache += cache // 16
    return False


def _even(most: int, extent: int) -> int:
    """The size of blocks, as even as can be, of which none has more than so many."""
    return _ceil(extent, _ceil(extent, max(1, most)))


def _row_columns(reading: Reading) -> tuple[int, int]:
    padded = reading.read[2] + 2 * reading.padding[2]
    return _ceil(_ceil(padded, reading.stride[2]), 32) * 32 * reading.stride[2], _ceil(reading.made[2], 2) * 2


def _row_bytes(channels: int, columns: int) -> int:
    """Of a row of bf16 as it is given, and as it is laid out anew with channels by 16."""
    return 2 * 2 * 16 * _ceil(channels, 16) * columns


def _ceil(whole: int, part: int) -> int:
    return -(-whole // part)


def _extents(extents: Sequence[int]) -> Extents:
    return tuple(int(extent) for extent in extents)
