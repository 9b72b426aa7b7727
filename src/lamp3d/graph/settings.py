"""What a network's own code may look at besides its tensors' content, and which a graph of it therefore depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, np.generic, torch.dtype, torch.device)
_REGISTERED = ("_parameters", "_buffers")


def settings_of(network: nn.Module) -> tuple[Any, ...]:
    """Numbers, words, flags and functions that its modules keep, which hooks they have, which tensors; not their mode.

    As long as this stays the same, so does what the network's code does with inputs of one shape, in one mode. Torch's
    own layers are left out: a graph calls them as they are.
    """
    modules = (m for m in network.modules() if m._modules or not type(m).__module__.startswith("torch.nn."))
    return tuple(
        (name, _settings(value, registered=name in _REGISTERED))
        for module in modules
        for name, value in vars(module).items()
        if name != "training"
    )


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal for one and the same object alone, which is kept: no other one can come to lie where it was."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def _settings(value: Any, *, registered: bool = False, inside: bool = False) -> Any:
    """A value's part in it; the content of parameters and buffers is read anew each time, that of other tensors is not.

    Args:
        value: any.
        registered: whether its tensors are parameters or buffers.
        inside: whether an object keeps it that is no module, such as a configuration. Of its objects only the identity
            counts: anything may hang there, such as the program that trains.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return _Same(value), None if registered or value.is_inference() else value._version
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype, value.tobytes()
    if isinstance(value, dict):
        return tuple((key, _settings(item, registered=registered, inside=inside)) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_settings(item, inside=inside) for item in value)
    if inside or isinstance(value, nn.Module) or not hasattr(value, "__dict__"):
        return _Same(value)
    return _Same(value), _settings(vars(value), inside=True)
