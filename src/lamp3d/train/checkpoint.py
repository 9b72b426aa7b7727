"""Checkpoints by the network's own names: written on any number of devices, read on any other.

One safetensors file holds tensors ``model/NAME`` (parameters and persistent buffers), ``optimizer/NAME/KEY`` and
``ema/NAME``, where NAME is what ``named_parameters`` of the plain network says; how it was cut over devices leaves no
trace. The metadata is JSON text. Nothing is ever unpickled from a file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lamp3d.errors import ConfigError, TrainingError
from lamp3d.files import remove_leftovers, write_atomically

FORMAT = "lamp3d-checkpoint-1"
DIFFERENCES_SHOWN = 3


def network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each once, as they are kept in a checkpoint."""
    kept = network.state_dict(keep_vars=True)
    return dict(network.named_parameters()) | {name: b for name, b in network.named_buffers() if name in kept}


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
    """Gather tensors to rank 0 and write them; to be called by every rank, and back on each when the file is there.

    Args:
        path: the file; it is replaced at once or, when anything goes wrong, not at all.
        tensors: this rank's, with their full names in the file; of a name on several ranks the first rank's counts.
        progress: anything JSON, the same on every rank.

    Raises:
        DiskFullError: there is no room for the file (on rank 0).
        TrainingError: it cannot be written for another reason.
    """
    gathered = _gather(tensors)
    if not dist.is_initialized() or dist.get_rank() == 0:
        remove_leftovers(path)
        metadata = {"format": FORMAT, "progress": json.dumps(progress, allow_nan=False)}
        try:
            write_atomically(path, lambda temporary: save_file(gathered, temporary, metadata))
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"The checkpoint {path} could not be written: {error}. What was there before is intact."
            ) from error
    wait_for_all()


class Checkpoint:
    """A checkpoint file; tensors are read when asked for.

    Args:
        path: the file.

    Raises:
        ConfigError: the file is absent, damaged, or not a checkpoint of lamp3d.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise ConfigError(f"There is no checkpoint {path}.") from error
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} is not a readable checkpoint ({error}); it may be cut short.") from error
        if metadata.get("format") != FORMAT:
            raise ConfigError(f"{path} is a safetensors file, but not a checkpoint of this version ({FORMAT}).")
        self.progress: dict[str, Any] = json.loads(metadata["progress"])

    def read(self, part: str, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Tensors of one part ("model", "optimizer", "ema") by their names within it, on the CPU; None: all of them."""
        prefix = part + "/"
        if names is None:
            names = [name.removeprefix(prefix) for name in self.shapes if name.startswith(prefix)]
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(prefix + name) for name in names}

    def has(self, part: str) -> bool:
        """Whether there is anything in this part."""
        return any(name.startswith(part + "/") for name in self.shapes)

    def check_network(self, network: nn.Module, apart_from: Collection[str] = ()) -> None:
        """Make sure that this is a checkpoint of such a network.

        Args:
            network: it.
            apart_from: names of parameters and buffers that may differ.

        Raises:
            ConfigError: names or shapes differ; the message names the first differences.
        """
        own = {name: tuple(tensor.shape) for name, tensor in network_tensors(network).items()}
        saved = {name.removeprefix("model/"): s for name, s in self.shapes.items() if name.startswith("model/")}
        for name in apart_from:
            own.pop(name, None)
            saved.pop(name, None)
        if own == saved:
            return
        names = [*own, *sorted(saved.keys() - own.keys())]
        different = [name for name in names if own.get(name) != saved.get(name)]
        shown = "; ".join(
            f"{name}: {_shape(saved.get(name))} in the file, {_shape(own.get(name))} in the network"
            for name in islice(different, DIFFERENCES_SHOWN)
        )
        raise ConfigError(
            f"{self.path} belongs to another network; {len(different)} of {len(names)} parameters and buffers differ, "
            f"first {shown}. Use the network settings (kind, filters, norm, organs) that it was trained with."
        )


def load_weights(network: nn.Module, path: Path) -> None:
    """Copy a checkpoint's weights and buffers into a whole network, wherever its tensors are.

    Raises:
        ConfigError: the file cannot be read, or belongs to another network.
    """
    checkpoint = Checkpoint(path)
    checkpoint.check_network(network)
    copy_tensors(network_tensors(network), checkpoint.read("model"))


@torch.no_grad()
def copy_tensors(to: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Overwrite tensors in place by those of the same names."""
    for name, tensor in to.items():
        tensor.copy_(source[name])


def wait_for_all() -> None:
    """Come back when every rank is here."""
    # Not `dist.barrier`, which goes over the accelerator and wants a device; the CPU's group is always there.
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def as_first_rank_says(flag: bool) -> bool:
    """The first rank's answer, on every rank: what depends on files, machines that share a disk may see differently."""
    answer = torch.tensor([int(flag)])
    if dist.is_initialized():
        dist.broadcast(answer, 0)
    return bool(answer)


def _gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All ranks' tensors, on the CPU, on rank 0; nothing elsewhere."""
    if not dist.is_initialized():
        return {name: _on_cpu(tensor) for name, tensor in tensors.items()}
    rank = dist.get_rank()
    contents: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(contents, [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()])
    gathered: dict[str, Tensor] = {}
    taken: set[str] = set()
    for source, content in enumerate(contents):
        for name, dtype, shape in content:
            if name in taken:
                continue
            taken.add(name)
            if source == rank == 0:
                gathered[name] = _on_cpu(tensors[name])
            elif rank == 0:
                gathered[name] = torch.empty(shape, dtype=dtype)
                dist.recv(_bytes(gathered[name]), source)
            elif rank == source:
                dist.send(_bytes(_on_cpu(tensors[name])), 0)
    return gathered


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes, which every backend can send."""
    return tensor.view(-1).view(torch.uint8)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a number"
