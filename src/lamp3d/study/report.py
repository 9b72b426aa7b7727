"""A study's tables, in the form of the paper's, and its figure."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from lamp3d.files import write_atomically, write_text
from lamp3d.intervals import Estimate, Score, difference, estimate, spread
from lamp3d.plan import format_bytes
from lamp3d.report.style import FONT, organ_colours
from lamp3d.study.config import saved_study
from lamp3d.study.result import RowTimings, RunResult, by_row, read_results, read_timings, scores_of, unfinished

TITLES: dict[Score, tuple[str, int]] = {
    "dice": ("Dice", 3),
    "hd95_mm": ("HD95 in mm", 1),
    "surface_dice": ("surface Dice", 3),
}
EVEN_VOXELS = 0.02
"""By so much may a control have seen more or less."""

Table = list[list[str]]
"""The first row has the headings."""


def write_study_report(out: Path) -> Path:
    """Write ``report.md``, ``figure1.png`` and one CSV file a table, from the results that there are.

    Args:
        out: the study's folder.

    Returns:
        the report's path.

    Raises:
        ConfigError: a file in it is not a result.
    """
    study = saved_study(out)
    text = [f"# {study.title}", ""]
    done = read_results(out / "results")
    if missing := unfinished(study, done):
        text += [f"**Not finished:** {', '.join(missing)}.", ""]
    order = [row.name for row in study.rows]
    done.sort(key=lambda result: order.index(result.row) if result.row in order else len(order))
    timed = read_timings(out / "timings")
    timed.sort(key=lambda timings: order.index(timings.row) if timings.row in order else len(order))
    for split, results in (("validation", done), ("test", read_results(out / "test"))):
        if not results:
            continue
        tables = {f"{title} ({split})": accuracy(results, score) for score, (title, _) in TITLES.items()}
        if split == "validation":
            tables |= {"Seconds a scan": inference(timed)} if timed else {}
            tables |= {"What it took": costs(results)}
        if (compared := controls(results)) is not None:
            tables[f"Larger input, or longer training? ({split})"] = compared
        for title, table in tables.items():
            text += [f"## {title}", "", *_markdown(table), ""]
            name = "".join(letter if letter.isalnum() else "-" for letter in title.lower()).strip("-")
            write_text(out / f"{name}.csv", _csv(table))
    if done:
        picture = out / "figure1.png"
        write_atomically(picture, lambda temporary: figure(done, timed).savefig(temporary, dpi=150, format="png"))
        text += ["![Accuracy and inference time](figure1.png)", ""]
    text += [
        "Means over patients, organs and seeds; ± is the standard deviation over seeds, of seconds a scan over scans; "
        "in brackets are the middle 95 % of 2,000 draws of patients with replacement.",
        "",
    ]
    path = out / "report.md"
    write_text(path, "\n".join(text))
    return path


def accuracy(results: Sequence[RunResult], score: Score) -> Table:
    """Every organ and their mean, by row (paper, tables 1 and 4)."""
    digits = TITLES[score][1]
    organs = results[0].organs
    table: Table = [["network", "input", "seeds", *organs, "mean"]]
    for runs in by_row(results).values():
        found = scores_of(runs, score)
        by_organ = [_plain(*spread(found[:, :, [k]]), digits) for k in range(len(organs))]
        first = runs[0]
        table.append([first.network, first.input, str(len(runs)), *by_organ, _full(estimate(found), digits)])
    return table


def controls(results: Sequence[RunResult]) -> Table | None:
    """Rows beside their controls, which have seen as many voxels; None: there are none."""
    rows = by_row(results)
    table: Table = [["row", "control", "voxels, control / row", "Dice", "control's", "difference"]]
    for name, runs in rows.items():
        of = runs[0].control_of
        if of is None or of not in rows:
            continue
        ratio = runs[0].voxels / rows[of][0].voxels
        uneven = "" if abs(ratio - 1) <= EVEN_VOXELS else " (not even)"
        mine, theirs = scores_of(rows[of], "dice"), scores_of(runs, "dice")
        of_both = [_full(estimate(found), 3) for found in (mine, theirs)]
        table.append([of, name, f"{ratio:.2f}{uneven}", *of_both, _full(difference(mine, theirs), 3, sign=True)])
    return table if len(table) > 1 else None


def inference(timed: Sequence[RowTimings]) -> Table:
    """Seconds and memory of predictions (paper, tables 3 and 5)."""
    table: Table = [["network", "trained on", "input", "devices", "s a scan", "peak memory of a device"]]
    for row_timings in timed:
        for timing in row_timings.timings:
            spread = f" ± {statistics.stdev(timing.seconds):.2f}" if len(timing.seconds) > 1 else ""
            seconds = f"{statistics.fmean(timing.seconds):.2f}{spread}"
            row = [row_timings.network, row_timings.input, _by(timing.window), str(timing.devices), seconds]
            table.append([*row, format_bytes(timing.peak_bytes)])
    return table


def costs(results: Sequence[RunResult]) -> Table:
    """What each run has seen and taken."""
    table: Table = [["run", "parameters", "steps", "not finite", "voxels seen", "training", "best epoch"]]
    for result in results:
        table.append(
            [
                result.name, f"{result.parameters / 1e6:.2f} M", f"{result.steps:,}",
                str(result.bad_steps), f"{result.voxels / 1e9:.2f} G", f"{result.train_seconds / 60:.0f} min",
                str(result.best_epoch or "–"),
            ]
        )  # fmt: skip
    return table


def figure(results: Sequence[RunResult], timed: Sequence[RowTimings]) -> Figure:
    """Accuracy, and seconds a scan, by network and input (paper, figure 1)."""
    rows = by_row(results)
    networks = list(dict.fromkeys(runs[0].network for runs in rows.values()))
    inputs = list(dict.fromkeys(runs[0].input for runs in rows.values()))
    colours = organ_colours(networks)
    with rc_context(FONT):
        drawn = Figure(figsize=(10.4 if timed else 5.4, 3.8), layout="constrained")
        FigureCanvasAgg(drawn)
        dice_axes, *others = drawn.subplots(1, 2 if timed else 1, squeeze=False)[0]
        dice_axes.set(title=f"Dice on the {results[0].split} split", xlabel="input")
        for shift, network in enumerate(networks):
            points: list[tuple[float, ...]] = []
            apart: list[tuple[float, ...]] = []
            for runs in rows.values():
                if runs[0].network == network:
                    found = estimate(scores_of(runs, "dice"))
                    if found.mean is not None:
                        low, high = (np.nan if end is None else end for end in (found.low, found.high))
                        at = inputs.index(runs[0].input) + 0.06 * (shift - (len(networks) - 1) / 2)
                        point = (at, found.mean, found.mean - low, high - found.mean)
                        (points if runs[0].control_of is None else apart).append(point)
            for group, filled in ((points, True), (apart, False)):  # controls are no step of the curriculum
                if group:
                    places, mean, below, above = zip(*sorted(group), strict=True)
                    dice_axes.errorbar(
                        places, mean, yerr=[below, above], color=colours[network], marker="o", capsize=3,
                        label=network if filled else f"{network}, control",
                        markerfacecolor=colours[network] if filled else "white",
                        linestyle="-" if filled and len(group) > 1 else "none",
                    )  # fmt: skip
        dice_axes.set_xticks(range(len(inputs)), inputs)
        dice_axes.legend(frameon=False)
        for axes in others:
            _draw_seconds(axes, timed, networks, colours)
        for axes in (dice_axes, *others):
            axes.grid(axis="y")
    return drawn


def _draw_seconds(axes: Axes, timed: Sequence[RowTimings], networks: Sequence[str], colours: Mapping[str, str]) -> None:
    axes.set(title="Seconds a scan, by how it is predicted", yscale="log")
    ways = list(dict.fromkeys((timing.window, timing.devices) for row in timed for timing in row.timings))
    for shift, network in enumerate(networks):
        of_network = [timing for row in timed if row.network == network for timing in row.timings]
        for place, way in enumerate(ways):
            seconds = [s for timing in of_network if (timing.window, timing.devices) == way for s in timing.seconds]
            if seconds:
                width = 0.8 / len(networks)
                at = place + width * (shift - (len(networks) - 1) / 2)
                # Points: the length of a bar would say nothing, for a logarithmic axis has no zero.
                axes.plot(at, statistics.fmean(seconds), "o", markersize=7, color=colours[network])
    by = [(_by(window).replace(" ", "\n"), devices) for window, devices in ways]
    names = [f"{way}\n{devices} device{'s' * (devices > 1)}" for way, devices in by]
    axes.set_xticks(range(len(ways)), names, fontsize=8)
    axes.set_xlim(-0.5, len(ways) - 0.5)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _by(window: str) -> str:
    return window if window == "whole" else f"windows {window.replace('x', '×')}"


def _plain(mean: float | None, deviation: float | None, digits: int) -> str:
    if mean is None:
        return "–"
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _full(found: Estimate, digits: int, *, sign: bool = False) -> str:
    if found.mean is None:
        return "–"
    plus = "+" if sign else ""
    text = _plain(found.mean, found.deviation, digits) if not sign else f"{found.mean:+.{digits}f}"
    if found.low is None or found.high is None:
        return text
    return f"{text} [{found.low:{plus}.{digits}f}, {found.high:{plus}.{digits}f}]"


def _markdown(table: Table) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return [lines[0], "|" + " --- |" * len(table[0]), *lines[1:]]


def _csv(table: Table) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue()
