"""Scans in and out, and every file that is no scan."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from tiny_dataset import AFFINE, SHAPE, tiny_scan

from lamp3d.errors import ScanError
from lamp3d.volume import Grid, Volume, read_grid, read_volume, write_nifti


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
def test_nifti_comes_back_as_it_went(tmp_path: Path, name: str, dtype: type) -> None:
    data = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(dtype)
    write_nifti(Volume(data, AFFINE), tmp_path / name)
    volume = read_volume(tmp_path / name)
    assert volume.data.dtype == dtype
    np.testing.assert_array_equal(volume.data, data)
    np.testing.assert_array_equal(volume.affine, AFFINE)
    assert volume.spacing_mm == (2.0, 2.5, 3.0)


def test_bool_and_int64_are_stored_in_types_that_nifti_has(tmp_path: Path) -> None:
    data = np.arange(8).reshape(2, 2, 2)
    write_nifti(Volume(data, AFFINE), tmp_path / "int64.nii.gz")
    write_nifti(Volume(data > 3, AFFINE), tmp_path / "bool.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "int64.nii.gz").data, data)
    np.testing.assert_array_equal(read_volume(tmp_path / "bool.nii.gz").data, data > 3)


def test_the_same_volume_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tiny_scan(0)[0], tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]  # no temporary left


def test_write_does_not_replace_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    write_nifti(tiny_scan(0)[0], path)
    with pytest.raises(ScanError, match="exists already"):
        write_nifti(tiny_scan(1)[0], path)
    write_nifti(tiny_scan(1)[0], path, overwrite=True)
    np.testing.assert_array_equal(read_volume(path).data, tiny_scan(1)[0].data)


def test_scale_factor_big_endian_and_trailing_axis_are_read(tmp_path: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    image = nib.Nifti1Image(np.full((*SHAPE, 1), 5, ">i2"), AFFINE, header)
    image.header.set_slope_inter(2.0, -3.0)
    nib.save(image, tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    assert (volume.data.shape, volume.data.dtype) == (SHAPE, np.float32)
    assert volume.data.dtype.isnative


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("keep", [0.6, 0.02, 0.0])
def test_truncated_nifti_is_refused(tmp_path: Path, name: str, keep: float) -> None:
    path = tmp_path / name
    write_nifti(tiny_scan(0)[0], path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ScanError, match=rf"{name}: truncated or corrupt .*fetch or export"):
        read_volume(path)


def test_flipped_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    write_nifti(tiny_scan(0)[0], path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ScanError, match="truncated or corrupt"):
        read_volume(path)


def test_nifti2_is_read(tmp_path: Path) -> None:
    data = tiny_scan(0)[0].data
    nib.save(nib.Nifti2Image(data, AFFINE), tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "scan.nii.gz").data, data)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_refused(tmp_path: Path, value: float) -> None:
    data = np.zeros(SHAPE, np.float32)
    data[3, 4, 5] = value
    write_nifti(Volume(data, AFFINE), tmp_path / "scan.nii.gz")
    with pytest.raises(ScanError, match=r"1 of 5760 voxels are NaN or infinite"):
        read_volume(tmp_path / "scan.nii.gz")


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6, 2)])
def test_what_is_not_3d_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), AFFINE), tmp_path / "scan.nii.gz")
    with pytest.raises(ScanError, match="not a 3D volume"):
        read_volume(tmp_path / "scan.nii.gz")


def test_absent_files_and_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match="no such file"):
        read_volume(tmp_path / "absent.nii.gz")
    (tmp_path / "scan.png").write_bytes(b"x")
    with pytest.raises(ScanError, match="convert it to NIfTI"):
        read_volume(tmp_path / "scan.png")
    with pytest.raises(ScanError, match=r"ends in \.nii"):
        write_nifti(tiny_scan(0)[0], tmp_path / "scan.png")


def test_affine_without_inverse_is_refused(tmp_path: Path) -> None:
    flat = AFFINE.copy()
    flat[0, 0] = 0
    image = nib.Nifti1Image(np.zeros(SHAPE, np.int16), None)
    image.header.set_sform(flat, code=1)
    nib.save(image, tmp_path / "scan.nii")
    with pytest.raises(ScanError, match="affine"):
        read_volume(tmp_path / "scan.nii")


def write_dicom(folder: Path, data: np.ndarray, leave_out: tuple[int, ...] = (), series: str = "1.2.3") -> None:
    """An axial series, one file a slice, 1.5 x 2 x 3 mm, first voxel at (-10, 20, 30) mm in DICOM's LPS."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for i in range(data.shape[2]):
        if i in leave_out:
            continue
        image = sitk.GetImageFromArray(np.ascontiguousarray(data[:, :, i].T))
        image.SetSpacing((1.5, 2.0))
        tags = {
            "0008|0060": "CT",
            "0008|0018": f"{series}.{i + 1}",
            "0020|000e": series,
            "0020|000d": "1.2",
            "0020|0013": str(i),
            "0020|0032": f"-10\\20\\{30 + 3 * i}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series}-{i}.dcm"))
        writer.Execute(image)


def test_dicom_folder_is_read_in_ras(tmp_path: Path) -> None:
    data = np.arange(5 * 6 * 4, dtype=np.int16).reshape(5, 6, 4)
    write_dicom(tmp_path / "series", data)
    volume = read_volume(tmp_path / "series")
    np.testing.assert_array_equal(volume.data, data)
    np.testing.assert_allclose(
        volume.affine, [[-1.5, 0, 0, 10], [0, -2, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]], atol=1e-9
    )


def test_the_grid_of_a_dicom_series_is_that_of_its_volume(tmp_path: Path) -> None:
    write_dicom(tmp_path, np.zeros((6, 7, 5), np.int16))
    grid, volume = read_grid(tmp_path), read_volume(tmp_path)
    assert isinstance(grid, Grid)
    assert grid.shape == volume.data.shape
    np.testing.assert_allclose(grid.affine, volume.affine, atol=1e-9)


def test_dicom_with_a_missing_slice_or_two_series_is_refused(tmp_path: Path) -> None:
    data = np.zeros((5, 6, 6), np.int16)
    write_dicom(tmp_path / "gap", data, leave_out=(3,))
    with pytest.raises(ScanError, match=r"slices 3 and 4 lie 6\.00 mm apart, the others 3\.00 mm"):
        read_volume(tmp_path / "gap")
    write_dicom(tmp_path / "two", data)
    write_dicom(tmp_path / "two", data, series="1.2.4")
    with pytest.raises(ScanError, match="holds 2 DICOM series"):
        read_volume(tmp_path / "two")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScanError, match="holds 0 DICOM series"):
        read_volume(tmp_path / "empty")
