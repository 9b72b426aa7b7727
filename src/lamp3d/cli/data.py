"""The commands that work on datasets: convert."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from lamp3d.cli.common import app, say
from lamp3d.data.convert import AnatomyNetSource, OpenKbpSource, Source, write_decathlon
from lamp3d.data.convert.han import SPACING_MM
from lamp3d.data.dataset import read_dataset
from lamp3d.errors import ConfigError

KINDS = ("openkbp", "han")


@app.command()
def convert(
    kind: Annotated[str, typer.Argument(help="openkbp (the public repository) or han (AnatomyNet's arrays).")],
    source: Annotated[Path, typer.Argument(help="Folder as it was downloaded.")],
    dest: Annotated[Path, typer.Argument(help="New folder, in Decathlon layout.")],
    spacing: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help=f"han: voxels in mm, x,y,z; default {','.join(f'{s:g}' for s in SPACING_MM)}."),
    ] = None,
) -> None:
    """Public datasets, as they are published -> Decathlon layout, with missing contours and splits."""
    if kind not in KINDS:
        raise ConfigError(f"{kind!r} is not a dataset that can be converted; known: {', '.join(KINDS)}.")
    if spacing is not None and kind != "han":
        raise ConfigError(f"--spacing is for han only: {kind} says itself how large its voxels are.")
    reader: Source = (
        OpenKbpSource(source) if kind == "openkbp" else AnatomyNetSource(source, _millimetres(spacing) or SPACING_MM)
    )
    write_decathlon(reader, dest)
    dataset = read_dataset(dest)
    counts = ", ".join(f"{len(cases)} {split}" for split, cases in dataset.splits.items())
    missing = sum(len(case.annotated) < len(dataset.organs) for case in dataset.cases)
    say(f"{dest}: {len(dataset.cases)} cases ({counts}), {missing} of them without the contours of some organs.")


def _millimetres(text: str | None) -> tuple[float, float, float] | None:
    if text is None:
        return None
    try:
        x, y, z = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--spacing {text!r} is not three numbers of mm, such as 1,1,2.5.") from None
    return x, y, z
