"""Memory that a CPU worker frees stays its own, for as long as an engine is at work.

glibc gives blocks beyond 32 MB back to the system when they are freed, and the top of its heap too. A training step
frees and takes activations of that size by the hundred, and every time the system clears their pages anew: a third of
the step of a U-Net-16 at 96³ (benchmarks/pipeline).

What is free lies in pieces between what is in use, and a larger block does not fit into them. So beyond a limit, the
plan's for the device, the pieces' pages do go back to the system: the operations that take the most see to that.
"""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
"""From glibc's malloc.h."""

_DEFAULTS = {_M_TRIM_THRESHOLD: 128 * 2**10, _M_TOP_PAD: 128 * 2**10, _M_MMAP_MAX: 65536}

_STATUS = Path("/proc/self/status")

_MEMORY, _CLEAR = Path("/proc/self/statm"), Path("/proc/self/clear_refs")

_TOP_PAD = 64 * 2**20
"""Bytes by which the heap grows beyond what was asked for."""

_limit: int | None = None
"""Bytes that this process is to keep within."""


def keep_freed_memory() -> None:
    """Tell glibc to reuse this process's freed memory, and not to return it by itself; elsewhere nothing happens."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
        libc.mallopt(_M_TOP_PAD, _TOP_PAD)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed memory for a while, as workers do for good; then glibc's defaults."""
    keep_freed_memory()
    try:
        yield
    finally:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for parameter, default in _DEFAULTS.items():
                libc.mallopt(parameter, default)
        return_freed_memory()


def return_freed_memory() -> None:
    """Give back what is free at present, as when another engine takes over, whose needs are others."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def limit_freed_memory(limit: int | None) -> None:
    """From now on `make_room` keeps this process within so many bytes, as far as it can."""
    global _limit
    _limit = limit if _MEMORY.exists() else None


def make_room(*tensors: Tensor) -> bool:
    """Whether an operation that takes the room of these keeps within the limit; what is free is given back for it.

    Fake tensors take none: a plan must not depend on what memory the process has in use.
    """
    if _limit is None or any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return True
    taken = sum(tensor.nbytes for tensor in tensors)
    if _resident_bytes() + taken <= _limit:
        return True
    return_freed_memory()
    return _resident_bytes() + taken <= _limit


def peak_resident_bytes() -> int:
    """The most memory that this process has had in use."""
    # Linux hands the peak of the process that started this one on to `getrusage`; its own status knows better.
    if _STATUS.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak_resident_bytes() -> None:
    """From now on `peak_resident_bytes` is the most since now; where the system cannot do that, it stays as it is."""
    with suppress(OSError):
        _CLEAR.write_text("5")


def _resident_bytes() -> int:
    return int(_MEMORY.read_text().split()[1]) * resource.getpagesize()
