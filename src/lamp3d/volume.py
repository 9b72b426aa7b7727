"""A scan with its place in the patient: NIfTI and DICOM in, NIfTI out."""

from __future__ import annotations

import gzip
import itertools
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel import imageglobals
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from lamp3d.dicom import read_series, series_grid
from lamp3d.errors import ScanError
from lamp3d.files import write_atomically

_UNREADABLE = (ImageFileError, HeaderDataError, WrapStructError, OSError, EOFError, zlib.error, ValueError)

_GZIP = b"\x1f\x8b"

_METRE, _MICRON = 1, 3
_MM = {_METRE: 1e3, _MICRON: 1e-3}
"""Millimetres in the other units that a NIfTI header may have for its affine; nibabel leaves them as they are."""


@dataclass(frozen=True)
class Grid:
    """Where a scan's voxels lie: how many there are along its axes, and the affine, as that of a `Volume`."""

    shape: tuple[int, ...]
    affine: npt.NDArray[np.float64]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """The distance in mm between neighbouring voxels along each axis."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    def apart_mm(self, other: Grid) -> float:
        """How far another grid of this shape lies away, at most: at one of the corners."""
        ends = [(0, n - 1) for n in self.shape]
        corners = np.array([(*corner, 1) for corner in itertools.product(*ends)], dtype=np.float64)
        return float(np.abs(corners @ (self.affine - other.affine).T).max())


@dataclass(frozen=True)
class Volume:
    """Voxels of one 3D scan or label map, and where they lie.

    Args:
        data: voxels (D, H, W), any real dtype; the axes are those of the file, whatever their direction.
        affine: (4, 4) float64, voxel index -> mm in RAS+ (x grows to the patient's right, y to the front, z to the
            head), as in nibabel.
    """

    data: npt.NDArray[np.generic]
    affine: npt.NDArray[np.float64]

    @property
    def grid(self) -> Grid:
        """Where the voxels lie."""
        return Grid(self.data.shape, self.affine)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """The distance in mm between neighbouring voxels along each axis of ``data``."""
        return self.grid.spacing_mm


def read_volume(path: Path) -> Volume:
    """Read one 3D scan or label map.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file, or a folder that holds the DICOM files of one series.

    Raises:
        ScanError: the file is absent, truncated or corrupt, not 3D, holds NaN or infinity, or has no usable affine.
    """
    return _checked(path, *_read(path))


def read_volumes(path: Path) -> tuple[Volume, ...]:
    """Read all volumes of a file: that of `read_volume`, or those along the fourth axis of a 4D one.

    Raises:
        ScanError: as from `read_volume`.
    """
    data, affine = _read(path)
    volumes = [data[..., i] for i in range(data.shape[3])] if data.ndim == 4 else [data]
    return tuple(_checked(path, volume, affine) for volume in volumes)


def read_grid(path: Path) -> Grid | None:
    """A scan's shape and place from its header, without its voxels; None where that cannot be read."""
    try:
        if path.is_dir():
            grid = Grid(*series_grid(path))
        else:
            image = nib.load(path)  # the voxels stay on the disk
            grid = Grid(image.shape[:3], _affine_mm(image))
    except (*_UNREADABLE, ScanError, RuntimeError):
        return None
    return grid if len(grid.shape) == 3 and 0 not in grid.shape and _is_usable(grid.affine) else None


def write_nifti(volume: Volume, path: Path, *, overwrite: bool = False) -> None:
    """Write a volume as NIfTI, all or nothing: readers never see half a file.

    Args:
        volume: what to write; bool is stored as uint8, int64 and uint64 as int32.
        path: ends in ``.nii`` or ``.nii.gz``; the folder is made.
        overwrite: replace a file that is there.

    Raises:
        ScanError: the file exists and ``overwrite`` is off, the name is not a NIfTI name, or integers are too large.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ScanError(f"{path}: a NIfTI file's name ends in .nii or .nii.gz; rename it")
    if path.exists() and not overwrite:
        raise ScanError(f"{path} exists already and is not replaced; choose another name, or allow overwriting")
    stored = {"bool": np.uint8, "int64": np.int32, "uint64": np.int32}.get(volume.data.dtype.name)
    data = volume.data if stored is None else volume.data.astype(stored)
    if stored is not None and not np.array_equal(data, volume.data):
        raise ScanError(f"{path}: the volume has values beyond 32 bits, which are not stored; scale it")
    image = nib.Nifti1Image(data, volume.affine)
    image.header.set_xyzt_units("mm")
    content: bytes = image.to_bytes()
    if path.suffix == ".gz":
        content = gzip.compress(content, compresslevel=3, mtime=0)  # no time stamp: the same volume is the same file
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _read(path: Path) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.float64]]:
    path = Path(path)
    if path.is_dir():
        return read_series(path)
    if not path.is_file():
        raise ScanError(f"{path}: no such file; check the path")
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        how = "of DICOM files give their folder, anything else convert to NIfTI first"
        raise ScanError(f"{path}: neither .nii, .nii.gz nor a DICOM folder; {how}")
    return _read_nifti(path)


@contextmanager
def _nibabel_quiet() -> Iterator[None]:
    """What it would print of damaged headers is told as an error."""
    level = imageglobals.logger.level
    imageglobals.logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        imageglobals.logger.setLevel(level)


def _read_nifti(path: Path) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.float64]]:
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP):  # whatever its name says
            content = gzip.decompress(content)  # whole, so that its checksum is verified
        nifti2 = content[:4] in ((540).to_bytes(4, "little"), (540).to_bytes(4, "big"))  # its header's size
        with _nibabel_quiet():
            image = (nib.Nifti2Image if nifti2 else nib.Nifti1Image).from_bytes(content)
            data = np.asanyarray(image.dataobj)
    except (*_UNREADABLE, MemoryError) as error:  # the latter where a damaged header claims too many voxels
        why = " ".join(str(error).split())
        raise ScanError(f"{path}: truncated or corrupt ({why}); fetch or export the file again") from error
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim == 5 and data.shape[3] == 1:  # ITK's channels: x, y, z, no time, channel
        data = data[:, :, :, 0]
    if data.dtype.kind == "f":  # float64 is what a scale factor in the header makes of integers; CT has 12 bits
        with np.errstate(over="ignore"):  # what overflows is infinite, and refused as such
            data = data.astype(np.float32)
    elif not data.dtype.isnative and data.dtype.names is None:
        data = data.astype(data.dtype.newbyteorder("="))
    return data, _affine_mm(image)


def _affine_mm(image: nib.Nifti1Image) -> npt.NDArray[np.float64]:
    space = int(image.header["xyzt_units"]) & 7  # what is above is the unit of time
    mm = _MM.get(space, 1.0)
    return np.asarray(np.diag([mm, mm, mm, 1.0]) @ image.affine, dtype=np.float64)


def _checked(path: Path, data: npt.NDArray[np.generic], affine: npt.NDArray[np.float64]) -> Volume:
    if data.dtype.names is not None or data.dtype.kind not in "buif":
        raise ScanError(f"{path}: voxels of type {data.dtype} are not real numbers; give a plain intensity image")
    if data.ndim != 3 or 0 in data.shape:
        raise ScanError(f"{path}: shape {tuple(data.shape)} is not a 3D volume; give one 3D scan a file")
    bad = 0 if data.dtype.kind != "f" else data.size - int(np.count_nonzero(np.isfinite(data)))
    if bad:
        how = "replace them (in a CT by air, in a label map by 0)"
        raise ScanError(f"{path}: {bad} of {data.size} voxels are NaN or infinite; {how}")
    if not _is_usable(affine):
        raise ScanError(f"{path}: affine {affine[:3].tolist()} has no inverse; repair the header's geometry")
    return Volume(data, affine)


def _is_usable(affine: npt.NDArray[np.float64]) -> bool:
    return bool(np.all(np.isfinite(affine)) and abs(np.linalg.det(affine[:3, :3])) >= 1e-9)
