"""What the devices are: those at hand (kind, number, threads for a worker, fast bf16), and those that are described.

A description is a small YAML file (``devices/``, or the user's own): memory, rates of arithmetic and of memory, and the
links that join such devices, each figure with its source.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from lamp3d.errors import ConfigError
from lamp3d.plan.allowance import cpu_cores, memory_bytes
from lamp3d.plan.amounts import parse_bytes
from lamp3d.plan.descriptions import checked, read_description
from lamp3d.plan.links import USUAL_NETWORK
from lamp3d.settings import Settings, told_with_its_key

DeviceType = Literal["cpu", "cuda"]
Share = Annotated[float, Field(gt=0, le=1)]

_DEVICES = Path(__file__).parent / "devices"

CUDA_RESERVED, CUDA_ALLOCATOR = 800_000_000, 1.05
"""Bytes that the context and the libraries take, and bytes that torch's allocator takes for one byte of tensors."""


class Hardware(Settings):
    """A device that a plan can be made for without having it.

    Attributes:
        title: for people.
        device_type: "cuda" or "cpu".
        memory: bytes, or a text such as "16GiB".
        peak_tflops: 10¹² floating-point operations a second, by precision (two for a multiplication and its addition).
        sustained: the share of it that convolutions reach.
        full_channels: that a convolution must read and make to reach it; with fewer it reaches less in proportion.
        bandwidth_gbs: of the device's memory.
        bandwidth_sustained: the share of it that pointwise operations reach.
        launch_seconds: the least that an operation takes on the device.
        host_seconds: that an operation takes on the host, which issues it (with its part of autograd).
        reserved: bytes of the device's memory that tensors never have: the context and the libraries' own.
        allocator: bytes that the allocator takes from the device for one byte of tensors.
        link: name of what joins such devices in a machine, from ``links.yaml``.
        across: name of what joins machines.
        per_machine: such devices in a machine, at most.
        sources: of the figures.
    """

    title: str
    device_type: DeviceType
    memory: PositiveInt
    peak_tflops: dict[Literal["fp32", "bf16"], PositiveFloat]
    sustained: dict[Literal["fp32", "bf16"], Share]
    full_channels: PositiveInt = 1
    bandwidth_gbs: PositiveFloat
    bandwidth_sustained: Share = 0.8
    launch_seconds: NonNegativeFloat = 6e-6
    host_seconds: NonNegativeFloat = 1e-4
    reserved: NonNegativeInt = CUDA_RESERVED
    allocator: PositiveFloat = CUDA_ALLOCATOR
    link: str
    across: str = USUAL_NETWORK
    per_machine: PositiveInt = 8
    sources: dict[str, str]

    @field_validator("memory", mode="before")
    @classmethod
    def _bytes(cls, memory: Any) -> int:
        with told_with_its_key():
            return parse_bytes(memory)

    @model_validator(mode="after")
    def _has_fp32(self) -> Hardware:
        if "fp32" not in self.peak_tflops or set(self.sustained) != set(self.peak_tflops):
            raise ValueError("peak_tflops and sustained want the same precisions, fp32 among them")
        return self

    @model_validator(mode="after")
    def _leaves_memory(self) -> Hardware:
        if self.memory <= self.reserved:
            raise ValueError(f"memory is {self.memory} bytes, and must be more than what is reserved: {self.reserved}")
        return self

    @property
    def usable_bytes(self) -> int:
        """What tensors can have of the memory."""
        return round((self.memory - self.reserved) / self.allocator)

    @property
    def precisions(self) -> tuple[Literal["fp32", "bf16"], ...]:
        """Those that it computes fast in, the most exact first."""
        return ("fp32", "bf16") if "bf16" in self.peak_tflops else ("fp32",)

    def seconds(self, flops: float, moved: float, precision: str, channels: int = 0) -> float:
        """How long an operation takes: what is longer, its arithmetic or its way to memory and back.

        Args:
            flops: floating-point operations.
            moved: bytes that are read and written.
            precision: "fp32" or "bf16".
            channels: of a convolution, how wide its matrix product is at its narrowest; 0 for all other operations.
        """
        key: Literal["fp32", "bf16"] = "bf16" if precision == "bf16" and "bf16" in self.peak_tflops else "fp32"
        reached = self.sustained[key] * min(1.0, channels / self.full_channels if channels else 1.0)
        computing = flops / (self.peak_tflops[key] * 1e12 * reached)
        moving = moved / (self.bandwidth_gbs * 1e9 * self.bandwidth_sustained)
        return max(computing, moving) + self.launch_seconds


def load_hardware(name: str) -> Hardware:
    """A device by the name of its description, such as "a100-80g", or by the path of a YAML file.

    Raises:
        ConfigError: there is no such device, or the file does not describe one.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _DEVICES / f"{name.lower()}.yaml"
    if not path.exists():
        known = ", ".join(known_hardware())
        raise ConfigError(f"no device {name!r}; there are {known}; or give the path of a YAML file like theirs.")
    return checked(Hardware, read_description(path), str(path))


def known_hardware() -> list[str]:
    """The names of the devices that are described."""
    return sorted(path.stem for path in _DEVICES.glob("*.yaml"))


def device_type() -> DeviceType:
    """``"cuda"`` where a CUDA device is at hand, otherwise ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_count(kind: DeviceType) -> int:
    """How many workers can have a device of their own; a CPU counts one a core."""
    return torch.cuda.device_count() * workers_per_gpu() if kind == "cuda" else cpu_cores()


def workers_per_gpu() -> int:
    """How many workers share a GPU: one, unless ``LAMP3D_WORKERS_PER_GPU`` says otherwise.

    To try on one GPU what is meant for several. They take turns, so this is slow.

    Raises:
        ConfigError: it says something else than a number.
    """
    text = os.environ.get("LAMP3D_WORKERS_PER_GPU", "1")
    if not text.isdigit() or not int(text):
        raise ConfigError(f"LAMP3D_WORKERS_PER_GPU is the number of workers that share a GPU, not {text!r}.")
    return int(text)


def device_memory(kind: DeviceType, workers: int) -> int:
    """Bytes that the tensors of each of so many workers can have."""
    if kind == "cuda":
        least = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
        return round((least / workers_per_gpu() - CUDA_RESERVED) / CUDA_ALLOCATOR)
    return max(
        1, round(memory_bytes() / local_workers(workers) - 500_000_000)
    )  # less what Python and its libraries take


def device_name(kind: DeviceType) -> str:
    """What the device calls itself."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def local_workers(workers: int) -> int:
    """Of so many workers, those on this machine: all of them, if torchrun has not started some elsewhere."""
    return min(workers, int(os.environ.get("LOCAL_WORLD_SIZE", workers)))


def worker_threads(workers: int) -> int:
    """Threads for each of ``workers`` processes, so that those on this CPU together do not exceed its cores."""
    return max(1, cpu_cores() // local_workers(workers))


def has_fast_bf16(kind: DeviceType) -> bool:
    """Whether convolutions in bf16 run in hardware (AVX512-BF16 or AMX; CUDA compute capability 8 or higher)."""
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())
