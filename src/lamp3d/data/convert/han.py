"""The head-and-neck scans that AnatomyNet published preprocessed (Zhu et al., Med. Phys. 2019; paper §3).

A folder a patient, with ``img_crp_v2.npy`` and ``structures/<organ>_crp_v2.npy``, arrays (z, y, x) of one shape,
cropped around the head; organs that were not contoured have no file. Axes run from feet to head, front to back, right
to left.
"""

from __future__ import annotations

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

IMAGE, STRUCTURES, ENDING = "img_crp_v2.npy", "structures", "_crp_v2.npy"

SPACING_MM = (1.0, 1.0, 2.5)
"""Along x, y, z: the arrays do not say; MICCAI 2015's scans, which are the test set, have about this."""


VALIDATION_SHARE = 0.1
"""Of the training cases."""

_SEED = 2020


class AnatomyNetSource(Source):
    """The dataset.

    Args:
        root: the folder with the patients' folders, at any depth. Where the name of a folder above them begins with
            "test", they are the test split, as the paper's ten; of the others a tenth is for validation.
        spacing_mm: of the voxels along x, y, z.

    Raises:
        DatasetError: there are no such folders, or two of one name.
    """

    name: ClassVar[str] = "Head and neck (AnatomyNet)"
    description: ClassVar[str] = (
        "Head-and-neck CT of three public sources as AnatomyNet preprocessed it; 'annotated' lists the organs that a "
        "case has contours for"
    )
    organs: ClassVar[tuple[str, ...]] = (
        "BrainStem", "Chiasm", "Mandible", "OpticNerve_L", "OpticNerve_R", "Parotid_L", "Parotid_R", "Submandibular_L",
        "Submandibular_R",
    )  # fmt: skip

    def __init__(self, root: Path, spacing_mm: tuple[float, float, float] = SPACING_MM) -> None:
        if not all(np.isfinite(spacing_mm)) or min(spacing_mm) <= 0:
            raise DatasetError(f"a voxel of {'x'.join(f'{s:g}' for s in spacing_mm)} mm is not possible.")
        self.root, self.spacing_mm = root, spacing_mm
        self._folders: dict[str, Path] = {}
        for path in sorted(root.glob(f"**/{IMAGE}")):
            if path.parent.name in self._folders:
                raise DatasetError(
                    f"{path.parent} and {self._folders[path.parent.name]} have one name; rename one of the two."
                )
            self._folders[path.parent.name] = path.parent
        if not self._folders:
            raise DatasetError(f"{root}: no folder with a {IMAGE} in it; give the folder of AnatomyNet's data.")

    def splits(self) -> Mapping[str, Sequence[str]]:
        splits: dict[str, list[str]] = {TRAIN: [], TEST: []}
        for name, folder in self._folders.items():
            above = [part.lower() for part in folder.relative_to(self.root).parts[:-1]]
            splits[TEST if any(part.startswith("test") for part in above) else TRAIN].append(name)
        # Checkpoints are chosen on cases of their own, which the paper does not have.
        draw = np.random.default_rng(_SEED).permutation(len(splits[TRAIN]))
        chosen = {splits[TRAIN][i] for i in draw[: round(VALIDATION_SHARE * len(draw))]}
        splits[VALIDATION] = [name for name in splits[TRAIN] if name in chosen]
        splits[TRAIN] = [name for name in splits[TRAIN] if name not in chosen]
        return splits

    def image(self, case: str) -> Volume:
        path = self._folders[case] / IMAGE
        array = _read(path)
        if array.ndim != 3:
            raise DatasetError(f"{path}: {array.ndim} axes; it should be a volume (z, y, x).")
        if np.issubdtype(array.dtype, np.floating):
            with np.errstate(over="ignore"):  # what overflows is infinite, and refused as such
                array = array.astype(np.float32)  # NIfTI has no float16, and float64 says no more of a scan
            if not np.isfinite(array).all():
                raise DatasetError(f"{path}: has values that are not finite; repair them, or take the case away.")
        return Volume(_as_nifti(array), np.diag([-self.spacing_mm[0], -self.spacing_mm[1], self.spacing_mm[2], 1.0]))

    def masks(self, case: str, shape: tuple[int, ...]) -> Mapping[str, Mask]:
        masks = {}
        for organ in self.organs:
            path = self._folders[case] / STRUCTURES / f"{organ}{ENDING}"
            if path.exists():
                array = _read(path)
                mask = _as_nifti(array.astype(bool))
                if not np.array_equal(array, np.rint(array)):  # NaN is not either
                    raise DatasetError(f"{path}: has values that are not whole; a mask is 0 or 1.")
                if mask.shape != shape:
                    raise DatasetError(
                        f"{path}: {'x'.join(map(str, mask.shape[::-1]))} voxels, but the scan has "
                        f"{'x'.join(map(str, shape[::-1]))}."
                    )
                masks[organ] = mask
        return masks


def _read(path: Path) -> npt.NDArray[np.generic]:
    try:
        array: npt.NDArray[np.generic] = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DatasetError(
            f"{path}: {error}; it should be an array that numpy saved, without Python objects."
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "buif":
        raise DatasetError(f"{path}: holds {getattr(array, 'dtype', 'several arrays')}, not real numbers.")
    return array


def _as_nifti(array: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    return np.ascontiguousarray(array.transpose())
