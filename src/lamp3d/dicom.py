"""A DICOM series as one array: its slices in order, and where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from lamp3d.errors import ScanError

STEP_TOLERANCE = 0.1
"""Of a step from slice to slice: by how much one may differ before slices are lost, or from another scan."""

SAME = 1e-3
"""Directions, and voxel sizes in mm, that differ by no more are written down differently at most."""

_POSITION, _INTERCEPT, _SLOPE = "0020|0032", "0028|1052", "0028|1053"
_PHOTOMETRIC, _DESCRIPTION = "0028|0004", "0008|103e"
_ALIKE = {"0020|0037": "directions", "0028|0030": "voxel sizes"}

_STORAGE_CLASS = b"\x02\x00\x02\x00UI"
"""The element of a file's header that says what sort of object it holds: its tag and type."""


def read_series(folder: Path) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.float64]]:
    """The voxels (X, Y, Z) of the one series in a folder, in the modality's units, and their affine to mm in RAS+.

    The third axis follows the slices' own positions, along the table even where the gantry is tilted.

    Raises:
        ScanError: there is not one series, it is damaged, in colour or MONOCHROME1, or slices are missing, doubled or
            do not say where they lie.
    """
    try:
        files = _files(folder)
        with _without_warnings():
            headers = [_header(file) for file in files]
            step = _third_axis(headers[0]) if len(files) == 1 else _common_step(folder, headers)
            # The first slice's type would hold all: in PET every slice has a slope of its own.
            alike = all(len(set(_of_slices(headers, tag))) == 1 for tag in (_SLOPE, _INTERCEPT))
            image = sitk.ReadImage(
                files if len(files) > 1 else files[0], sitk.sitkUnknown if alike else sitk.sitkFloat32
            )
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise ScanError(f"{folder}: truncated or corrupt DICOM ({why}); export the series again") from error
    if "MONOCHROME1" in _of_slices(headers, _PHOTOMETRIC):  # whose values ITK turns round before it scales them
        raise ScanError(f"{folder}: MONOCHROME1, small values being bright, is not read; convert it to NIfTI first")
    return sitk.GetArrayFromImage(_checked(folder, image)).transpose(2, 1, 0), _affine(image, step)


def series_grid(folder: Path) -> tuple[tuple[int, int, int], npt.NDArray[np.float64]]:
    """The shape and affine of `read_series`, from the headers of the first and the last file.

    Raises:
        ScanError: there is not one series.
        RuntimeError: a header cannot be read.
    """
    files = _files(folder)
    first, last = (_header(file) for file in (files[0], files[-1]))
    columns, rows, planes = first.GetSize()
    if len(files) == 1:
        return (columns, rows, planes), _affine(first, _third_axis(first))
    step = np.subtract(last.GetOrigin(), first.GetOrigin()) / (len(files) - 1)
    return (columns, rows, len(files)), _affine(first, step)


def _files(folder: Path) -> Sequence[str]:
    reader = sitk.ImageSeriesReader
    with _without_warnings():
        series = [reader.GetGDCMSeriesFileNames(str(folder), uid) for uid in reader.GetGDCMSeriesIDs(str(folder))]
    if len(series) == 1:
        files: Sequence[str] = series[0]
        if damaged := _damaged(folder, files):
            raise ScanError(
                f"{folder}: {len(damaged)} file(s) such as {damaged[0].name} cannot be read: truncated or corrupt; "
                "export the series again"
            )
        return files
    if series:
        held = "; ".join(f"{_told(files[0])} in {len(files)} file(s) such as {Path(files[0]).name}" for files in series)
        raise ScanError(f"{folder}: holds {len(series)} DICOM series, wanted one: {held}; move one into its own folder")
    for ending in (".nii.gz", ".nii"):
        if any(folder.glob(f"*{ending}")):
            raise ScanError(f"{folder}: holds NIfTI files and no DICOM series; give the files, {folder}/*{ending}")
    raise ScanError(f"{folder}: holds no DICOM series; give the folder that the slices themselves lie in")


def _damaged(folder: Path, files: Sequence[str]) -> list[Path]:
    """Files of the slices' own kind that are not among them: GDCM leaves out what it cannot read without a word."""
    known, kind = {Path(file).name for file in files}, _storage_class(Path(files[0]))
    others = (path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in known)
    return [path for path in others if kind and _storage_class(path) == kind]


def _storage_class(path: Path) -> bytes:
    """What sort of DICOM object a file holds, of which its first bytes tell; empty where it has none."""
    with path.open("rb") as file:
        start = file.read(1024)
    size_and_text = start.partition(_STORAGE_CLASS)[2] if start[128:132] == b"DICM" else b""
    return size_and_text[2 : 2 + int.from_bytes(size_and_text[:2], "little")]


def _told(file: str) -> str:
    (description,) = _of_slices([_header(file)], _DESCRIPTION)
    return description or "one without a name"


@contextmanager
def _without_warnings() -> Iterator[None]:
    """What ITK would print is told as an error: uneven slices, and that there is no series."""
    warnings = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warnings)


def _header(file: str) -> Any:
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return reader


def _common_step(folder: Path, headers: Sequence[Any]) -> npt.NDArray[np.float64]:
    """From one slice to the next, in mm, of slices that are otherwise alike."""
    other = next((what for tag, what in _ALIKE.items() if _differ(_of_slices(headers, tag))), None)
    if len({header.GetSize() for header in headers}) > 1:
        other = "sizes"
    if other is not None:
        raise ScanError(f"{folder}: slices of different {other}; give a folder with one series of parallel slices")
    return _step(folder, _of_slices(headers, _POSITION))


def _of_slices(headers: Sequence[Any], tag: str) -> list[str | None]:
    return [header.GetMetaData(tag).strip() if header.HasMetaDataKey(tag) else None for header in headers]


def _differ(of_slices: Sequence[str | None]) -> bool:
    values = _numbers(of_slices)
    return bool(len(values) and np.ptp(values, axis=0).max() > SAME)


def _numbers(of_slices: Sequence[str | None]) -> npt.NDArray[np.float64]:
    return np.array([[float(number) for number in text.split("\\")] for text in of_slices if text])


def _step(folder: Path, positions: Sequence[str | None]) -> npt.NDArray[np.float64]:
    """From one slice to the next, in mm."""
    places = _numbers(positions)
    if len(places) < len(positions):
        raise ScanError(f"{folder}: slices do not say where they lie (Image Position); export the series again")
    if doubled := len(places) - len(np.unique(places.round(2), axis=0)):
        raise ScanError(
            f"{folder}: {doubled} of {len(places)} slices lie where another one does: copies, or several scans of one "
            "place; give a folder with each slice once"
        )
    steps = np.diff(places, axis=0)
    usual = np.median(steps, axis=0)
    off_mm, usual_mm = np.linalg.norm(steps - usual, axis=1), float(np.linalg.norm(usual))
    worst = int(np.argmax(off_mm))
    if off_mm[worst] > STEP_TOLERANCE * usual_mm:
        raise ScanError(
            f"{folder}: slices {worst + 1} and {worst + 2} lie {np.linalg.norm(steps[worst]):.2f} mm apart, the others "
            f"{usual_mm:.2f} mm, and {off_mm[worst]:.2f} mm off their line; a slice is missing, damaged or another "
            "scan's: export the series again"
        )
    return np.asarray((places[-1] - places[0]) / (len(places) - 1))


def _checked(folder: Path, image: sitk.Image) -> sitk.Image:
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise ScanError(f"{folder}: a picture in colour, such as a report; give a scan")
    if image.GetDimension() != 3:
        raise ScanError(f"{folder}: several files of many slices each; give a folder with one of them")
    return image


def _third_axis(image: Any) -> npt.NDArray[np.float64]:
    return np.asarray(np.array(image.GetDirection()).reshape(3, 3)[:, 2] * image.GetSpacing()[2])


def _affine(image: Any, step: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of an image, or of its header, whose slices follow each other so."""
    affine = np.eye(4)
    axes = np.array(image.GetDirection()).reshape(3, 3)[:, :2] * image.GetSpacing()[:2]
    affine[:3] = np.column_stack([axes, step, image.GetOrigin()])
    lps_to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    return lps_to_ras @ affine
