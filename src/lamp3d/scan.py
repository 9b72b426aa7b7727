"""A scan's channels: the files that they lie in, and their volumes, which share one grid."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lamp3d.errors import ScanError
from lamp3d.volume import Grid, Volume, read_volumes

Scan = tuple[Volume, ...]
"""A volume a channel, all on one grid."""

UNNAMED = "image"
"""The only channel, where nothing says what it is."""

FIRST_CHANNEL = "_0000"
"""What nnU-Net adds to the name of a scan's first file."""

SAME_PLACE = 0.5
"""Of a voxel: grids that lie no farther apart are one."""


def read_scan(files: Sequence[Path], channels: Sequence[str]) -> Scan:
    """Read the channels of one scan.

    Args:
        files: NIfTI files or DICOM folders, one a channel; or one 4D NIfTI file with all channels.
        channels: their names.

    Raises:
        ScanError: a file cannot be read, there are more or fewer channels, or they lie on different grids.
    """
    scan = tuple(volume for file in files for volume in read_volumes(file))
    if len(scan) != len(channels):
        several = "a 4D file, or a file each: CASE_0000.nii.gz, CASE_0001.nii.gz and so on"
        how = several if len(channels) > 1 else "one 3D volume"
        raise ScanError(
            f"{files[0]}: {len(scan)} channel(s), wanted {len(channels)} ({', '.join(channels)}); give {how}"
        )
    for file, volume in zip(files[1:], scan[1:], strict=False):
        check_grid(f"{file}: channel", volume.grid, f"the first one {files[0]}", scan[0].grid)
    return scan


def check_grid(what: str, grid: Grid, of: str, reference: Grid) -> None:
    """Whether a volume lies where another one does.

    Args:
        what, grid: its file and what it is, and where it lies.
        of, reference: those of the other one.

    Raises:
        ScanError: its shape or its place is another one.
    """
    if grid.shape != reference.shape:
        raise ScanError(
            f"{what} of shape {grid.shape} does not fit {of} of shape {reference.shape}; resample it onto that grid"
        )
    if (far_mm := grid.apart_mm(reference)) > SAME_PLACE * min(reference.spacing_mm):
        raise ScanError(
            f"{what} lies up to {far_mm:.1f} mm away from {of} by their affines: repair the header "
            "that is wrong, or if both are right, resample it onto that grid"
        )


def scan_files(first: Path, channels: int) -> tuple[Path, ...]:
    """The files of a scan by its first one: CASE_0000.nii.gz stands for CASE_0001.nii.gz and so on as well.

    Args:
        first: a file or DICOM folder.
        channels: how many the scan has.
    """
    name, mark, ending = first.name.rpartition(FIRST_CHANNEL)
    if channels == 1 or not mark or ending.lower() not in (".nii", ".nii.gz"):
        return (first,)
    return tuple(first.with_name(f"{name}_{channel:04}{ending}") for channel in range(channels))


def scan_name(*files: Path) -> str:
    """The name of a scan's file or folder without ``.nii`` or ``.nii.gz``, and of several files without the channel."""
    name = re.sub(r"\.nii(\.gz)?$", "", Path(os.path.abspath(files[0])).name, flags=re.IGNORECASE)
    return name.removesuffix(FIRST_CHANNEL) if len(files) > 1 else name
