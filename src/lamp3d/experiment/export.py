"""A run made small enough to hand on: its weights, what prediction needs to know, and a card that says what it is.

What is exported is a run folder with only these, so that all that predicts with a run predicts with it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import torch
from jinja2 import StrictUndefined, Template

from lamp3d.errors import ConfigError
from lamp3d.evaluate import Results
from lamp3d.experiment.run import Run
from lamp3d.files import room_for, write_text
from lamp3d.intervals import estimate, scores
from lamp3d.train import Checkpoint, load_weights, save_checkpoint

SHIPPED = Path(__file__).parents[1] / "models"
"""Where the models lie that come with lamp3d."""

TOLERANCE = 0.02
"""Of the largest logit: by so much may kernels in half precision move any logit."""


def export(run: Run, dest: Path, *, name: str, data: str, licence: str) -> Path:
    """Write a run's best weights, kernels in float16, as a folder that `predict` takes.

    Args:
        run: it; what it was evaluated on last is told in the card.
        dest: the new folder.
        name: of the model.
        data: what it was trained on, for the card.
        licence: of the weights, for the card.

    Returns:
        ``dest``.

    Raises:
        ConfigError: the folder is not empty, the run has no weights, its network is not lamp3d's or MONAI's, or half
            precision changes its output.
        DiskFullError: there is no room for it.
    """
    if run.config.network.kind == "own":
        raise ConfigError(
            f"{run.folder} has a network of your own ({run.config.network.name}), and an exported model does without "
            "your code: hand on the run folder together with it."
        )
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise ConfigError(f"{dest} is not empty, and nothing in it is replaced; give a new folder.")
    if not run.best.exists():
        raise ConfigError(f"{run.folder} has no checkpoint yet; train first.")
    dest.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and moved there whole, so that a folder with this name is a model.
    with room_for(dest), tempfile.TemporaryDirectory(prefix=f".{dest.name}-", dir=dest.parent) as beside:
        folder = Path(beside) / dest.name
        folder.mkdir()
        _write(run, folder, name=name, data=data, licence=licence)
        if dest.exists():
            dest.rmdir()
        folder.rename(dest)
    return dest


def _write(run: Run, folder: Path, *, name: str, data: str, licence: str) -> None:
    checkpoint = Checkpoint(run.best)
    weights = {
        f"model/{key}": tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor
        for key, tensor in checkpoint.read("model").items()
    }
    path = folder / "best.safetensors"
    save_checkpoint(path, weights, {"epochs": checkpoint.progress.get("epochs")})
    moved = _difference(run, path)
    if not moved <= TOLERANCE:  # nor NaN, of a weight beyond what float16 holds
        raise ConfigError(f"half precision would move this network's logits by {moved:.1%} of the largest one.")
    # Paths of the machine that trained it are nobody's business, nor are the names of its scans.
    begun = run.config.initial_weights
    update = {"cache": None, "initial_weights": None if begun is None else Path(begun).name}
    run.config.model_copy(update=update).save(folder / "config.yaml")
    replace(run, folder=folder, splits=None).save_about("", devices=1)
    shutil.copy(run.folder / "versions.json", folder / "versions.json")
    shutil.copytree(run.folder / "plans", folder / "plans")
    results = _results_of(run, checkpoint)
    dice = None if results is None else scores([results.cases], run.organs, "dice")
    card = resources.files(__package__).joinpath("model_card.md.j2").read_text(encoding="utf-8")
    text = Template(card, undefined=StrictUndefined).render(
        name=name, data=data, licence=licence, run=run, results=results, moved=moved,
        estimates=() if dice is None else [estimate(dice[:, :, [k]]) for k in range(len(run.organs))],
        overall=None if dice is None else estimate(dice),
        megabytes=path.stat().st_size / 1e6, version=version("lamp3d"),
    )  # fmt: skip
    write_text(folder / "README.md", text + "\n")


def _results_of(run: Run, checkpoint: Checkpoint) -> Results | None:
    """What the run's last evaluation found, if it was of these weights."""
    path = run.folder / "results.json"
    results = Results.load(path) if path.exists() else None
    if results is None or results.settings.get("checkpoint_epochs") != checkpoint.progress.get("epochs"):
        return None
    return results


def find_model(name: str) -> Path:
    """The folder of a model that comes with lamp3d, or of an exported one.

    Raises:
        ConfigError: there is none; the message lists those that come with lamp3d.
    """
    folders = [Path(name)] if os.sep in name else [SHIPPED / name, Path(name)]
    for folder in folders:
        if (folder / "run.json").exists():
            return folder
    shipped = ", ".join(sorted(path.parent.name for path in SHIPPED.glob("*/run.json"))) or "none yet"
    raise ConfigError(f"no model {name!r}; with lamp3d come: {shipped}. The folder of an exported model will do too.")


def _difference(run: Run, weights: Path) -> float:
    """How far the outputs of the two sets of weights are apart, of the largest logit, on noise."""
    logits = []
    for path in (run.best, weights):
        network = run.network().eval()
        load_weights(network, path)
        image = torch.rand(1, len(run.channels), *[2 * network.divisor] * 3, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits.append(network(image))
    return float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
