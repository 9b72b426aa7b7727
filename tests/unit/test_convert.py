"""Public datasets in their own layouts become Decathlon folders: axes, contours, splits, and what may be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner

from lamp3d.cli.common import app
from lamp3d.data import read_dataset
from lamp3d.data.convert import AnatomyNetSource, OpenKbpSource, write_decathlon
from lamp3d.errors import ConfigError, DatasetError
from lamp3d.volume import read_volume

RAW = (128, 128, 128)
Array = npt.NDArray[np.generic]


def write_openkbp_patient(folder: Path, scan: Array, masks: Mapping[str, Array], spacing_mm: str) -> None:
    """A patient as OpenKBP publishes one: ``scan`` and ``masks`` are (rows, columns, slices)."""
    folder.mkdir(parents=True)
    stored = np.flatnonzero(scan)
    rows = [f"{index},{float(value)}" for index, value in zip(stored, scan.ravel()[stored], strict=True)]
    (folder / "ct.csv").write_text("\n".join([",data", *rows]) + "\n", "utf-8")
    for name, mask in masks.items():
        (folder / f"{name}.csv").write_text("\n".join([",data", *(f"{i}," for i in np.flatnonzero(mask))]), "utf-8")
    (folder / "voxel_dimensions.csv").write_text(spacing_mm, "utf-8")
    (folder / "dose.csv").write_text(",data\n5,2.5\n", "utf-8")


def box(rows: slice, columns: slice, slices: slice) -> npt.NDArray[np.bool_]:
    mask = np.zeros(RAW, dtype=bool)
    mask[rows, columns, slices] = True
    return mask


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Three patients; of the first, right and left parotid, and a larynx that lies within the oesophagus's contour."""
    root = tmp_path / "open-kbp" / "provided-data"
    scan = np.zeros(RAW, dtype=np.int64)
    scan[60:64, 40:80, 30:32] = 1100
    scan[60, 40, 30] = 70000  # beyond int16
    masks = {
        "RightParotid": box(slice(60, 63), slice(45, 48), slice(50, 53)),
        "LeftParotid": box(slice(60, 63), slice(80, 83), slice(50, 53)),
        "Esophagus": box(slice(70, 75), slice(62, 67), slice(90, 99)),
        "Larynx": box(slice(71, 73), slice(63, 65), slice(90, 92)),
        "PTV70": box(slice(10, 12), slice(10, 12), slice(10, 12)),
    }
    write_openkbp_patient(root / "train-pats" / "pt_10", scan, masks, "3.5\n4.5\n2.5\n")
    write_openkbp_patient(root / "train-pats" / "pt_2", scan, {"Mandible": masks["LeftParotid"]}, "4\n4\n3\n")
    write_openkbp_patient(root / "valid-pats" / "pt_201", scan, masks, "4\n4\n3\n")
    return root


def test_openkbp_becomes_a_dataset(published: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["convert", "openkbp", str(published.parent), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    dataset = read_dataset(tmp_path / "out")
    assert dataset.splits == {"train": ("pt_2", "pt_10"), "validation": ("pt_201",)}  # by number
    cases = {case.name: case for case in dataset.cases}
    assert cases["pt_2"].annotated == ("Mandible",)
    assert cases["pt_10"].annotated == ("RightParotid", "LeftParotid", "Esophagus", "Larynx")
    image, label = read_volume(cases["pt_10"].images[0]), read_volume(cases["pt_10"].label or Path())
    assert image.data[41, 60, 30] == 1100  # columns, rows, slices
    assert image.data[40, 60, 30] == np.iinfo(np.int16).max
    assert image.data.sum() == 1100 * (4 * 40 * 2 - 1) + np.iinfo(np.int16).max
    assert image.spacing_mm == (4.5, 3.5, 2.5)
    value = {organ: 1 + k for k, organ in enumerate(dataset.organs)}
    assert label.data[63, 71, 90] == value["Larynx"]  # the smaller one has what both claim
    assert (label.data == value["Esophagus"]).sum() == 5 * 5 * 9 - 8
    right, left = (np.argwhere(label.data == value[f"{side}Parotid"]).mean(0) for side in ("Right", "Left"))
    x = [(image.affine @ [*place, 1])[0] for place in (right, left)]
    assert x[0] > x[1]  # RAS: the right one lies to the right


@pytest.mark.openkbp
def test_openkbp_comes_out_as_it_is_here(openkbp: Path, tmp_path: Path) -> None:
    dataset = read_dataset(openkbp)
    case = next(case for case in dataset.cases if len(case.annotated) > 5)
    image, label = read_volume(case.images[0]), read_volume(case.label or Path())
    masks = {organ: (label.data == 1 + k).swapaxes(0, 1) for k, organ in enumerate(dataset.organs)}
    spacing = "\n".join(str(s) for s in (image.spacing_mm[1], image.spacing_mm[0], image.spacing_mm[2]))
    write_openkbp_patient(
        tmp_path / "train-pats" / case.name,
        image.data.swapaxes(0, 1),
        {organ: mask for organ, mask in masks.items() if organ in case.annotated},
        spacing,
    )
    write_decathlon(OpenKbpSource(tmp_path), tmp_path / "out")
    [again] = read_dataset(tmp_path / "out").cases
    assert again.annotated == case.annotated
    for before, after in ((case.images[0], again.images[0]), (case.label, again.label)):
        expected, found = read_volume(before or Path()), read_volume(after or Path())
        np.testing.assert_array_equal(found.data, expected.data)
        np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5)


def _break_index(folder: Path) -> None:
    (folder / "Larynx.csv").write_text(",data\n2097152,\n", "utf-8")


def _break_table(folder: Path) -> None:
    (folder / "ct.csv").write_text(",data\n5,much\n", "utf-8")


def _empty_table(folder: Path) -> None:
    (folder / "Larynx.csv").write_text(",data\n", "utf-8")


def _empty_scan(folder: Path) -> None:
    (folder / "ct.csv").write_text(",data\n", "utf-8")


def _break_spacing(folder: Path) -> None:
    (folder / "voxel_dimensions.csv").write_text("4\n0\n3\n", "utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_break_index, "Larynx.csv: 2097152 is not an index into 128x128x128"),
        (_break_table, "ct.csv: .*flat indices and values"),
        (_empty_table, "Larynx.csv is empty; a structure that was not contoured has no file"),
        (_empty_scan, "ct.csv is empty; download it again"),
        (lambda folder: (folder / "ct.csv").write_text(",data\n\n"), "ct.csv is empty; download it again"),
        (lambda folder: (folder / "ct.csv").write_text(",data\n5,nan\n"), "ct.csv: has values that are not finite"),
        (_break_spacing, "voxel_dimensions.csv: .* is not a voxel's size"),
        (lambda folder: (folder / "voxel_dimensions.csv").unlink(), "voxel_dimensions.csv is missing"),
        (lambda folder: (folder / "ct.csv").unlink(), "pt_10: no ct.csv"),
    ],
)
def test_a_damaged_openkbp(published: Path, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(published / "train-pats" / "pt_10")
    with pytest.raises(DatasetError, match=message):
        write_decathlon(OpenKbpSource(published), tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_folder_without_patients(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no folder train-pats"):
        OpenKbpSource(tmp_path)
    (tmp_path / "train-pats").mkdir()
    with pytest.raises(DatasetError, match="no folder pt_N"):
        OpenKbpSource(tmp_path).splits()


def test_nothing_is_replaced_and_an_interrupted_conversion_is_done_again(published: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine", "utf-8")
    with pytest.raises(DatasetError, match="is not empty"):
        write_decathlon(OpenKbpSource(published), full)
    assert [path.name for path in full.iterdir()] == ["thesis.txt"]
    out = tmp_path / "out"
    spacing = (published / "valid-pats" / "pt_201" / "voxel_dimensions.csv").rename(tmp_path / "elsewhere")
    with pytest.raises(DatasetError):
        write_decathlon(OpenKbpSource(published), out)
    spacing.rename(published / "valid-pats" / "pt_201" / "voxel_dimensions.csv")
    write_han_patient(tmp_path / "han" / "p0", np.zeros((2, 2, 2)), {})
    with pytest.raises(DatasetError, match="unfinished conversion of OpenKBP head and neck"):
        write_decathlon(AnatomyNetSource(tmp_path / "han"), out)
    write_decathlon(OpenKbpSource(published), out)
    assert len(read_dataset(out).cases) == 3
    assert not list(out.glob(".*"))
    (out / ".unfinished").touch()  # stopped between the last two actions
    with pytest.raises(DatasetError, match="is not empty"):
        write_decathlon(OpenKbpSource(published), out)


def write_han_patient(folder: Path, scan: Array, masks: Mapping[str, Array]) -> None:
    """A patient as AnatomyNet packs one: arrays (z, y, x)."""
    (folder / "structures").mkdir(parents=True)
    np.save(folder / "img_crp_v2.npy", scan)
    for organ, mask in masks.items():
        np.save(folder / "structures" / f"{organ}_crp_v2.npy", mask)


@pytest.fixture
def han(tmp_path: Path) -> Path:
    """Two patients to train on and one to test."""
    root, rng = tmp_path / "data", np.random.default_rng(0)
    scan = rng.integers(-1000, 1000, (6, 8, 10)).astype(np.float64)
    mask = np.zeros(scan.shape, dtype=np.uint8)
    mask[1, 2, 7] = 1
    write_han_patient(root / "HNCetuximab" / "0522c0001", scan, {"BrainStem": mask})
    write_han_patient(root / "HNPETCT" / "HN-CHUM-001", scan, {"Parotid_L": mask, "Mandible": mask[::-1]})
    write_han_patient(root / "test" / "0522c0555", scan, {"Chiasm": mask})
    return root


def test_anatomynets_arrays_become_a_dataset(han: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["convert", "han", str(han), str(out), "--spacing", "1,1.5,3"])
    assert result.exit_code == 0, result.output
    dataset = read_dataset(out)
    assert dataset.splits["test"] == ("0522c0555",)
    assert set(dataset.splits["train"]) == {"0522c0001", "HN-CHUM-001"}
    case = next(case for case in dataset.cases if case.name == "HN-CHUM-001")
    assert case.annotated == ("Mandible", "Parotid_L")
    image, label = read_volume(case.images[0]), read_volume(case.label or Path())
    scan = np.load(han / "HNPETCT" / "HN-CHUM-001" / "img_crp_v2.npy")
    np.testing.assert_array_equal(image.data, scan.transpose())
    assert image.data.dtype == np.float32
    assert image.spacing_mm == (1.0, 1.5, 3.0)
    assert label.data[7, 2, 1] == 1 + dataset.organs.index("Parotid_L")
    assert (image.affine @ [9, 7, 5, 1] - image.affine @ [0, 0, 0, 1])[:3].tolist() == [-9, -10.5, 15]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("structures/BrainStem_crp_v2.npy", np.zeros((6, 8, 9)), "6x8x9 voxels, but the scan has 6x8x10"),
        ("img_crp_v2.npy", np.zeros((8, 10)), "2 axes"),
        ("structures/BrainStem_crp_v2.npy", np.full((6, 8, 10), np.nan), "values that are not whole"),
        ("img_crp_v2.npy", np.array([["a"]]), "not real numbers"),
        ("img_crp_v2.npy", np.zeros((6, 8, 10), complex), "not real numbers"),
        ("img_crp_v2.npy", np.full((6, 8, 10), 1e300), "not finite"),
        ("img_crp_v2.npy", np.full((6, 8, 10), np.nan), "not finite"),
        ("img_crp_v2.npy", np.array([{"a": 1}], dtype=object), "without Python objects"),
    ],
)
def test_damaged_arrays(han: Path, tmp_path: Path, name: str, content: Array, message: str) -> None:
    np.save(han / "HNCetuximab" / "0522c0001" / name, content, allow_pickle=True)
    with pytest.raises(DatasetError, match=message):
        write_decathlon(AnatomyNetSource(han), tmp_path / "out")


def test_scans_in_half_precision_are_read(han: Path, tmp_path: Path) -> None:
    path = han / "HNCetuximab" / "0522c0001" / "img_crp_v2.npy"
    scan = np.load(path).astype(np.float16)
    np.save(path, scan)
    source = AnatomyNetSource(han)
    image = source.image("0522c0001").data
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, scan.transpose())


def test_bad_requests(han: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["convert", "brats", str(han), "x"], "known: openkbp, han"),
        (["convert", "openkbp", str(han), "x", "--spacing", "1,1,1"], "for han only"),
        (["convert", "han", str(han), "x", "--spacing", "1,1"], "three numbers"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, ConfigError)
        assert message in str(result.exception)
    with pytest.raises(DatasetError, match="not possible"):
        AnatomyNetSource(han, (1, 0, 1))
    with pytest.raises(DatasetError, match="no folder with a img_crp_v2"):
        AnatomyNetSource(tmp_path / "nothing")
    write_han_patient(han / "again" / "0522c0001", np.zeros((2, 2, 2)), {})
    with pytest.raises(DatasetError, match="have one name"):
        AnatomyNetSource(han)


def test_dataset_json_says_what_it_holds(han: Path, tmp_path: Path) -> None:
    write_decathlon(AnatomyNetSource(han), tmp_path / "out")
    content = json.loads((tmp_path / "out" / "dataset.json").read_text("utf-8"))
    assert content["numTraining"] == 2
    assert content["numTest"] == 1
    assert content["labels"]["9"] == "Submandibular_R"


def test_checkpoints_are_chosen_on_cases_that_are_neither_trained_on_nor_tested(tmp_path: Path) -> None:
    for i in range(20):
        write_han_patient(tmp_path / ("test" if i < 3 else "all") / f"p{i:02d}", np.zeros((2, 2, 2)), {})
    splits = AnatomyNetSource(tmp_path).splits()
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [15, 2, 3]
    assert len({name for names in splits.values() for name in names}) == 20


def test_a_patient_that_is_there_twice_is_refused(published: Path) -> None:
    (published / "valid-pats" / "pt_201").rename(published / "valid-pats" / "pt_2")
    with pytest.raises(DatasetError, match="are one patient"):
        OpenKbpSource(published).splits()
