"""Prepared cases on disk: every scan is read, checked, oriented, cropped and windowed once."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lamp3d.data.augment import Region
from lamp3d.data.dataset import Case, Dataset
from lamp3d.data.preprocess import PreprocessConfig, prepare_scan
from lamp3d.errors import DatasetError, ScanError, WorkerError
from lamp3d.files import write_atomically
from lamp3d.scan import check_grid, read_scan
from lamp3d.volume import Grid, Volume, read_volume

# Raised whenever the meaning of a cache file changes, so that old ones are not read.
_FORMAT = 3
_VOXELS_PER_ORGAN = 2000
# Labelled voxels that a foreground crop may cut off: contours reach a voxel beyond the skin here and there.
_MAX_CUT_FRACTION = 0.01
# Labelled voxels that may be within a window that hides all others: a border, an airway.
_MOST_BELOW = 0.05


class CaseStore:
    """The prepared scans of a dataset, one safetensors file a case, read region by region.

    Args:
        dataset: whose cases.
        config: how they are prepared.
        folder: where the files lie; may be shared between datasets, configurations and processes, since a file's name
            holds a hash of everything that it depends on (source files by path, size and time; config; organs).
    """

    def __init__(self, dataset: Dataset, config: PreprocessConfig, folder: Path) -> None:
        self.dataset = dataset
        self.config = config.resolved_for(dataset.channels)
        self.folder = Path(folder)
        self._settings = (dataset.organs, dataset.channels, self.config)
        self._paths: dict[str, Path] = {}

    @property
    def channels(self) -> int:
        """Of every scan."""
        return len(self.dataset.channels)

    def prepare(self, cases: Sequence[Case], workers: int = 1, progress: bool = True) -> None:
        """Prepare the cases that are not yet in the folder.

        Args:
            cases: which.
            workers: processes to share the work.
            progress: show a progress bar.

        Raises:
            ScanError: a file is corrupt, has other channels than the dataset, holds NaN, or shows no foreground; image
                and label differ in shape or place.
            DatasetError: a label value has no organ, or a scan is in other units than its window.
            WorkerError: a process was killed, most likely for want of memory.
        """
        missing = [case for case in cases if not self._path(case).exists()]
        if not missing:
            return
        done = (
            self._prepare_here(missing) if workers <= 1 or len(missing) == 1 else self._prepare_apart(missing, workers)
        )
        for _ in track(done, description="Preparing scans", total=len(missing), disable=not progress):
            pass

    def _prepare_here(self, cases: Sequence[Case]) -> Iterator[None]:
        for case in cases:
            _prepare_case(case, *self._settings, self._path(case))
            yield

    def _prepare_apart(self, cases: Sequence[Case], workers: int) -> Iterator[None]:
        # Spawned, not forked: torch's threads do not survive a fork.
        pool = ProcessPoolExecutor(
            min(workers, len(cases)), multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
        )
        try:
            tasks = [pool.submit(_prepare_case, case, *self._settings, self._path(case)) for case in cases]
            for task in as_completed(tasks):
                yield task.result()
        except BrokenProcessPool as error:
            raise WorkerError(
                "a process that prepares scans was killed, most likely for want of memory; use fewer workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)

    def shape(self, case: Case) -> tuple[int, int, int]:
        """(D, H, W) of the prepared scan in voxels."""
        depth, height, width = self._info(case)["shape"]
        return depth, height, width

    def spacing_mm(self, case: Case) -> tuple[float, float, float]:
        """Voxel size of the prepared scan."""
        x, y, z = self._info(case)["spacing_mm"]
        return x, y, z

    def minima(self, case: Case) -> Tensor:
        """The smallest value (C, 1, 1, 1) of each channel of the prepared scan: what is around it when it is padded."""
        return torch.tensor(self._info(case)["minima"])[:, None, None, None]

    def read(
        self, case: Case, region: Region | None = None, *, image: bool = True, label: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Image and label map of a case, or the parts of them in a region; nothing else is read.

        Args:
            case: a prepared case.
            region: within the prepared scan; None is all of it.
            image: whether the image is wanted.
            label: whether the label map is wanted.

        Returns:
            image (C, D, H, W) float32 and label (1, D, H, W) uint8; None for what is not wanted or not there.
        """
        where = (slice(None), *(region or (slice(None),) * 3))
        with safe_open(self._prepared(case), framework="pt") as file:
            there = file.keys()
            wanted = {"image": image, "label": label and "label" in there}
            parts = {name: file.get_slice(name)[where] if wanted[name] else None for name in ("image", "label")}
        return parts["image"], parts["label"]

    def annotated(self, case: Case) -> Tensor:
        """(n_classes,) bool: which classes the label map tells the truth about.

        The background is among them only when all organs are: otherwise it hides the organs that were not contoured.
        """
        organs = [organ in case.annotated for organ in self.dataset.organs]
        return torch.tensor([all(organs), *organs])

    def foreground_voxels(self, case: Case) -> dict[str, npt.NDArray[np.int32]]:
        """A fixed random sample of at most 2,000 voxels (N, 3) of each annotated organ that the scan shows."""
        with safe_open(self._prepared(case), framework="np") as file:
            there = set(file.keys())
            return {
                organ: file.get_tensor(key)
                for value, organ in enumerate(self.dataset.organs, start=1)
                if organ in case.annotated and (key := f"voxels/{value}") in there
            }

    def organ_ml(self, case: Case) -> dict[str, float]:
        """The size of each annotated organ that the scan shows."""
        voxel_ml = math.prod(self.spacing_mm(case)) / 1000
        counts = self._info(case)["organ_voxels"]
        return {organ: n * voxel_ml for organ, n in zip(self.dataset.organs, counts, strict=True) if n}

    def _info(self, case: Case) -> dict[str, Any]:
        return _read_info(self._prepared(case))

    def _prepared(self, case: Case) -> Path:
        path = self._path(case)
        if not path.exists():
            raise DatasetError(f"case {case.name} is not prepared in {self.folder}; call prepare() on it first")
        return path

    def _path(self, case: Case) -> Path:
        if case.name not in self._paths:
            sources = [file for file in (*case.images, case.label) if file is not None]
            state = [of_file for source in sources for of_file in _state(source)]
            settings = [self.config.model_dump(mode="json"), self.dataset.organs, self.dataset.channels, case.annotated]
            depends = [_FORMAT, *settings, state]
            key = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]
            self._paths[case.name] = self.folder / f"{case.name}-{key}.safetensors"
        return self._paths[case.name]


def _state(source: Path) -> list[tuple[str, int, int]]:
    """What changes when a file is written, or any of a DICOM folder: the folder's own time does not tell of that."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


@lru_cache(maxsize=4096)
def _read_info(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="np") as file:
        info: dict[str, Any] = json.loads(file.metadata()["info"])
    return info


def _prepare_case(
    case: Case, organs: tuple[str, ...], channels: tuple[str, ...], config: PreprocessConfig, path: Path
) -> None:
    volumes = read_scan(case.images, channels)
    truth = None if case.label is None else read_volume(case.label)
    if truth is not None:
        check_label(case, volumes[0].grid, truth, organs)
        _check_window(case, volumes[0], truth, config)
        # Of an organ that the case does not claim to have contours of, whatever is drawn is not to be relied on.
        unclaimed = [value for value, organ in enumerate(organs, start=1) if organ not in case.annotated]
        if unclaimed:
            truth = Volume(np.where(np.isin(truth.data, unclaimed), 0, truth.data), truth.affine)
    try:
        scan = prepare_scan(volumes, config, truth)
    except ScanError as error:
        raise ScanError(
            f"{case.images[0]}: {error}; change foreground_above, crop_foreground or window, or leave the case out"
        ) from error
    tensors, counts = {"image": scan.image}, torch.zeros(1 + len(organs), dtype=torch.int64)
    if truth is not None and scan.label is not None:
        _check_cut(case, int(np.count_nonzero(truth.data)), scan.labelled_voxels)
        tensors |= {"label": scan.label, **_sample_voxels(case, scan.label, len(organs))}
        counts = torch.bincount(scan.label.flatten(), minlength=1 + len(organs))
    info = {
        "shape": scan.image.shape[1:],
        "spacing_mm": Volume(scan.image[0].numpy(), scan.affine).spacing_mm,
        "minima": scan.image.amin((1, 2, 3)).tolist(),
        "organ_voxels": counts[1:].tolist(),
    }
    write_atomically(path, lambda temporary: save_file(tensors, temporary, {"info": json.dumps(info)}))


def check_label(case: Case, image: Grid, label: Volume, organs: tuple[str, ...]) -> None:
    """Whether a label map lies where its image does, and has no values but the organs'.

    Raises:
        ScanError: it lies elsewhere.
        DatasetError: it has other values.
    """
    check_grid(f"{case.label}: label map", label.grid, f"its image {case.images[0]}", image)
    values = np.unique(label.data)
    wrong = [float(value) for value in values if not (0 <= value <= len(organs) and value == int(value))]
    if wrong:
        what = "name the missing labels there, or correct the label map"
        if any(value % 1 for value in wrong):
            what = "most likely its header has a scale factor (scl_slope): save the label map as integers, without one"
        raise DatasetError(
            f"{case.label}: holds label values {wrong[:5]}, but dataset.json names 0 to {len(organs)} "
            f"({', '.join(organs)}); {what}"
        )


def _check_window(case: Case, image: Volume, label: Volume, config: PreprocessConfig) -> None:
    """Refuse a CT that is in other units than its window: its organs would all be white, and it has no air."""
    assert config.window is not None
    window, above = config.window[0], config.foreground_above
    if window is None or above is None or config.hu_offset or image.data.min() <= above:
        return
    low, high = window
    labelled = image.data[label.data != 0].astype(np.float32, copy=False)
    if labelled.size and np.quantile(labelled, _MOST_BELOW) > high:
        raise DatasetError(
            f"{case.images[0]}: what is labelled is above {high:g}, where preprocess.window ends, and nothing is below "
            f"foreground_above, {above:g}: is it in other units, such as HU + 1024? Give the window and "
            f"foreground_above in these ([{low + 1024:g}, {high + 1024:g}] and {above + 1024:g}), and hu_offset: 1024"
        )


def _check_cut(case: Case, before: int, after: int) -> None:
    if before - after > _MAX_CUT_FRACTION * before:
        raise DatasetError(
            f"{case.label}: the foreground crop cuts off {before - after} of {before} labelled voxels; lower "
            "foreground_above, raise margin_voxels, or set crop_foreground to false"
        )


def _sample_voxels(case: Case, label: Tensor, n_organs: int) -> dict[str, Tensor]:
    places = torch.nonzero(label[0])
    values = label[0][tuple(places.T)]
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    samples = {}
    for value in range(1, n_organs + 1):
        own = places[values == value].to(torch.int32)
        if len(own) > _VOXELS_PER_ORGAN:
            own = own[np.sort(rng.choice(len(own), _VOXELS_PER_ORGAN, replace=False))]
        if len(own):
            samples[f"voxels/{value}"] = own
    return samples
