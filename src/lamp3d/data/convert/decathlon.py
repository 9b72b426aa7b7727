"""Writing a dataset in Decathlon layout, case by case, whatever it was before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from rich.progress import track

from lamp3d.data.dataset import TEST, write_dataset_json
from lamp3d.errors import DatasetError
from lamp3d.files import write_text
from lamp3d.volume import Volume, write_nifti

Mask = npt.NDArray[np.bool_]


class Source(ABC):
    """A dataset as it is published.

    Attributes:
        name, description: what ``dataset.json`` says of it.
        organs: in the order of their labels.
        root: where it lies.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    organs: ClassVar[tuple[str, ...]]
    root: Path

    @abstractmethod
    def splits(self) -> Mapping[str, Sequence[str]]:
        """The cases' names by split."""

    @abstractmethod
    def image(self, case: str) -> Volume:
        """The scan of a case."""

    @abstractmethod
    def masks(self, case: str, shape: tuple[int, ...]) -> Mapping[str, Mask]:
        """The voxels of every organ that is contoured in a case, on the grid of its scan."""


def write(source: Source, root: Path) -> None:
    """Convert a dataset.

    A voxel that several organs claim goes to the smallest of them: contours overlap by a rim, which a small organ would
    miss more.

    Args:
        source: the dataset.
        root: the new folder. ``dataset.json`` is written last: a folder with one is complete, and a conversion that was
            interrupted can be done again.

    Raises:
        DatasetError: the folder holds a dataset or something else, or the source is not what it should be.
    """
    path, unfinished = root / "dataset.json", root / ".unfinished"
    begun, origin = unfinished.exists() and not path.exists(), f"{source.name}, {source.root.resolve()}"
    if begun and (before := unfinished.read_text(encoding="utf-8")) != origin:
        raise DatasetError(f"{root} has an unfinished conversion of {before}; finish that one, or give a new folder.")
    if root.exists() and (not root.is_dir() or (any(root.iterdir()) and not begun)):
        raise DatasetError(f"{root} is not empty, and nothing in it is replaced; give a new folder.")
    splits = source.splits()
    root.mkdir(parents=True, exist_ok=True)
    write_text(unfinished, origin)
    entries: list[dict[str, object]] = []
    tests: list[dict[str, object]] = []
    for split, cases in splits.items():
        for case in track(cases, description=f"Converting {split}", disable=not cases):
            (tests if split == TEST else entries).append(_write_case(source, case, root))
    write_dataset_json(
        root,
        name=source.name,
        description=source.description,
        organs=source.organs,
        training=entries,
        test=tests,
        splits={split: cases for split, cases in splits.items() if cases},
    )
    unfinished.unlink()


def _write_case(source: Source, case: str, root: Path) -> dict[str, object]:
    image = source.image(case)
    masks = source.masks(case, image.data.shape)
    label = np.zeros(image.data.shape, dtype=np.uint8)
    for organ in sorted(masks, key=lambda organ: -int(masks[organ].sum())):
        label[masks[organ]] = 1 + source.organs.index(organ)
    entry = {"image": f"imagesTr/{case}.nii.gz", "label": f"labelsTr/{case}.nii.gz"}
    write_nifti(image, root / entry["image"], overwrite=True)
    write_nifti(Volume(label, image.affine), root / entry["label"], overwrite=True)
    return {**entry, "annotated": [organ for organ in source.organs if organ in masks]}
