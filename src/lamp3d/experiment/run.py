"""The run folder: what is in it, and how a run is opened again."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from lamp3d.data import CaseStore, Dataset, read_dataset
from lamp3d.data.dataset import TRAIN
from lamp3d.errors import ConfigError, DatasetError
from lamp3d.experiment.config import ExperimentConfig, load_config
from lamp3d.files import cache_root, remove_leftovers, write_text
from lamp3d.nets import Network
from lamp3d.plan import Plan, TimeLine
from lamp3d.scan import UNNAMED
from lamp3d.train import time_line_path

WRITTEN = ("config.yaml", "versions.json", "plans", "history.jsonl", "best.safetensors")
"""What training writes over in a run folder, beside ``run.json``."""

_VERSIONS_OF = ("lamp3d", "torch", "monai", "numpy", "nibabel", "scipy", "safetensors")


@dataclass(frozen=True)
class Run:
    """A run folder: ``config.yaml``, ``versions.json``, ``run.json``, ``plans/``, checkpoints, history, results.

    Args:
        folder: where it is.
        config: as resolved when the run began.
        dataset: the folder that it was trained on.
        organs: names of the labels 1, 2, …
        channels: names of the scans' channels.
        splits: the cases' names by split; None: a run that did not write them down.
    """

    folder: Path
    config: ExperimentConfig
    dataset: Path
    organs: tuple[str, ...]
    channels: tuple[str, ...] = (UNNAMED,)
    splits: dict[str, tuple[str, ...]] | None = None

    @classmethod
    def create(cls, folder: Path, config: ExperimentConfig, dataset: Dataset, devices: int) -> Run:
        """Write the files that say what the run is; for a process that alone trains in the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(*(folder / name for name in ("run.json", *WRITTEN)))
        root = dataset.root.resolve()
        run = cls(folder, config, root, dataset.organs, dataset.channels, dataset.splits)
        run.save_about(str(root), devices)  # first: other files without it are somebody else's
        config.save(folder / "config.yaml")
        versions = {name: version(name) for name in _VERSIONS_OF}
        versions |= {"python": platform.python_version(), "machine": platform.machine(), "seed": str(config.train.seed)}
        _write_json(folder / "versions.json", versions)
        return run

    def save_about(self, dataset: str, devices: int) -> None:
        """Write ``run.json``.

        Args:
            dataset: the folder's path.
            devices: that it was trained on.
        """
        about = {"dataset": dataset, "organs": self.organs, "channels": self.channels}
        _write_json(self.folder / "run.json", about | {"devices": devices, "splits": self.splits})

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Read what a run is.

        Raises:
            ConfigError: the folder is not a run.
        """
        path = folder / "run.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            dataset, organs = Path(content["dataset"]), tuple(content["organs"])
            channels, splits = tuple(content.get("channels", [UNNAMED])), content.get("splits")
            splits = None if splits is None else {split: tuple(names) for split, names in splits.items()}
        except FileNotFoundError:
            raise ConfigError(
                f"{folder} is not a run folder (no run.json); give the folder that `lamp3d train` left, or to predict "
                "with a model that comes with lamp3d, its name with --model."
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged, or is not lamp3d's ({error!r}).") from error
        return cls(folder, load_config(folder / "config.yaml"), dataset, organs, channels, splits)

    @property
    def best(self) -> Path:
        """The checkpoint to predict with: the best on the validation split, else the last one."""
        best = self.folder / "best.safetensors"
        return best if best.exists() else self.folder / "last.safetensors"

    def network(self) -> Network:
        """The run's network with fresh weights."""
        return self.config.network.build(1 + len(self.organs), len(self.channels))

    def outline(self, more_classes: int = 0) -> Network:
        """The network without its weights: for its shapes and numbers.

        Args:
            more_classes: beside those of the run.
        """
        return self.config.network.outline(1 + len(self.organs) + more_classes, len(self.channels))

    @property
    def parameters(self) -> int:
        """How many the network has."""
        return sum(parameter.numel() for parameter in self.outline().parameters())

    def plan_path(self, stage: int) -> Path:
        """Where the plan of a curriculum stage is kept."""
        return self.folder / "plans" / f"stage-{stage}.json"

    def time_lines(self) -> dict[str, TimeLine]:
        """Predicted and measured step of every curriculum stage that has begun, by title."""
        lines = {}
        for stage, plan in enumerate(self.plans()):
            path = time_line_path(self.folder, stage)
            if path.exists():
                lines[f"stage {stage + 1}, predicted"] = plan.time_line()
                lines[f"stage {stage + 1}, measured"] = TimeLine.from_chrome_trace(json.loads(path.read_text("utf-8")))
        return lines

    def plans(self) -> list[Plan]:
        """The plans of all curriculum stages."""
        return [Plan.load(self.plan_path(stage)) for stage in range(len(self.config.train.curriculum))]

    def read_dataset(self, root: Path | None = None) -> Dataset:
        """A dataset, by default the one that the run was trained on; that one in the splits that it was trained on.

        It may have been moved or copied: where no splits are written down, cases of the same names are the same.

        Args:
            root: its folder.

        Raises:
            DatasetError: some of the run's cases are not there, and others that it was trained on would be new to it.
        """
        dataset = read_dataset(root or self.dataset, self.config.split)
        if self.splits is None:
            return dataset
        known = {name for names in self.splits.values() for name in names}
        missing = known - {case.name for case in dataset.cases}
        if dataset.root.resolve() == self.dataset or (dataset.drawn and not missing):
            return dataset.with_splits(self.splits)
        seen = set(self.splits[TRAIN])
        others = [name for split, names in dataset.splits.items() if split != TRAIN for name in names]
        if dataset.drawn and (leaked := sorted(seen.intersection(others))):
            raise DatasetError(
                f"{dataset.root} says nothing of splits, and lacks {len(missing)} of the run's cases, such as "
                f"{min(missing)}: {', '.join(leaked[:5])}, which it was trained on, would count as new. Add those "
                "cases, or write `splits` into dataset.json."
            )
        return dataset

    def store(self, dataset: Dataset) -> CaseStore:
        """Its cases, prepared as the run wants them."""
        return CaseStore(dataset, self.config.preprocess, cache_folder(self.config))


def cache_folder(config: ExperimentConfig) -> Path:
    """Where prepared scans are kept."""
    return cache_root() if config.cache is None else config.cache


def _write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")
