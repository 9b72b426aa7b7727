"""Any of MONAI's networks for volumes, by its name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lamp3d.errors import ConfigError

_GIVEN = {"spatial_dims": 3, "dimensions": 3}
_IN = ("in_channels", "in_chans")
_OUT = ("out_channels", "num_classes", "out_chans")


class FromMonai(nn.Module):
    """A network of `monai.networks.nets`, with what lamp3d wants to know of networks.

    Args:
        name: of the class, such as "DynUNet".
        arguments: of its constructor, beside dimensions and channels.
        in_channels: of the images.
        out_channels: of the logits, the background included.
        divisor: what the sides of its volumes must be multiples of.

    Raises:
        ConfigError: there is no such class, or it does not take these arguments.
    """

    heads = 1
    """Logits of one level only."""

    def __init__(
        self, name: str, arguments: Mapping[str, Any], in_channels: int, out_channels: int, divisor: int
    ) -> None:
        import monai.networks.nets  # takes seconds, for those who want none of them

        super().__init__()
        self.in_channels, self.divisor = in_channels, divisor
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
            self.network = make(**given, **arguments)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(f"{name} does not take these arguments: {error}") from error

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, C, D, H, W) of an image (B, in_channels, D, H, W)."""
        logits: Tensor = self.network(image)
        return logits
