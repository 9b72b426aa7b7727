"""OpenKBP (Babier et al., Med. Phys. 2021): a folder a patient, a sparse table a volume.

``provided-data/{train,valid,test}-pats/pt_N/`` holds ``ct.csv`` (flat index, value), a ``<structure>.csv`` a contour
(flat indices alone) and ``voxel_dimensions.csv`` (three numbers). Grids have 128³ voxels, of which a flat index counts
rows (front to back), columns (right to left) and slices (head to feet), the last one fastest. Dose, its mask and
planning targets are not read. Values are HU + 1024 or so, 0 where nothing is stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from lamp3d.data.convert.decathlon import Mask, Source
from lamp3d.data.dataset import TEST, TRAIN, VALIDATION
from lamp3d.errors import DatasetError
from lamp3d.volume import Volume

Scalar = TypeVar("Scalar", bound=np.generic)

GRID = (128, 128, 128)
FOLDERS = {TRAIN: "train-pats", VALIDATION: "valid*-pats", TEST: "test-pats"}


class OpenKbpSource(Source):
    """The dataset.

    Args:
        root: the folder that has ``train-pats``, or one above it.

    Raises:
        DatasetError: there is none, or it has no patients.
    """

    name: ClassVar[str] = "OpenKBP head and neck"
    description: ClassVar[str] = (
        "Head-and-neck CT with clinical contours of up to seven organs; 'annotated' lists the organs that a case has "
        "contours for. Babier et al., Med. Phys. 2021; MIT licence"
    )
    organs: ClassVar[tuple[str, ...]] = (
        "Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Esophagus", "Larynx", "Mandible",
    )  # fmt: skip

    def __init__(self, root: Path) -> None:
        found = next((path.parent for path in sorted(root.glob("**/train-pats"))), None)
        if found is None:
            raise DatasetError(f"{root}: no folder train-pats in it; give OpenKBP's provided-data.")
        self.root = found
        self._folders: dict[str, Path] = {}

    def splits(self) -> Mapping[str, Sequence[str]]:
        splits = {}
        self._folders.clear()
        for split, pattern in FOLDERS.items():
            cases = sorted(
                (path for folder in self.root.glob(pattern) for path in folder.glob("pt_*") if path.is_dir()),
                key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)],
            )
            for path in cases:
                if not (path / "ct.csv").exists():
                    raise DatasetError(f"{path}: no ct.csv; complete the download, or take the folder away.")
                if path.name in self._folders:
                    raise DatasetError(f"{path} and {self._folders[path.name]} are one patient; take one away.")
                self._folders[path.name] = path
            splits[split] = [path.name for path in cases]
        if not splits[TRAIN]:
            raise DatasetError(f"{self.root}/train-pats: no folder pt_N in it; is the download complete?")
        return splits

    def image(self, case: str) -> Volume:
        path = self._folders[case] / "ct.csv"
        indices, values = _table(path, columns=2).T
        if not np.isfinite(values).all():
            raise DatasetError(f"{path}: has values that are not finite; download it again.")
        image = np.zeros(np.prod(GRID), dtype=np.int16)
        limits = np.iinfo(np.int16)
        image[_checked(path, indices)] = np.clip(np.rint(values), limits.min, limits.max)
        return Volume(_on_grid(image), self._affine(case))

    def masks(self, case: str, shape: tuple[int, ...]) -> Mapping[str, Mask]:
        masks = {}
        for organ in self.organs:
            path = self._folders[case] / f"{organ}.csv"
            if path.exists():
                mask = np.zeros(np.prod(GRID), dtype=bool)
                mask[_checked(path, _table(path, columns=1)[:, 0])] = True
                masks[organ] = _on_grid(mask)
        return masks

    def _affine(self, case: str) -> npt.NDArray[np.float64]:
        path = self._folders[case] / "voxel_dimensions.csv"
        try:
            spacing = np.array(path.read_text(encoding="utf-8").split(), dtype=np.float64)
        except FileNotFoundError:
            raise DatasetError(f"{path} is missing: without it no one knows how large voxels are.") from None
        except ValueError as error:
            raise DatasetError(f"{path}: {error}; it should be three numbers in mm.") from error
        if spacing.shape != (3,) or not (np.isfinite(spacing) & (spacing > 0)).all():
            raise DatasetError(f"{path}: {spacing.tolist()} is not a voxel's size; it should be three numbers in mm.")
        row, column, slice_ = spacing
        return np.diag([-column, -row, -slice_, 1.0])  # towards left, back and feet


def _table(path: Path, *, columns: int) -> npt.NDArray[np.float64]:
    """(N, columns) of a table with one line of headings."""
    try:
        content = [line for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
        if not content:
            remedy = "a structure that was not contoured has no file" if columns == 1 else "download it again"
            raise DatasetError(f"{path} is empty; {remedy}.")
        return np.loadtxt(content, delimiter=",", usecols=range(columns), ndmin=2, comments=None)
    except (ValueError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{path}: {error}; it should be a table of flat indices{' and values' * (columns > 1)}."
        ) from error


def _checked(path: Path, indices: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    wrong = indices[~((indices >= 0) & (indices < np.prod(GRID)) & (indices == np.rint(indices)))]
    if wrong.size:
        raise DatasetError(f"{path}: {wrong[0]:.10g} is not an index into {'x'.join(map(str, GRID))} voxels.")
    return indices.astype(np.int64)


def _on_grid(flat: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """From rows, columns, slices to columns, rows, slices: the axes of a NIfTI file."""
    return np.ascontiguousarray(flat.reshape(GRID).swapaxes(0, 1))
