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
_ALIKE = {"0020|0037": "directions", "0028|0030": "voxel sizes"}


def read_series(folder: Path) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.float64]]:
    """The voxels (X, Y, Z) of the one series in a folder, in the modality's units, and their affine to mm in RAS+.

    The third axis follows the slices' own positions, along the table even where the gantry is tilted.

    Raises:
        ScanError: there is not one series, it is damaged or in colour, or slices are missing or do not say where they
            lie.
    """
    files = _files(folder)
    try:
        with _without_warnings():
            if len(files) == 1:
                image = sitk.ReadImage(files[0])
                step = _third_axis(image)
            else:
                image, step = _read_slices(folder, files)
    except RuntimeError as error:
        raise ScanError(f"{folder}: truncated or corrupt DICOM ({error}); export the series again") from error
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
    with _without_warnings():
        names = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    for ending in (".nii.gz", ".nii"):
        if not names and any(folder.glob(f"*{ending}")):
            raise ScanError(f"{folder}: holds NIfTI files and no DICOM series; give the files, {folder}/*{ending}")
    if len(names) != 1:
        raise ScanError(f"{folder}: holds {len(names)} DICOM series, wanted one; give a folder with one series in it")
    files: Sequence[str] = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), names[0])
    return files


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


def _read_slices(folder: Path, files: Sequence[str]) -> tuple[sitk.Image, npt.NDArray[np.float64]]:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    reader.MetaDataDictionaryArrayUpdateOn()
    image = reader.Execute()

    def of_slices(tag: str) -> list[str | None]:
        found = (reader.GetMetaData(i, tag) if reader.HasMetaDataKey(i, tag) else None for i in range(len(files)))
        return [None if text is None else text.strip() for text in found]

    if any(len(set(of_slices(tag))) > 1 for tag in (_SLOPE, _INTERCEPT)):
        # The first slice's type would hold all: in PET every slice has a slope of its own.
        reader.SetOutputPixelType(sitk.sitkFloat32)
        image = reader.Execute()
    for tag, what in _ALIKE.items():
        values = _numbers(of_slices(tag))
        if len(values) and np.ptp(values, axis=0).max() > SAME:
            raise ScanError(f"{folder}: slices of different {what}; give a folder with one series of parallel slices")
    return image, _step(folder, of_slices(_POSITION))


def _numbers(of_slices: Sequence[str | None]) -> npt.NDArray[np.float64]:
    return np.array([[float(number) for number in text.split("\\")] for text in of_slices if text])


def _step(folder: Path, positions: Sequence[str | None]) -> npt.NDArray[np.float64]:
    """From one slice to the next, in mm."""
    places = _numbers(positions)
    if len(places) < len(positions):
        raise ScanError(f"{folder}: slices do not say where they lie (Image Position); export the series again")
    steps = np.diff(places, axis=0)
    usual = np.median(steps, axis=0)
    off_mm, usual_mm = np.linalg.norm(steps - usual, axis=1), float(np.linalg.norm(usual))
    worst = int(np.argmax(off_mm))
    if off_mm[worst] > STEP_TOLERANCE * usual_mm:
        raise ScanError(
            f"{folder}: slices {worst + 1} and {worst + 2} lie {np.linalg.norm(steps[worst]):.2f} mm apart, the others "
            f"{usual_mm:.2f} mm, and {off_mm[worst]:.2f} mm off their line; a slice is missing, doubled or another "
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
