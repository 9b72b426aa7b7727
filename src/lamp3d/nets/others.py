"""Networks that others have written: MONAI's by name, or any that a function makes."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamp3d.errors import ConfigError

_GIVEN = {"spatial_dims": 3, "dimensions": 3}
_IN = ("in_channels", "in_chans")
_OUT = ("out_channels", "num_classes", "out_chans")


class Wrapped(nn.Module):
    """Another's network, with what lamp3d wants to know of networks.

    Args:
        network: from images (B, in_channels, D, H, W) to logits (B, C, D, H, W).
        title: what it is called.
        in_channels: of the images.
        divisor: what the sides of its volumes must be multiples of.
        heads: levels of logits to train with, of those that the network gives: a list from fine to coarse (nnU-Net's
            networks), or a stack behind the batch (MONAI's DynUNet, in training).
    """

    def __init__(self, network: nn.Module, title: str, in_channels: int, divisor: int, heads: int = 1) -> None:
        super().__init__()
        self.network = network
        self.title, self.in_channels, self.divisor, self.heads = title, in_channels, divisor, heads

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, heads * C, D, H, W) of an image (B, in_channels, D, H, W); (B, C, …) where there is but one level.

        Raises:
            ConfigError: the network gives another number of levels.
        """
        levels = self._levels(self.network(image))
        if len(levels) == 1 and not (self.training and self.heads > 1):
            return levels[0]
        if self.heads == 1 or len(levels) < self.heads:
            raise ConfigError(
                f"{self.title} gives {len(levels)} level(s) of logits, and network.deep_supervision: {self.heads - 1} "
                f"wants {self.heads}: set it to the number of coarser levels to train with, or switch deep supervision "
                "on or off in network.arguments."
            )
        finest, *coarse = levels[: self.heads]
        return torch.cat([finest, *(_brought_to(finest, level) for level in coarse)], dim=1)

    def _levels(self, logits: Any) -> Sequence[Tensor]:
        if isinstance(logits, dict):
            raise ConfigError(f"{self.title} gives {', '.join(map(str, logits))}, and not logits (B, C, D, H, W).")
        if isinstance(logits, list | tuple):
            return logits
        return logits.unbind(1) if logits.dim() == 6 else (logits,)


def _brought_to(fine: Tensor, coarse: Tensor) -> Tensor:
    sides = fine.shape[2:]
    return coarse if coarse.shape[2:] == sides else F.interpolate(coarse, size=sides, mode="trilinear")


def from_monai(
    name: str, arguments: Mapping[str, Any], in_channels: int, out_channels: int, divisor: int, heads: int = 1
) -> Wrapped:
    """A network of `monai.networks.nets`.

    Args:
        name: of the class, such as "DynUNet".
        arguments: of its constructor, beside dimensions and channels.
        in_channels: of the images.
        out_channels: of the logits, the background included.
        divisor: what the sides of its volumes must be multiples of.
        heads: levels of logits to train with.

    Raises:
        ConfigError: there is no such class, or it does not take these arguments.
    """
    import monai.networks.nets  # takes seconds, for those who want none of them

    known = {n for n, c in vars(monai.networks.nets).items() if inspect.isclass(c) and issubclass(c, nn.Module)}
    if name not in known:
        close = difflib.get_close_matches(name, known, 3)
        raise ConfigError(f"MONAI has no network {name!r}{'; close to it: ' + ', '.join(close) if close else ''}.")
    make = getattr(monai.networks.nets, name)
    takes = inspect.signature(make).parameters
    given = {key: value for key, value in _GIVEN.items() if key in takes}
    for keys, channels in ((_IN, in_channels), (_OUT, out_channels)):
        key = next((key for key in keys if key in takes), None)
        if key is None:
            raise ConfigError(f"{name} takes none of {', '.join(keys)}: it is no network for segmentation.")
        given[key] = channels
    try:
        network = make(**given, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"{name} does not take these arguments: {error}") from error
    return Wrapped(network, name, in_channels, divisor, heads)


def from_function(
    path: str, arguments: Mapping[str, Any], in_channels: int, out_channels: int, divisor: int, heads: int = 1
) -> Wrapped:
    """A network that ``package.module:function`` makes, called with `in_channels`, `out_channels` and the arguments.

    Args:
        path: where the function, or the class, is.
        arguments: beside the channels.
        in_channels, out_channels, divisor, heads: as :func:`from_monai`'s.

    Raises:
        ConfigError: there is no such function, it does not take these arguments, or it gives no module.
    """
    network = made_by(path, {"in_channels": in_channels, "out_channels": out_channels, **arguments})
    return Wrapped(network, type(network).__name__, in_channels, divisor, heads)


def made_by(path: str, arguments: Mapping[str, Any] = MappingProxyType({})) -> nn.Module:
    """What ``package.module:function`` (or a class) makes of the arguments; the module may lie in the present folder.

    Raises:
        ConfigError: there is no such function, it does not take these arguments, or it gives no module.
    """
    make = _imported(path)
    try:
        inspect.signature(make).bind(**arguments)
    except TypeError as error:
        if arguments:
            message = f"{path} is called with {', '.join(arguments)}, and does not take that: {error}."
        else:
            message = (
                f"{path} is called without arguments here ({error}): give --net a configuration (.yaml) that says "
                f"them, with network: {{kind: own, name: {path}}}."
            )
        raise ConfigError(message) from error
    try:
        network = make(**arguments)
    except ConfigError:
        raise
    except Exception as error:
        raise _failed(path, error) from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{path} gives {type(network).__name__}, not a torch.nn.Module.")
    return network


def _imported(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:  # as `python -m` does
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"no network {path!r} ({error}); write it as package.module:function.") from error
    except Exception as error:
        raise _failed(path, error) from error
    if not callable(found):
        raise ConfigError(f"{path} is no function that makes a network, but {type(found).__name__}.")
    return found  # type: ignore[no-any-return]


def _failed(path: str, error: Exception) -> ConfigError:
    """What the user's own code raised, and where."""
    if isinstance(error, SyntaxError):
        file, line, why = error.filename, error.lineno, error.msg
    else:
        last = traceback.extract_tb(error.__traceback__)[-1]
        file, line, why = last.filename, last.lineno, str(error)
    return ConfigError(f"{path} fails with {type(error).__name__}: {why} ({file}, line {line}).")
