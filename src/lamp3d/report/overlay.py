"""A scan in three views with contours and prediction drawn on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.ndimage
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from nibabel.orientations import apply_orientation, io_orientation

from lamp3d.report.style import FONT, organ_colours
from lamp3d.scan import check_grid
from lamp3d.volume import Volume

Slice = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _View:
    """One anatomical plane of a volume in RAS order, and how it is hung: as a radiologist sees it."""

    title: str
    normal: int  # the axis that the slice is taken along
    across: int  # the axis from left to right on the screen, and the letters at its two ends
    across_ends: tuple[str, str]
    up: int
    up_ends: tuple[str, str]  # bottom, top


_VIEWS = (
    _View("axial", 2, 0, ("R", "L"), 1, ("P", "A")),
    _View("coronal", 1, 0, ("R", "L"), 2, ("I", "S")),
    _View("sagittal", 0, 1, ("A", "P"), 2, ("I", "S")),
)
_WIDTH_INCHES = 10.0  # of the figure; the height follows from the scan, up to a half of the width
_BACKGROUND = "#0b0f14"
_MARGIN_MM = 30.0
# Masks are drawn on a grid this much finer, so that their outlines are curves and not stairs.
_REFINEMENT = 4
_TINT = 0.5
_SCALE_BARS_MM = (50, 20, 10, 5, 2, 1)
_OUTLINE = [withStroke(linewidth=2, foreground="black")]


def overlay_picture(
    image: Volume,
    truth: Volume | None,
    prediction: Volume | None,
    organs: Sequence[str],
    *,
    window: tuple[float, float] | None = None,
    title: str = "",
) -> Figure:
    """Draws axial, coronal and sagittal slices through the organs, the contours as lines, the prediction as a tint.

    The three views share one scale in mm. Each shows the slice that cuts the most organs near their widest.

    Args:
        image: the scan (D, H, W).
        truth: label map on the same grid, k + 1 is ``organs[k]``; None draws no contours.
        prediction: the same for the prediction; None draws no tint.
        organs: the organs' names, in the order of the labels.
        window: intensities shown as black and white; by default what shows the soft tissue around the organs.
        title: a line above the views.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.

    Raises:
        ScanError: if the volumes do not lie on one grid.
    """
    for what, volume in (("the contours", truth), ("the prediction", prediction)):
        if volume is not None:
            check_grid(what, volume.grid, "the scan", image.grid)
    scene = _in_ras(image, truth, prediction)
    body = _body(scene.scan)
    black, white = window or _soft_tissue(scene.scan[body])
    boxes = [_shown_box(scene, body, view, len(organs)) for view in _VIEWS]
    sides_mm = [[(s.stop - s.start) * step for s, step in zip(box, scene.spacing_mm, strict=True)] for box in boxes]
    widths = [sides[view.across] for sides, view in zip(sides_mm, _VIEWS, strict=True)]
    heights = [sides[view.up] for sides, view in zip(sides_mm, _VIEWS, strict=True)]
    colours = organ_colours(organs)

    gap, top, bottom = 0.08, (0.42 if title else 0.08), 0.58  # inches
    inches_per_mm = min((_WIDTH_INCHES - 4 * gap) / sum(widths), _WIDTH_INCHES / 2 / max(heights))
    height_inches = inches_per_mm * max(heights) + top + bottom
    with rc_context(FONT):
        figure = Figure(figsize=(_WIDTH_INCHES, height_inches), facecolor=_BACKGROUND, dpi=130)
        FigureCanvasAgg(figure)
        shown: set[str] = set()
        left = (_WIDTH_INCHES - inches_per_mm * sum(widths) - 2 * gap) / 2
        for view, box, width, height in zip(_VIEWS, boxes, widths, heights, strict=True):
            wide, tall = width * inches_per_mm, height * inches_per_mm
            low = bottom + (inches_per_mm * max(heights) - tall) / 2  # centred
            axes = figure.add_axes(
                (left / _WIDTH_INCHES, low / height_inches, wide / _WIDTH_INCHES, tall / height_inches)
            )
            crop = tuple(box[axis].start if axis == view.normal else box[axis] for axis in range(3))
            axes.imshow(
                _hung(scene.scan[crop]),
                cmap="gray", vmin=black, vmax=white, origin="lower", interpolation="bicubic",
                extent=(0, width, 0, height),
            )  # fmt: skip
            shown |= _draw_organs(axes, scene, view, crop, colours)
            axes.set(xlim=(0, width), ylim=(0, height))  # which the organs' outlines had widened
            _letters(axes, view)
            left += wide + gap
        _scale_bar(figure.axes[0])
        if title:
            figure.text(
                0.012, 1 - 0.2 / height_inches, title, color="white", fontsize=11, weight="bold", va="center"
            )  # fmt: skip
        _legend(figure, {organ: colours[organ] for organ in organs if organ in shown}, scene)
    return figure


@dataclass(frozen=True)
class _Scene:
    """A scan and its label maps with their axes in RAS order."""

    scan: Slice
    truth: npt.NDArray[np.generic] | None
    prediction: npt.NDArray[np.generic] | None
    spacing_mm: npt.NDArray[np.float64]

    @property
    def maps(self) -> list[npt.NDArray[np.generic]]:
        return [labels for labels in (self.truth, self.prediction) if labels is not None]


def _in_ras(image: Volume, truth: Volume | None, prediction: Volume | None) -> _Scene:
    orientation = io_orientation(image.affine)
    spacing_mm = np.empty(3)
    spacing_mm[orientation[:, 0].astype(int)] = image.spacing_mm
    expected, predicted = (
        None if volume is None else apply_orientation(volume.data, orientation) for volume in (truth, prediction)
    )
    return _Scene(apply_orientation(image.data, orientation).astype(np.float64), expected, predicted, spacing_mm)


def _hung(plane: npt.NDArray[np.generic]) -> Slice:
    """A slice of a volume in RAS order as rows from bottom to top and columns from left to right of the screen.

    All three views are mirrored: the patient's right, or front, is on the screen's left.
    """
    # Taking one index of (x, y, z) leaves the axis across before the axis up.
    return plane.T[:, ::-1].astype(np.float64)


def _body(scan: Slice) -> npt.NDArray[np.bool_]:
    """The largest connected thing that is brighter than halfway from air to tissue."""
    tissue = float(np.median(scan[scan > scan.mean()])) if np.ptp(scan) > 0 else float(scan.flat[0])
    components, count = scipy.ndimage.label(scan > (float(scan.min()) + tissue) / 2)
    if count == 0:
        return np.ones(scan.shape, bool)
    largest = 1 + int(np.argmax(np.bincount(components.ravel())[1:]))
    return np.asarray(components == largest)


def _soft_tissue(body: Slice) -> tuple[float, float]:
    """A window around the body's usual intensity: black is air, white is bone in a CT."""
    low, middle, high = np.quantile(body, [0.25, 0.5, 0.75])
    half = max(2 * float(high - low), 1e-3 * float(np.ptp(body)), 1e-6)
    return float(middle) - half, float(middle) + half


def _shown_box(scene: _Scene, body: npt.NDArray[np.bool_], view: _View, n_organs: int) -> list[slice]:
    """The slice of a view, and the part of it that is drawn: the organs' surroundings, as far as there is body."""
    position = _most_organs(scene.maps[0], view.normal, n_organs) if scene.maps else None
    if position is None:
        position = body.shape[view.normal] // 2
    box = [slice(0, side) for side in body.shape]
    box[view.normal] = slice(position, position + 1)
    masks = [body[tuple(box)], *(labels != 0 for labels in scene.maps)]
    for axis in (view.across, view.up):
        others = tuple(other for other in range(3) if other != axis)
        extents = [np.flatnonzero(mask.any(axis=others)) for mask in masks]
        extents = [extent for extent in extents if extent.size]
        if not extents:
            continue
        margin = round(_MARGIN_MM / scene.spacing_mm[axis])
        start, stop = extents[0][0] - margin // 5, extents[0][-1] + 1 + margin // 5
        if len(extents) > 1:
            start = max(start, min(extent[0] for extent in extents[1:]) - margin)
            stop = min(stop, max(extent[-1] for extent in extents[1:]) + 1 + margin)
        box[axis] = slice(max(0, start), min(body.shape[axis], stop))
    return box


def _most_organs(labels: npt.NDArray[np.generic], axis: int, n_organs: int) -> int | None:
    """The slice in which the organs' areas, each as a share of its largest, add up to the most."""
    others = tuple(other for other in range(3) if other != axis)
    total = np.zeros(labels.shape[axis])
    for label in range(1, n_organs + 1):
        areas = np.count_nonzero(labels == label, axis=others)
        if areas.any():
            total += areas / areas.max()
    return int(np.argmax(total)) if total.any() else None


def _draw_organs(
    axes: Axes, scene: _Scene, view: _View, crop: tuple[int | slice, ...], colours: Mapping[str, str]
) -> set[str]:
    """Draws the cuts of all organs, tints below lines; tells which organs there were."""
    steps_mm = (scene.spacing_mm[view.across], scene.spacing_mm[view.up])
    shown = set()
    for label, (organ, colour) in enumerate(colours.items(), start=1):
        for labels, draw in ((scene.prediction, _tint), (scene.truth, _line)):
            if labels is not None and (mask := _hung(labels[crop] == label)).any():
                draw(axes, *_smooth(mask, steps_mm), colour)
                shown.add(organ)
    return shown


def _smooth(mask: Slice, steps_mm: tuple[float, float]) -> tuple[Slice, Slice, Slice, float]:
    """A mask's places in mm and values on a finer grid, and the level at which its outline lies."""
    fine = scipy.ndimage.zoom(np.pad(mask, 1), _REFINEMENT, order=1, grid_mode=True, mode="nearest")
    smooth = scipy.ndimage.gaussian_filter(fine, 0.35 * _REFINEMENT)
    x = ((np.arange(smooth.shape[1]) + 0.5) / _REFINEMENT - 1) * steps_mm[0]
    y = ((np.arange(smooth.shape[0]) + 0.5) / _REFINEMENT - 1) * steps_mm[1]
    # A mask of a voxel or two stays visible although smoothing lowers it.
    return x, y, smooth, min(0.5, 0.6 * float(smooth.max()))


def _tint(axes: Axes, x: Slice, y: Slice, values: Slice, level: float, colour: str) -> None:
    axes.contourf(x, y, values, levels=[level, 2], colors=[colour], alpha=_TINT)


def _line(axes: Axes, x: Slice, y: Slice, values: Slice, level: float, colour: str) -> None:
    axes.contour(x, y, values, levels=[level], colors=[colour], linewidths=1.5)


def _letters(axes: Axes, view: _View) -> None:
    def write(x: float, y: float, text: str, ha: str, va: str, **style: Any) -> None:
        usual: dict[str, Any] = {"color": "white", "fontsize": 9, "weight": "bold", "path_effects": _OUTLINE}
        axes.text(x, y, text, ha=ha, va=va, transform=axes.transAxes, **(usual | style))

    axes.set_axis_off()
    write(0.015, 0.5, view.across_ends[0], "left", "center")
    write(0.985, 0.5, view.across_ends[1], "right", "center")
    write(0.5, 0.015, view.up_ends[0], "center", "bottom")
    write(0.5, 0.985, view.up_ends[1], "center", "top")
    write(0.015, 0.985, view.title, "left", "top", color="#cbd5e1", weight="normal")


def _scale_bar(axes: Axes) -> None:
    style: dict[str, Any] = {"color": "white", "path_effects": _OUTLINE}
    wide, tall = axes.get_xlim()[1], axes.get_ylim()[1]
    left, low = min(6.0, 0.05 * wide), min(6.0, 0.05 * tall)
    # The longest that ends before the letter in the middle.
    length = next((mm for mm in _SCALE_BARS_MM if left + mm < 0.45 * wide), _SCALE_BARS_MM[-1])
    axes.plot([left, left + length], [low, low], linewidth=2, solid_capstyle="butt", **style)
    axes.text(left + length / 2, 1.3 * low, f"{length} mm", ha="center", va="bottom", fontsize=7.5, **style)


def _legend(figure: Figure, colours: Mapping[str, str], scene: _Scene) -> None:
    handles: list[Patch | Line2D] = [Patch(color=colour, label=organ) for organ, colour in colours.items()]
    if scene.truth is not None:
        handles.append(Line2D([], [], color="white", linewidth=1.5, label="line: contour"))
    if scene.prediction is not None:
        handles.append(Patch(facecolor="white", alpha=_TINT, label="tint: prediction"))
    if not handles:
        return
    # As many rows as the texts' rough width needs, equally long.
    inches = sum(0.42 + 0.068 * len(str(handle.get_label())) for handle in handles)
    rows = math.ceil(inches / figure.get_figwidth())
    figure.legend(
        handles=handles, loc="lower center", ncols=math.ceil(len(handles) / rows), frameon=False, labelcolor="white",
        fontsize=8.5, handlelength=1.2, handleheight=0.9, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip
