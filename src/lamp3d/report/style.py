"""Colours and sizes that the pictures and the page share."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.colors import to_hex

INK = "#1b2733"
MUTED = "#64748b"
GRID = "#e2e8f0"
ACCENT = "#0f6fc5"
ACCENT_LIGHT = "#8fbfe8"
WARM = "#e07b39"

# Bright enough to be told apart on the greys of a scan; neighbours in the list differ in hue and in lightness.
_ORGAN_COLOURS = (
    "#ff5a5f", "#35c4f0", "#ffd23f", "#5fd35f", "#c77dff", "#ff9f40",
    "#2fe0b9", "#ff7ac6", "#8ea8ff", "#b5e655", "#e0a979", "#d9d9d9",
)  # fmt: skip

FONT = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b6c2cf",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def organ_colours(organs: Sequence[str]) -> dict[str, str]:
    """One colour an organ, the same in every picture of a run."""
    if len(organs) <= len(_ORGAN_COLOURS):
        return dict(zip(organs, _ORGAN_COLOURS, strict=False))
    wheel = colormaps["hsv"]
    return {organ: to_hex(wheel(k / len(organs))) for k, organ in enumerate(organs)}
