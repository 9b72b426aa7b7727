"""A plan as a picture: every cell a box, as wide as it takes time and as high as it holds memory."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Arc, Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from lamp3d.plan import Planning, format_bytes
from lamp3d.plan.cut import Cut
from lamp3d.report.figures import draw_time_line, explain_actions
from lamp3d.report.style import FONT, INK, MUTED

WIDTH = 10.0
LABELLED = 0.035
"""Of the width: cells at least so wide carry their names."""

EDGES = 8
"""The largest values that pass between devices carry their bytes."""

APART = 0.06
"""Of the width and of the highest cell: how far from each other these stand."""


def cells_picture(planning: Planning) -> Figure:
    """The chosen plan's cells, coloured by device, with what passes between devices; and its time line below."""
    best = planning.answer.best
    assert best is not None
    assert best.cut is not None
    cut, plan = best.cut, planning.plan
    with rc_context(FONT):
        has_line = plan.pipe > 1
        figure = Figure(figsize=(WIDTH, 4.0 + (1.15 + 0.34 * plan.pipe) * has_line), layout="constrained")
        FigureCanvasAgg(figure)
        heights = [3.4, 0.6 + 0.34 * plan.pipe] if has_line else [1.0]
        panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        _draw_cells(panels[0], cut)
        panels[0].set_title(
            f"{plan.network}: {best.option}; {plan.step_seconds:.3g} s a step, {format_bytes(cut.peak_bytes)} a device"
        )
        if has_line:
            line = plan.time_line()
            draw_time_line(panels[1], "predicted", line, line.seconds)
            panels[1].set_xlabel("ms")
            explain_actions(figure, [line])
    return figure


def _draw_cells(axes: Axes, cut: Cut) -> None:
    costs = cut.costs
    cells = costs.profile.cells
    few = cut.devices <= 10
    palette = colormaps["tab10"](range(cut.devices)) if few else colormaps["turbo"](np.linspace(0, 1, cut.devices))
    colours = [to_hex(colour) for colour in palette]
    rank_of = [rank for rank, (i, j) in zip(cut.ranks, cut.bounds, strict=True) for _ in range(i, j)]
    seconds = np.array([costs.seconds[i, i + 1] for i in range(len(cells))])
    right = np.cumsum(seconds)
    left, total = right - seconds, right[-1]
    bytes_ = [sum(costs.held(i, i + 1).values()) / 1e6 for i in range(len(cells))]
    top = max([*bytes_, 1e-9])
    for index, cell in enumerate(cells):
        again = costs.blocks[index] is not None
        axes.add_patch(
            Rectangle(
                (left[index] * 1e3, 0), seconds[index] * 1e3, bytes_[index], facecolor=colours[rank_of[index]],
                edgecolor="white", linewidth=0.4, alpha=0.45 if again else 0.9, hatch="...." if again else None,
            )
        )  # fmt: skip
        if seconds[index] > LABELLED * total:
            axes.text(
                (left[index] + right[index]) * 500, bytes_[index] + 0.02 * top, cell.name.split(" + ")[0],
                rotation=90, ha="center", va="bottom", fontsize=6.5, color=MUTED,
            )  # fmt: skip
    lowest = _draw_edges(axes, cut, left * 1e3, right * 1e3, top)
    axes.set_xlabel("forward and backward (ms)")
    axes.set_ylabel("held for backward (MB)")
    axes.set_yticks([tick for tick in MaxNLocator(5).tick_values(0, top) if tick <= 1.05 * top])
    axes.set(xlim=(0, total * 1e3), ylim=(lowest, 1.6 * top))
    handles = [Patch(color=colour, label=f"device {rank}") for rank, colour in enumerate(colours)]
    if any(block is not None for block in costs.blocks):
        handles.append(Patch(facecolor="white", edgecolor=INK, hatch="....", label="computed again in backward"))
    # Below the axis: within it there are names above the cells, and bytes below them.
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=min(7, len(handles)), frameon=False,
        fontsize=8,
    )  # fmt: skip


def _draw_edges(axes: Axes, cut: Cut, left: np.ndarray, right: np.ndarray, top: float) -> float:
    """What passes between devices, from the cell that makes it to those that use it; returns how far down it goes."""
    names = {node: cell.index for cell in cut.costs.graph.cells for node in cell.nodes}
    between = [
        (cut.costs.profile.value_bytes.get(edge.value, 0), edge)
        for edge in cut.edges
        if any(cut.ranks[user] != cut.ranks[edge.maker] for user in edge.users)
    ]
    labels: list[tuple[float, float, str]] = []
    lowest = 0.0
    for number, (size, edge) in enumerate(sorted(between, key=lambda pair: -pair[0])):
        begin = right[names[edge.value]] if edge.value in names else left[0]
        for user in edge.users:
            if cut.ranks[user] == cut.ranks[edge.maker]:
                continue
            end = left[cut.bounds[user][0]]
            for cell in range(*cut.bounds[user]):
                if any(e.value == edge.value and cell in e.users for e in cut.costs.graph.edges):
                    end = left[cell]
                    break
            width = max(end - begin, 1e-9)
            depth = top * (0.1 + 0.5 * width / right[-1])
            axes.add_patch(Arc(((begin + end) / 2, 0), width, depth, theta1=180, theta2=360, color=INK, linewidth=0.9))
            lowest = max(lowest, depth / 2)
            if number < EDGES:
                labels.append((depth / 2 + 0.01 * top, (begin + end) / 2, format_bytes(size)))
    taken: list[tuple[float, float]] = []
    for low, at, text in sorted(labels):  # the shallowest first, so that each is nearest to its own arc
        while any(abs(at - x) < APART * right[-1] and abs(low - y) < APART * top for x, y in taken):
            low += APART / 4 * top
        taken.append((at, low))
        lowest = max(lowest, low)
        axes.text(
            at, -low, text, ha="center", va="top", fontsize=7, color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},  # other values' arcs pass behind it
        )  # fmt: skip
    return -lowest - 2 * APART * top
