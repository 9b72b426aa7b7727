"""The report's charts: learning curves, scores per organ, and what a plan looks like."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lamp3d.evaluate import Results
from lamp3d.plan import Plan, TimeLine, format_bytes
from lamp3d.plan.schedule import Kind
from lamp3d.report.style import ACCENT, ACCENT_LIGHT, FONT, INK, MUTED, WARM, organ_colours
from lamp3d.train import EpochRecord

GB = 1e9
_ACTION_COLOURS: dict[Kind, tuple[str, str]] = {
    "forward": (ACCENT, "white"),
    "backward": (ACCENT_LIGHT, INK),
    "backward_input": (ACCENT_LIGHT, INK),
    "backward_weight": (WARM, "white"),
}
_ACTION_NAMES: dict[Kind, str] = {
    "forward": "forward of micro-batch",
    "backward": "backward",
    "backward_input": "backward, inputs",
    "backward_weight": "backward, weights",
}
_WIDTH = 10.4  # inches; the width of the page's column
_STAGES_PAD = 18  # points between axes and title: the stages' names


def learning_curves(history: Sequence[EpochRecord], organs: Sequence[str]) -> Figure:
    """Loss and validation Dice by epoch, with the curriculum's stages as bands.

    Args:
        history: the epochs in order.
        organs: the organs' names, for their colours.
    """
    with rc_context(FONT):
        figure = _figure(_WIDTH, 3.5)
        loss_axes, dice_axes = figure.subplots(1, 2)
        epochs = np.arange(1, len(history) + 1)
        loss_axes.set(xlabel="epoch")
        loss_axes.set_title("Training loss", pad=_STAGES_PAD)
        loss_axes.plot(epochs, [epoch.loss for epoch in history], color=ACCENT, linewidth=1.8, marker=".")

        dice_axes.set(xlabel="epoch", ylim=(0, 1))
        dice_axes.set_title("Validation Dice", pad=_STAGES_PAD)
        validated = [(at, epoch.dice) for at, epoch in zip(epochs, history, strict=True) if epoch.dice]
        colours = organ_colours(organs)
        for organ in organs:
            points = [(at, value) for at, dice in validated if (value := dice.get(organ)) is not None]
            if points:
                dice_axes.plot(*zip(*points, strict=True), color=colours[organ], linewidth=1, marker=".", label=organ)
        means = [(at, e.mean_dice) for at, e in zip(epochs, history, strict=True) if e.mean_dice is not None]
        if means:
            at, best = max(means, key=lambda point: point[1])
            # Said in the legend: beside the point it would lie over the curves of some run.
            dice_axes.plot(
                *zip(*means, strict=True), color=INK, linewidth=2.2, marker="o", markersize=6,
                markevery=[means.index((at, best))], label=f"mean, best {best:.3f}",
            )  # fmt: skip
            dice_axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=8)
        for axes in (loss_axes, dice_axes):
            axes.grid(axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.set_xlim(0.5, len(history) + 0.5)
            _stage_bands(axes, history)
    return figure


def scores_per_organ(results: Results) -> Figure:
    """Dice and HD95 of every case, organ by organ: a box for the quartiles, a dot a case."""
    organs = [organ for organ, summary in results.organs.items() if summary.dice.n]
    colours = organ_colours(list(results.organs))
    with rc_context(FONT):
        figure = _figure(_WIDTH, 0.9 + 0.42 * max(1, len(organs)))
        dice_axes, distance_axes = figure.subplots(1, 2, sharey=True)
        scores = [[case.organs[organ] for case in results.cases if organ in case.organs] for organ in organs]
        for axes, key in ((dice_axes, "dice"), (distance_axes, "hd95_mm")):
            for row, (organ, of_organ) in enumerate(zip(organs, scores, strict=True)):
                _strip(axes, row, [v for score in of_organ if (v := getattr(score, key)) is not None], colours[organ])
            axes.grid(axis="x")
        dice_axes.set(title="Dice", xlim=(-0.02, 1.02), ylim=(len(organs) - 0.4, -0.6))
        dice_axes.set_yticks(range(len(organs)), organs, color=INK)
        distance_axes.set(title="HD95 (mm)")
        distance_axes.set_xlim(left=0)
        distance_axes.tick_params(axis="y", length=0)
    return figure


def plan_bars(plan: Plan) -> Figure:
    """Seconds and memory of each device, as the plan predicts them."""
    ranks = range(plan.pipe)
    devices = [f"device {rank}" for rank in ranks]
    rows = np.arange(len(devices))

    def of_ranks(values: Sequence[float]) -> NDArray[np.float64]:
        return np.array([sum(v for v, r in zip(values, plan.ranks, strict=True) if r == rank) for rank in ranks])

    with rc_context(FONT):
        figure = _figure(_WIDTH, 1.0 + 0.36 * len(devices))
        time_axes, memory_axes = figure.subplots(1, 2, sharey=True)
        forward = of_ranks([stage.forward_seconds for stage in plan.stages]) * 1e3
        backward = of_ranks([stage.backward_seconds for stage in plan.stages]) * 1e3
        time_axes.barh(rows, forward, 0.6, color=ACCENT, label="forward")
        time_axes.barh(rows, backward, 0.6, left=forward, color=ACCENT_LIGHT, label="backward")
        time_axes.set(title="Work of one micro-batch (ms)", ylim=(len(devices) - 0.4, -0.6))
        time_axes.set_yticks(rows, devices, color=INK)

        peak = np.array([device.peak_bytes for device in plan.per_device]) / GB
        weights = np.minimum(of_ranks([stage.parameter_bytes for stage in plan.stages]) / GB, peak)
        memory_axes.barh(rows, weights, 0.6, color=WARM, label="parameters")
        rest = memory_axes.barh(rows, peak - weights, 0.6, left=weights, color="#f3cdb3", label="rest")
        # In figures too: beside a limit of gigabytes the bars of a small network cannot be seen.
        memory_axes.bar_label(rest, [format_bytes(device.peak_bytes) for device in plan.per_device], padding=3)
        if plan.memory_limit_bytes is not None:
            limit = plan.memory_limit_bytes / GB
            memory_axes.axvline(limit, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="limit")
        memory_axes.set(title="Peak memory (GB)")
        memory_axes.tick_params(axis="y", length=0)
        for axes in (time_axes, memory_axes):
            axes.grid(axis="x")
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=8, borderaxespad=0)
    return figure


def plan_picture(plan: Plan) -> Figure:
    """The predicted time line of one training step."""
    return time_line_picture({"predicted": plan.time_line()})


def time_line_picture(lines: Mapping[str, TimeLine]) -> Figure:
    """One training step on the devices' common clock: which micro-batch is where, and when (paper, Figs. 2c, 4 and 5).

    Args:
        lines: one or more time lines of as many devices by title, such as "predicted" and "measured"; drawn one above
            the other on one scale. A device's second stage is hatched.
    """
    longest = max(line.seconds for line in lines.values())
    devices = len(next(iter(lines.values())).actions)
    with rc_context(FONT):
        figure = _figure(_WIDTH, (0.85 + 0.38 * devices) * len(lines) + 0.55)
        panels = figure.subplots(len(lines), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, line) in zip(panels, lines.items(), strict=True):
            draw_time_line(axes, title, line, longest)
        panels[-1].set_xlabel("ms")
        explain_actions(figure, lines.values())
    return figure


def explain_actions(figure: Figure, lines: Iterable[TimeLine]) -> None:
    """The legend of time lines, below the figure."""
    there = {action.kind for line in lines for of_rank in line.actions for action, _, _ in of_rank}
    kinds = [kind for kind in _ACTION_COLOURS if kind in there]
    figure.legend(
        handles=[Patch(color=_ACTION_COLOURS[kind][0], label=_ACTION_NAMES[kind]) for kind in kinds],
        loc="outside lower center", ncols=len(kinds), frameon=False, fontsize=8,
    )  # fmt: skip


def draw_time_line(axes: Axes, title: str, line: TimeLine, longest: float) -> None:
    """One step's time line; ``longest`` seconds fill the width."""
    devices = len(line.actions)
    for rank, actions in enumerate(line.actions):
        first = min((action.stage for action, _, _ in actions), default=0)
        for action, begin, end in actions:
            fill, ink = _ACTION_COLOURS[action.kind]
            axes.add_patch(Rectangle(
                (begin * 1e3, rank - 0.38), (end - begin) * 1e3, 0.76, facecolor=fill, edgecolor="white",
                linewidth=0.8, hatch="////" if action.stage != first else None,
            ))  # fmt: skip
            if end - begin > 0.018 * longest:
                axes.text(
                    (begin + end) * 500, rank, str(action.micro_batch), ha="center", va="center", fontsize=8,
                    color=ink, bbox={"facecolor": fill, "edgecolor": "none", "pad": 1.5},  # over the hatching
                )  # fmt: skip
    axes.set(
        title=f"Forward and backward, {title}: {line.seconds:.3g} s, devices idle {line.bubble:.0%} of it",
        xlim=(0, longest * 1e3), ylim=(devices - 0.45, -0.55),
    )  # fmt: skip
    axes.set_yticks(range(devices), [f"device {rank}" for rank in range(devices)], color=INK)
    axes.tick_params(axis="y", length=0)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _strip(axes: Axes, row: int, values: Sequence[float], colour: str) -> None:
    if not values:
        return
    # A dot's height within its row only keeps dots apart; the golden ratio spreads them without chance.
    heights = row + 0.44 * ((np.arange(len(values)) * 0.618034) % 1 - 0.5)
    axes.boxplot(
        values, positions=[row], widths=0.62, orientation="horizontal", showfliers=False, patch_artist=True,
        manage_ticks=False, medianprops={"color": INK, "linewidth": 1.6}, whiskerprops={"color": MUTED},
        capprops={"color": MUTED}, boxprops={"facecolor": colour, "alpha": 0.28, "edgecolor": MUTED},
    )  # fmt: skip
    axes.scatter(values, heights, s=11, color=colour, edgecolor=INK, linewidth=0.35, zorder=3)


def _stage_bands(axes: Axes, history: Sequence[EpochRecord]) -> None:
    """Tells the stages apart; their names stand above the axes, where no curve can be."""
    start = 0
    for stage, epochs in groupby(history, key=lambda epoch: epoch.stage):
        stop = start + len(list(epochs))
        if stage % 2 == 0:
            axes.axvspan(start + 0.5, stop + 0.5, color="#f1f5f9", zorder=0)
        axes.text(
            (start + stop + 1) / 2, 1.01, f"stage {stage}" if start == 0 else str(stage),
            transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8, color=MUTED,
        )  # fmt: skip
        start = stop
