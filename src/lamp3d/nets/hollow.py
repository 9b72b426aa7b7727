"""Networks without weights, for their shapes and numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Made = TypeVar("Made", bound=nn.Module)


def hollow(make: Callable[[], Made]) -> Made:
    """The network on the meta device, where it takes no memory.

    Some constructors look at the numbers in a tensor, which has none there; such a network is made with weights, which
    are dropped. Torch's random state is left as it is.
    """
    try:
        with torch.device("meta"):
            return make()
    except Exception:
        with torch.random.fork_rng(devices=[]):
            return make().to("meta")
