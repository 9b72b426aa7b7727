"""Scans in and out, and every file that is no scan."""

from __future__ import annotations

from collections.abc import Callable
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


@pytest.mark.parametrize(("unit", "mm"), [(0, 1.0), (1, 1000.0), (2 + 8, 1.0), (3, 0.001), (7, 1.0)])
def test_affines_in_other_units_are_brought_to_mm(tmp_path: Path, unit: int, mm: float) -> None:
    path, image = tmp_path / "scan.nii.gz", nib.Nifti1Image(tiny_scan(0)[0].data, AFFINE)
    image.header["xyzt_units"] = unit
    nib.save(image, path)
    for found in (read_volume(path).grid, read_grid(path)):
        assert found is not None
        np.testing.assert_allclose(found.affine[:3], AFFINE[:3] * mm)
        np.testing.assert_allclose(found.affine[3], AFFINE[3])


def test_bool_and_int64_are_stored_in_types_that_nifti_has(tmp_path: Path) -> None:
    data = np.arange(8).reshape(2, 2, 2)
    write_nifti(Volume(data, AFFINE), tmp_path / "int64.nii.gz")
    write_nifti(Volume(data > 3, AFFINE), tmp_path / "bool.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "int64.nii.gz").data, data)
    with pytest.raises(ScanError, match="values beyond 32 bits"):
        write_nifti(Volume(data + 2**31, AFFINE), tmp_path / "large.nii.gz")
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


@pytest.mark.parametrize(("written", "name"), [("a.nii.gz", "A.NII.GZ"), ("a.nii.gz", "b.nii"), ("a.nii", "b.nii.gz")])
def test_what_is_compressed_is_known_by_its_content(tmp_path: Path, written: str, name: str) -> None:
    volume = tiny_scan(0)[0]
    write_nifti(volume, tmp_path / written)
    read = read_volume((tmp_path / written).rename(tmp_path / name))
    np.testing.assert_array_equal(read.data, volume.data)


def test_nibabel_says_nothing_of_a_damaged_header(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scan.nii").write_bytes(b"noise" * 100)
    assert read_grid(tmp_path / "scan.nii") is None
    with pytest.raises(ScanError, match="truncated or corrupt"):
        read_volume(tmp_path / "scan.nii")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_refused(tmp_path: Path, value: float) -> None:
    data = np.zeros(SHAPE, np.float32)
    data[3, 4, 5] = value
    write_nifti(Volume(data, AFFINE), tmp_path / "scan.nii.gz")
    with pytest.raises(ScanError, match=r"1 of 5760 voxels are NaN or infinite; .* in a label map by 0"):
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
    with pytest.raises(ScanError, match="of DICOM files give their folder, anything else convert to NIfTI"):
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


def write_dicom(
    folder: Path,
    data: np.ndarray,
    leave_out: tuple[int, ...] = (),
    series: str = "1.2.3",
    more: Callable[[int], dict[str, str]] = lambda i: {},
) -> None:
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
            **more(i),
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


def test_slices_of_a_tilted_gantry_lie_where_they_say(tmp_path: Path) -> None:
    data = np.arange(5 * 6 * 9, dtype=np.int16).reshape(5, 6, 9)
    write_dicom(tmp_path, data, more=lambda i: {"0020|0037": "1\\0\\0\\0\\0.8\\0.6"})
    volume, grid = read_volume(tmp_path), read_grid(tmp_path)
    np.testing.assert_array_equal(volume.data, data)
    # The table moves along z, whatever the slices' tilt: rows by (0, -1.6, 1.2), slices by (0, 0, 3), in RAS.
    np.testing.assert_allclose(volume.affine @ [0, 0, 8, 1], [10, -20, 30 + 24, 1], atol=1e-9)
    np.testing.assert_allclose(volume.affine @ [2, 5, 4, 1], [7, -28, 30 + 6 + 12, 1], atol=1e-9)
    assert grid is not None
    np.testing.assert_allclose(grid.affine, volume.affine, atol=1e-9)
    labels = Volume(np.zeros(data.shape, np.uint8), volume.affine)
    write_nifti(labels, tmp_path / "labels.nii.gz")
    np.testing.assert_allclose(read_volume(tmp_path / "labels.nii.gz").affine, volume.affine, atol=1e-5)


def test_every_slice_has_its_own_intercept(tmp_path: Path) -> None:
    data = np.full((5, 6, 3), -998, np.int16)
    data[..., 0] = 8
    write_dicom(tmp_path, data, more=lambda i: {"0028|1053": "1", "0028|1052": str([0, -1024, 3][i])})
    np.testing.assert_array_equal(read_volume(tmp_path).data, data)


def test_a_dicom_file_with_all_slices_is_read(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.arange(7 * 6 * 5, dtype=np.uint16).reshape(7, 6, 5))
    image.SetSpacing((1.5, 2.0, 3.0))
    (tmp_path / "one").mkdir()
    sitk.WriteImage(image, str(tmp_path / "one" / "all.dcm"))
    volume, grid = read_volume(tmp_path / "one"), read_grid(tmp_path / "one")
    np.testing.assert_array_equal(volume.data, sitk.GetArrayFromImage(image).transpose(2, 1, 0))
    assert grid is not None
    assert grid.shape == (5, 6, 7)
    np.testing.assert_allclose(grid.affine, volume.affine)


def test_dicom_that_is_no_volume_is_refused(tmp_path: Path) -> None:
    data = np.zeros((5, 6, 6), np.int16)
    write_dicom(tmp_path / "scout", data, more=lambda i: {"0020|0037": "1\\0\\0\\0\\0\\-1"} if i == 5 else {})
    with pytest.raises(ScanError, match="slices of different directions"):
        read_volume(tmp_path / "scout")
    write_dicom(tmp_path / "sizes", data)
    write_dicom(tmp_path / "sizes", data[:, :4, :1])
    with pytest.raises(ScanError, match="slices of different sizes"):
        read_volume(tmp_path / "sizes")
    write_dicom(tmp_path / "dark", data)
    for file in (tmp_path / "dark").iterdir():
        file.write_bytes(file.read_bytes().replace(b"MONOCHROME2", b"MONOCHROME1"))
    with pytest.raises(ScanError, match=r"MONOCHROME1.* convert it to NIfTI first"):
        read_volume(tmp_path / "dark")
    write_dicom(tmp_path / "damaged", data)
    last = tmp_path / "damaged" / "1.2.3-5.dcm"
    last.write_bytes(last.read_bytes()[:-20])
    (tmp_path / "damaged" / "read me.txt").write_text("of the five slices", "utf-8")
    with pytest.raises(ScanError, match=r"1 file\(s\) such as 1.2.3-5.dcm cannot be read: truncated or corrupt"):
        read_volume(tmp_path / "damaged")
    write_dicom(tmp_path / "copies", data, more=lambda i: {"0020|0032": f"-10\\20\\{30 + 3 * (i % 4)}"})
    with pytest.raises(ScanError, match="2 of 6 slices lie where another one does"):
        read_volume(tmp_path / "copies")
    write_dicom(tmp_path / "nowhere", data)
    for file in (tmp_path / "nowhere").iterdir():  # its position under a number that nobody knows
        file.write_bytes(file.read_bytes().replace(b"\x20\x00\x32\x00", b"\x20\x00\x33\x00"))
    with pytest.raises(ScanError, match="do not say where they lie"):
        read_volume(tmp_path / "nowhere")
    (tmp_path / "colour").mkdir()
    picture = sitk.GetImageFromArray(np.zeros((1, 5, 6, 3), np.uint8), isVector=True)
    sitk.WriteImage(picture, str(tmp_path / "colour" / "a.dcm"))
    with pytest.raises(ScanError, match="in colour"):
        read_volume(tmp_path / "colour")


@pytest.mark.parametrize("kind", ["flat", "singular", "nan", "huge"])
def test_a_header_without_a_grid_says_nothing(tmp_path: Path, kind: str) -> None:
    affine = {"singular": np.diag([1, 1, 0, 1.0]), "nan": np.full((4, 4), np.nan)}.get(kind, np.eye(4))
    image = nib.Nifti1Image(np.zeros((8, 9) if kind == "flat" else SHAPE, np.int16), None)
    image.header.set_sform(affine, code=1)
    content = bytearray(image.to_bytes())
    if kind == "huge":
        content[42:48] = np.array([32767] * 3, "<i2").tobytes()
    path = tmp_path / "scan.nii"
    path.write_bytes(content)
    assert kind == "huge" or read_grid(path) is None
    with pytest.raises(ScanError, match=r"not a 3D volume|no inverse|truncated or corrupt"):
        read_volume(path)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_folder_of_nifti_files_is_told_from_a_dicom_series(
    tmp_path: Path, ending: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_nifti(Volume(np.zeros((3, 3, 3), np.int16), np.eye(4)), tmp_path / f"scan{ending}")
    with pytest.raises(ScanError, match=rf"holds NIfTI files and no DICOM series; give the files, .*/\*{ending}$"):
        read_volume(tmp_path)
    assert capfd.readouterr().err == ""


def test_dicom_with_a_missing_slice_or_two_series_is_refused(tmp_path: Path) -> None:
    data = np.zeros((5, 6, 6), np.int16)
    write_dicom(tmp_path / "gap", data, leave_out=(3,))
    with pytest.raises(ScanError, match=r"slices 3 and 4 lie 6\.00 mm apart, the others 3\.00 mm"):
        read_volume(tmp_path / "gap")
    write_dicom(tmp_path / "two", data)
    write_dicom(tmp_path / "two", data[..., :1], series="1.2.4", more=lambda i: {"0008|103e": "Scout"})
    with pytest.raises(
        ScanError, match=r"holds 2 DICOM series.* without a name in 6 file\(s\) such as .*; Scout in 1 file"
    ):
        read_volume(tmp_path / "two")
    with pytest.raises(ScanError, match="holds no DICOM series; give the folder that the slices themselves lie in"):
        read_volume(tmp_path)
