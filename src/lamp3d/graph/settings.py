"""What a network's own code may look at besides its tensors' content, and which a graph of it therefore depends on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


_REGISTERED = ("_parameters", "_buffers")


def settings_of(network: nn.Module) -> tuple[Any, ...]:
    """Numbers, words and flags that its modules keep, which hooks they have, which tensors; not their mode.

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


def _settings(value: Any, *, registered: bool = False) -> Any:
    """A value's part in it; the content of parameters and buffers is read anew each time, that of other tensors is not.

    Args:
        value: any.
        registered: whether its tensors are parameters or buffers.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return id(value), None if registered else value._version
    if isinstance(value, dict):
        return tuple((key, _settings(item, registered=registered)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_settings(item) for item in value)
    return type(value)
