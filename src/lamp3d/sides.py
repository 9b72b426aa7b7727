"""The sides of volumes that a network can take: it halves them, so that they must be multiples of its divisor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PositiveInt

from lamp3d.errors import ConfigError

Shape3 = tuple[int, int, int]


def _sides(given: Any) -> Any:
    sides = [given] * 3 if isinstance(given, int) else given
    if sides != "whole" and not (
        isinstance(sides, Sequence) and len(sides) == 3 and all(isinstance(side, int) and side > 0 for side in sides)
    ):
        raise ValueError("give one number of voxels, three of them (D, H, W), or whole")
    return sides


Sides = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt] | Literal["whole"], BeforeValidator(_sides)]
"""In a configuration: (D, H, W) in voxels, or one number for all three; or "whole" (cropped) volumes."""


def sides_or_none(sides: Shape3 | Literal["whole"]) -> Shape3 | None:
    """Those of a setting; None for whole volumes."""
    return None if sides == "whole" else sides


def padded_sides(sides: Sequence[int], divisor: int) -> Shape3:
    """The least sides of a volume that a network can take, and that a scan fits into.

    Of 16³ a network of divisor 16 keeps a single voxel at its coarsest level, and instance norm nothing to normalise:
    one side is doubled.

    Args:
        sides: (D, H, W) of the scan, in voxels.
        divisor: of the network.
    """
    depth, height, width = (-(-side // divisor) * divisor for side in sides)
    return (2 * depth if depth == height == width == divisor else depth), height, width


def largest_padded(scans: Iterable[Sequence[int]], divisor: int) -> Shape3:
    """The sides of the largest volume that a network gets of some scans, which need not be the largest scan's.

    Args:
        scans: (D, H, W) of each, in voxels.
        divisor: of the network.
    """
    return max((padded_sides(sides, divisor) for sides in scans), key=math.prod)


def check_sides(what: str, sides: Sequence[int], divisor: int) -> None:
    """Refuse sides that are no multiples of a network's divisor.

    Args:
        what: has these sides, for the message.
        sides: (D, H, W) in voxels.
        divisor: of the network.

    Raises:
        ConfigError: it names sides that would do.
    """
    smaller = [max(1, side // divisor) * divisor for side in sides]
    larger = [max(1, -(-side // divisor)) * divisor for side in sides]
    if list(sides) != smaller:
        near = (padded_sides(sides, divisor) for sides in (smaller, larger))
        fitting = dict.fromkeys("x".join(map(str, sides)) for sides in near)  # once, where they are the same
        raise ConfigError(
            f"{what} of {'x'.join(map(str, sides))}: each side must be a multiple of {divisor}, as this network halves "
            f"its volumes; take {' or '.join(fitting)}."
        )
