"""A run folder -> one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import statistics
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from lamp3d.data.dataset import Dataset, read_dataset
from lamp3d.errors import DatasetError, LampError
from lamp3d.evaluate import CaseResult, Results
from lamp3d.files import write_text
from lamp3d.graph.inputs import input_text
from lamp3d.plan import counted, format_bytes
from lamp3d.report.figures import learning_curves, plan_bars, plan_picture, scores_per_organ
from lamp3d.report.overlay import overlay_picture
from lamp3d.report.run import RunFiles, read_run
from lamp3d.report.style import organ_colours
from lamp3d.scan import read_scan
from lamp3d.volume import read_volume

SETTING_NAMES = {
    "checkpoint": "weights",
    "checkpoint_epochs": "epochs trained",
    "window": "prediction window (voxels)",
    "mirror": "mean over mirror images",
    "largest_part": "only the largest part of",
    "tolerance_mm": "tolerance of surface Dice (mm)",
}
"""Of an evaluation, where they do not speak for themselves."""


def write_report(run: Path, *, dataset: Path | None = None) -> Path:
    """Writes ``report.html`` into a run folder: scores, overlays, learning curves, plans and settings in one file.

    A part whose files are not there yet (no evaluation, say) is left out.

    Args:
        run: the run folder.
        dataset: where the evaluated dataset is now, for the overlays; by default where it was, ``settings.dataset``
            of ``results.json``.

    Returns:
        The page's path.

    Raises:
        ConfigError: if the folder holds no run, or a file in it is damaged.
        DatasetError: if ``dataset`` is none, or one with other organs.
    """
    content = read_run(run)
    template = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "score": _score,
        "millimetres": _millimetres,
        "bytes": _bytes,
        "counted": counted,
        "tint": _tint,
        "input": _input,
        "words": _words,
    }
    page = environment.from_string(template).render(
        title=f"{content.folder.resolve().name}",
        run=content,
        cards=_cards(content),
        colours=organ_colours(_organs(content)),
        scores=_chart(scores_per_organ(content.results)) if content.results and content.results.cases else None,
        overlays=_overlays(content, dataset),
        curves=_chart(learning_curves(content.history, _organs(content))) if content.history else None,
        stages=_stages(content),
        plans=[(plan, _chart(plan_bars(plan)), _chart(plan_picture(plan))) for plan in content.plans],
        config=yaml.safe_dump(content.config, sort_keys=False, width=100),
        setting_names=SETTING_NAMES,
        versions=content.versions,
    )
    path = run / "report.html"
    write_text(path, page)
    return path


@dataclass(frozen=True)
class _Overlay:
    rank: str
    case: CaseResult
    picture: Markup | None
    problem: str


def _organs(run: RunFiles) -> list[str]:
    """Every organ of the run, in the order of the labels."""
    if run.results is not None:
        return list(run.results.organs)
    return list(dict.fromkeys(organ for epoch in run.history for organ in epoch.dice or ()))


def _cards(run: RunFiles) -> list[tuple[str, str, str]]:
    """The numbers at the page's top: (value, what it is, detail)."""
    cards = []
    if results := run.results:
        cards.append(
            (_score(results.mean_dice), "mean Dice", f"{counted(len(results.cases), 'case')}, {results.split} split")
        )
        summaries = [organ for organ in results.organs.values() if organ.dice.n]
        for key, what in (("hd95_mm", "HD95"), ("surface_dice", "surface Dice")):
            values = [mean for organ in summaries if (mean := getattr(organ, key).mean) is not None]
            if values:
                mean = statistics.fmean(values)
                text = f"{_figures(mean)} mm" if key == "hd95_mm" else _score(mean)
                tolerance = results.settings.get("tolerance_mm")
                over = f"{len(values)} of {len(summaries)} " * (len(values) < len(summaries))  # the others are missed
                detail = f"within {tolerance} mm" if key == "surface_dice" and tolerance else f"mean over {over}organs"
                cards.append((text, what, detail))
        if seconds := [case.seconds for case in results.cases if case.seconds is not None]:
            cards.append((f"{_figures(statistics.median(seconds))} s", "a prediction", "median over cases"))
    best = max((epoch.mean_dice for epoch in run.history if epoch.mean_dice is not None), default=None)
    if best is not None:
        cards.append((_score(best), "best validation Dice", f"in {counted(len(run.history), 'epoch')}"))
    if run.plans:
        peak = max((peak for epoch in run.history for peak in epoch.peak_bytes), default=0)
        detail = f"at most {_bytes(peak)} on one" if peak else run.plans[0].device_type
        cards.append((str(max(plan.devices for plan in run.plans)), "devices", detail))
    return cards


def _stages(run: RunFiles) -> list[dict[str, Any]]:
    """One row a curriculum stage: what was trained and what it cost."""
    rows = []
    for stage in sorted({epoch.stage for epoch in run.history}):
        epochs = [epoch for epoch in run.history if epoch.stage == stage]
        plan = run.plans[stage - 1] if stage <= len(run.plans) else None
        share = statistics.mean(epoch.volume_share for epoch in epochs)
        rows.append(
            {
                "number": stage,
                "input": _input(plan.input_shape) if plan else "",
                "epochs": len(epochs),
                "loss": next((epoch.loss for epoch in reversed(epochs) if epoch.loss is not None), None),
                "dice": max((epoch.mean_dice for epoch in epochs if epoch.mean_dice is not None), default=None),
                "seconds": statistics.median(epoch.seconds_per_step for epoch in epochs),
                "predicted_seconds": plan.step_seconds * share if plan else None,
                "predicted_bytes": [device.peak_bytes for device in plan.per_device] if plan else None,
                "peak_bytes": [max(peaks) for peaks in zip(*(epoch.peak_bytes for epoch in epochs), strict=False)],
                "bad_steps": sum(epoch.bad_steps for epoch in epochs),
            }
        )
    return rows


def _overlays(run: RunFiles, root: Path | None) -> list[_Overlay]:
    """Pictures of the best, the median and the worst case by mean Dice."""
    if run.results is None:
        return []
    ranked = sorted((c for c in run.results.cases if c.mean_dice is not None), key=lambda c: -(c.mean_dice or 0.0))
    places = {0: "best", len(ranked) // 2: "median", len(ranked) - 1: "worst"} if len(ranked) > 2 else {}
    chosen = [(places.get(k, ""), case) for k, case in enumerate(ranked) if len(ranked) <= 2 or k in places]
    dataset, problem = None, "the dataset's folder is not known."
    if root is not None:
        dataset = _evaluated_dataset(root, run.results)
    elif isinstance(named := run.results.settings.get("dataset"), str):
        try:
            dataset = _evaluated_dataset(Path(named), run.results)
        except LampError as error:
            problem = f"{str(error).removesuffix('.')}. If the dataset has moved: lamp3d report RUN DATASET."
    return [_overlay(run, run.results, dataset, problem, rank, case) for rank, case in chosen]


def _evaluated_dataset(root: Path, results: Results) -> Dataset:
    dataset = read_dataset(root)
    if dataset.organs != tuple(results.organs):
        raise DatasetError(
            f"{root} has the organs {', '.join(dataset.organs)}, but {', '.join(results.organs)} were evaluated; give "
            "the dataset that was."
        )
    return dataset


def _overlay(
    run: RunFiles, results: Results, dataset: Dataset | None, problem: str, rank: str, result: CaseResult
) -> _Overlay:
    picture = None
    if dataset is not None:
        try:
            # By name alone: the run's splits may have been drawn.
            case = next((case for case in dataset.cases if case.name == result.name), None)
            if case is None or case.label is None:
                raise LampError(f"{dataset.root} has no contours of {result.name}")
            prediction = read_volume(run.folder / "predictions" / results.split / f"{case.name}.nii.gz")
            scan = read_scan(case.images, dataset.channels)[0]
            figure = overlay_picture(scan, read_volume(case.label), prediction, dataset.organs)
            picture, problem = _picture(figure, result.name), ""
        except LampError as error:
            problem = str(error)
    return _Overlay(rank, result, picture, problem)


def _picture(figure: Figure, text: str) -> Markup:
    """A PNG within the page, for what is made of voxels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return _embedded(buffer, "image/png", text)


def _chart(figure: Figure) -> Markup:
    """An SVG within the page, sharp at every size, its letters drawn so that no font need be there."""
    buffer = io.BytesIO()
    # A fixed salt and no date: the same run gives the same page.
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "lamp3d"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    # In a window too narrow for it to be read it scrolls.
    return Markup('<div class="scroll">{}</div>').format(_embedded(buffer, "image/svg+xml", "chart"))


def _embedded(buffer: io.BytesIO, media_type: str, text: str) -> Markup:
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Markup('<img alt="{}" src="data:{};base64,{}">').format(text, media_type, data)


def _figures(value: float) -> str:
    """Three figures, or all before the point: what a card has room for."""
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"


def _words(value: object) -> str:
    """A setting's value as it is said, not as Python writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        separator = " × " if value and isinstance(value[0], int) else ", "
        return separator.join(map(str, value)) or "none"
    return "–" if value is None else str(value)


def _input(shape: tuple[int, ...] | dict[str, tuple[int, ...]]) -> str:
    return input_text(shape).replace("×", " × ")


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _millimetres(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _bytes(value: float | None) -> str:
    # Unbroken, since a column of several devices' wraps.
    return "–" if value is None else format_bytes(value).replace(" ", "\u00a0")


def _tint(value: float | None) -> str:
    """A table cell's background for a score in [0, 1]: from a warm to a cool wash over a white page."""
    if value is None:
        return "transparent"
    hue = 14 + 150 * min(1.0, max(0.0, (value - 0.3) / 0.65))
    return f"hsl({hue:.0f} 62% 92%)"
