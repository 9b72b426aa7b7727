"""A dataset folder, in the layout of the Medical Segmentation Decathlon or nnU-Net's: cases, organs, splits.

``dataset.json`` may hold two things beyond the Decathlon's own: ``annotated``, per case, the names of the organs that
were contoured (all of them when absent), and ``splits``, the case names of "train", "validation" and maybe "test".
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lamp3d.data.nnunet import as_decathlon, is_nnunet
from lamp3d.errors import DatasetError
from lamp3d.explain import explained
from lamp3d.files import write_text
from lamp3d.scan import UNNAMED, scan_name
from lamp3d.settings import Settings

TRAIN, VALIDATION, TEST = "train", "validation", "test"

MOST_ORGANS = 255
"""That the bytes of label maps have values for."""

Share = Annotated[int, Field(ge=0, strict=True)] | Annotated[float, Field(ge=0, lt=1)]
"""So many cases, or such a part of them; 1.0 is neither, for it would be taken for one case."""


class SplitConfig(Settings):
    """How the cases of a dataset that names no splits are divided; a run keeps what came out.

    Args:
        validation: cases, or a fraction of those that are not for testing.
        test: cases with contours that are taken away for testing, or a fraction of all (paper §3, liver: 27 of 131).
        seed: of the shuffle, which is the same on every machine.
    """

    validation: Share = 0.2
    test: Share = 0
    seed: int = Field(default=2020, ge=0)


@dataclass(frozen=True)
class Case:
    """One patient's scan.

    Args:
        name: the image file's name without ``.nii`` or ``.nii.gz`` (and nnU-Net's channel); unique in its dataset.
        images: the scan: one file with all its channels, or a file a channel.
        label: the label map on the same grid, or None for a scan without one.
        annotated: names of the organs that the label map has contours for.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None
    annotated: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """The cases of one folder.

    Args:
        name: what ``dataset.json`` calls it.
        root: the folder.
        organs: names; voxels of ``organs[k]`` have label k + 1, the background is 0.
        cases: all cases, in the file's order.
        splits: names of the cases of each split.
        channels: names of the scans' channels, such as CT, or T1 and T2.
        drawn: whether the folder says nothing of splits, so that they were drawn.
    """

    name: str
    root: Path
    organs: tuple[str, ...]
    cases: tuple[Case, ...]
    splits: dict[str, tuple[str, ...]]
    channels: tuple[str, ...] = (UNNAMED,)
    drawn: bool = False

    @property
    def n_classes(self) -> int:
        """The organs and the background."""
        return 1 + len(self.organs)

    def split(self, name: str) -> tuple[Case, ...]:
        """The cases of one split.

        Raises:
            DatasetError: there is no such split.
        """
        if name not in self.splits:
            raise DatasetError(f"{self.root}: no split {name!r}; it has {', '.join(self.splits)}")
        by_name = {case.name: case for case in self.cases}
        return tuple(by_name[case] for case in self.splits[name])

    def with_splits(self, splits: Mapping[str, Sequence[str]]) -> Dataset:
        """The same cases, divided as they were before.

        Raises:
            DatasetError: some of them are not there any more.
        """
        kept = {split: tuple(names) for split, names in splits.items()}
        there = {case.name for case in self.cases}
        if gone := [name for names in kept.values() for name in names if name not in there]:
            raise DatasetError(
                f"{self.root}: the run's cases {', '.join(gone)} are not there any more; bring them back"
            )
        _check_splits(self.root, kept, self.cases)
        return replace(self, splits=kept, drawn=False)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="ignore")
    name: str | None = None
    image: str | tuple[str, ...]
    label: str | None = None
    annotated: tuple[str, ...] | None = None


class _DatasetJson(BaseModel):
    """What lamp3d reads of a ``dataset.json``; the Decathlon has more in it."""

    model_config = ConfigDict(extra="ignore")
    name: str = ""
    modality: dict[int, str] | str = UNNAMED
    labels: dict[int, str]
    training: tuple[_Entry, ...]
    test: tuple[str | _Entry, ...] = ()
    splits: dict[str, tuple[str, ...]] | None = None


def read_dataset(root: Path, split: SplitConfig | None = None) -> Dataset:
    """Read and check the ``dataset.json`` of a folder, without opening any scan.

    Args:
        root: the folder; all paths in ``dataset.json`` are relative to it.
        split: how to divide the cases if ``dataset.json`` does not say; None: the defaults.

    Raises:
        DatasetError: the JSON is broken or contradicts itself: labels with gaps, files that are absent, case names
            given twice, annotated organs or split members that do not exist, a case in two splits, a misspelt split. Or
            there are more organs than `MOST_ORGANS`.
    """
    root = Path(root)
    path = root / "dataset.json"
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(written, dict) and is_nnunet(written):
            written = as_decathlon(root, written)
        content = _DatasetJson.model_validate(written)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DatasetError(
            f"{path}: no such file; give the folder of a dataset in Decathlon or nnU-Net layout"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: not valid JSON ({error}); repair it") from error
    except ValidationError as error:
        raise DatasetError(f"{path}: {explained(error, _DatasetJson, written)}; see the Decathlon layout") from error

    organs = _organs(path, content.labels)
    tests = tuple(_Entry(image=entry) if isinstance(entry, str) else entry for entry in content.test)
    channels = _channels(path, content.modality)
    cases = tuple(_case(path, entry, organs, channels) for entry in (*content.training, *tests))
    if twice := _twice(case.name for case in cases):
        raise DatasetError(f"{path}: cases listed twice: {', '.join(twice)}; list each image once")
    if content.splits is None:
        splits = _drawn_splits(path, [case.name for case in cases[: len(content.training)]], split or SplitConfig())
        if tests and TEST not in splits:
            splits[TEST] = tuple(case.name for case in cases[len(content.training) :])
    else:
        splits = content.splits
        _check_names(path, splits)
    _check_splits(path, splits, cases)
    name, drawn = content.name or root.resolve().name, content.splits is None
    return Dataset(name, root, organs, cases, splits, channels, drawn)


def write_dataset_json(
    root: Path,
    *,
    name: str,
    description: str,
    organs: Sequence[str],
    training: Sequence[Mapping[str, object]],
    test: Sequence[Mapping[str, object]] = (),
    splits: Mapping[str, Sequence[str]],
    **more: object,
) -> None:
    """Write what `read_dataset` reads of a CT dataset; last of all, since a folder with it counts as complete.

    Args:
        root: the folder.
        name, description: of the dataset.
        organs: in the order of their labels, from 1.
        training, test: image, label and annotated organs of every case.
        splits: the cases' names by split.
        more: entries that only the writer understands.
    """
    content = {
        "name": name,
        "description": description,
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {str(label): organ for label, organ in enumerate(("background", *organs))},
        "numTraining": len(training),
        "numTest": len(test),
        "training": list(training),
        "test": list(test),
        "splits": {split: list(names) for split, names in splits.items()},
        **more,
    }
    write_text(root / "dataset.json", json.dumps(content, indent=1))


def _organs(path: Path, labels: dict[int, str]) -> tuple[str, ...]:
    if set(labels) <= {0}:
        raise DatasetError(f"{path}: labels {labels} name no organ; add those that the label maps hold, from 1")
    if sorted(labels) != list(range(len(labels))):
        raise DatasetError(
            f"{path}: labels {sorted(labels)} must be 0 (background), 1, 2, … without gaps; renumber them"
        )
    if len(labels) > 1 + MOST_ORGANS:
        raise DatasetError(f"{path}: {len(labels) - 1} organs; at most {MOST_ORGANS} are supported: leave some out")
    organs = tuple(labels[value] for value in range(1, len(labels)))
    if twice := _twice(organs):
        raise DatasetError(f"{path}: label names used twice: {', '.join(twice)}; name each organ once")
    return organs


def _channels(path: Path, modality: dict[int, str] | str) -> tuple[str, ...]:
    if isinstance(modality, str):
        return (modality,)
    if sorted(modality) != list(range(len(modality))) or not modality:
        raise DatasetError(f"{path}: channels {sorted(modality)} must be 0, 1, 2, … without gaps; renumber them")
    return tuple(modality[channel] for channel in range(len(modality)))


def _case(path: Path, entry: _Entry, organs: tuple[str, ...], channels: tuple[str, ...]) -> Case:
    images = tuple(path.parent / image for image in ([entry.image] if isinstance(entry.image, str) else entry.image))
    if len(images) not in (1, len(channels)):
        raise DatasetError(
            f"{path}: {len(images)} files of {', '.join(map(str, images)) or 'a case'}, but {len(channels)} channels "
            f"({', '.join(channels)}); list one file with all of them, or a file each"
        )
    label = None if entry.label is None else path.parent / entry.label
    for file in (*images, label):
        if file is not None and not file.exists():
            raise DatasetError(f"{path}: lists {file}, which is absent; add the file or take the case off the list")
    name = entry.name or scan_name(*images)
    if "/" in name:  # it could lead out of the folders of prepared scans and predictions
        raise DatasetError(f"{path}: case {name!r}: files are called by it, so that it has no /; rename it")
    annotated = organs if entry.annotated is None else entry.annotated
    if unknown := [organ for organ in annotated if organ not in organs]:
        raise DatasetError(
            f"{path}: case {name}: annotated organs {unknown} are not among the labels {list(organs)}; "
            "spell them as the labels do"
        )
    # In the labels' order, so that a different spelling of the same list is the same case.
    return Case(name, images, label, tuple(organ for organ in organs if organ in annotated))


def _drawn_splits(path: Path, names: Sequence[str], config: SplitConfig) -> dict[str, tuple[str, ...]]:
    """A shuffle of the sorted names that is the same on every machine: validation first, then training, then test."""
    if not names:
        raise DatasetError(f"{path}: `training` lists no cases; list those that have contours")
    ordered = sorted(names)
    shuffled = [ordered[i] for i in np.random.default_rng(config.seed).permutation(len(ordered))]
    n_test = _count(config.test, len(ordered))
    n_validation = _count(config.validation, len(ordered) - n_test) if len(ordered) > 1 else 0
    if n_test + n_validation >= len(ordered):
        raise DatasetError(
            f"{path}: {n_validation} cases for validation and {n_test} for testing leave none of {len(ordered)} to "
            "train on; lower split.validation or split.test."
        )
    n_train = len(ordered) - n_test
    splits = {TRAIN: tuple(shuffled[n_validation:n_train]), VALIDATION: tuple(shuffled[:n_validation])}
    return splits | ({TEST: tuple(shuffled[n_train:])} if n_test else {})


def _count(share: float, cases: int) -> int:
    if isinstance(share, int):
        return share
    return max(1, round(share * cases)) if share else 0


def _check_names(path: Path, splits: Iterable[str]) -> None:
    """A split may be called anything, but not nearly what one is called that is not there: nothing would use it."""
    absent = [name for name in (TRAIN, VALIDATION, TEST) if name not in splits]
    for split in splits:
        begun = [name for name in absent if split and name.startswith(split.lower())]
        if close := begun or difflib.get_close_matches(split.lower(), absent, 1):
            raise DatasetError(f"{path}: split {split!r}; did you mean {close[0]!r}? Rename it")


def _check_splits(path: Path, splits: dict[str, tuple[str, ...]], cases: tuple[Case, ...]) -> None:
    by_name = {case.name: case for case in cases}
    for split, names in splits.items():
        if unknown := [name for name in names if name not in by_name]:
            raise DatasetError(f"{path}: split {split!r} names unknown cases: {', '.join(unknown)}; correct the split")
        if split != TEST and (bare := [name for name in names if by_name[name].label is None]):
            raise DatasetError(
                f"{path}: split {split!r} has cases without a label: {', '.join(bare)}; add their label maps, or list "
                "them under `test`"
            )
    if shared := _twice(name for names in splits.values() for name in names):
        raise DatasetError(f"{path}: cases in more than one split place: {', '.join(shared)}; keep splits disjoint")


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, n in Counter(names).items() if n > 1]
