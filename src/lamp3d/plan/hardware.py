"""What the devices at hand are: kind, number, threads for a worker, fast bf16."""

from __future__ import annotations

import os
from typing import Literal

import torch

DeviceType = Literal["cpu", "cuda"]


def device_type() -> DeviceType:
    """``"cuda"`` where a CUDA device is at hand, otherwise ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_count(kind: DeviceType) -> int:
    """How many workers can have a device of their own; a CPU counts one a core."""
    return torch.cuda.device_count() if kind == "cuda" else cpu_cores()


def cpu_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_threads(workers: int) -> int:
    """Threads for each of ``workers`` processes on this CPU, so that together they do not exceed its cores."""
    return max(1, cpu_cores() // workers)


def has_fast_bf16(kind: DeviceType) -> bool:
    """Whether convolutions in bf16 run in hardware (AVX512-BF16 or AMX; CUDA compute capability 8 or higher)."""
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())


def link_bytes_per_second(kind: DeviceType) -> float:
    """Roughly how fast values pass between two devices of one machine: gloo over loopback, or PCIe 4."""
    return 20e9 if kind == "cuda" else 2e9
