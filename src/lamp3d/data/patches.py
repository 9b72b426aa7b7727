"""Mini-batches of positive patches or whole volumes (paper §2.3), a pure function of the seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lamp3d.data.augment import AugmentConfig, Change, Region, draw_change, label_swap
from lamp3d.data.dataset import Case
from lamp3d.data.intensity import recoloured, widened
from lamp3d.data.sampling import elastic_shifts, sampling_grid, source_box, turned, unturned
from lamp3d.data.store import CaseStore
from lamp3d.errors import ConfigError
from lamp3d.sides import Shape3, check_sides, padded_sides

Shape5 = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Batch:
    """One mini-batch; what was not asked for is None.

    Args:
        images: (B, C, D, H, W) float32, or a list of (1, C, D, H, W) for whole volumes, whose shapes differ.
        labels: the same shapes with one channel, int64.
        annotated: (B, n_classes) bool, which classes each sample's labels tell the truth about.
        names: the cases.
        extents: (D, H, W) of each whole sample, of which a part may have been read.
    """

    images: Tensor | list[Tensor] | None
    labels: Tensor | list[Tensor] | None
    annotated: Tensor
    names: tuple[str, ...]
    extents: tuple[Shape3, ...]


@dataclass(frozen=True)
class _Sample:
    """Where one sample lies and what happens to it: everything random but the noise."""

    case: Case
    start: Shape3
    size: Shape3
    padded: Shape3
    change: Change
    noise: np.random.Generator


class Batches:
    """The mini-batches of one epoch: each a pure function of (seed, its index), so the same on every rank.

    Every case comes ``patches_per_case`` times, in random order; the last mini-batch is filled up from the start of
    that order, so that all have the same size.

    Args:
        store: where the cases are prepared.
        cases: of one split.
        patch: (D, H, W) voxels of a positive patch: around a random voxel of a random organ that the case shows and has
            contours for, jittered, within the scan. None is the whole prepared scan.
        positive_fraction: share of the patches that are positive, on average; the others lie anywhere in the scan.
        batch: samples a mini-batch.
        divisor: what the network needs shapes to be multiples of; whole scans are padded at the end of each axis, with
            the image's minimum and label 0.
        seed: of this epoch, e.g. (seed, stage, epoch).
        augment: random changes.
        patches_per_case: how often each case comes.

    Raises:
        ConfigError: the patch is not a multiple of the divisor, there are no cases or some without a label map, or
            flips would mix up left and right.
    """

    def __init__(
        self,
        store: CaseStore,
        cases: Sequence[Case],
        *,
        patch: Shape3 | None,
        batch: int,
        divisor: int,
        seed: Sequence[int],
        augment: AugmentConfig,
        patches_per_case: int = 1,
        positive_fraction: float = 1.0,
    ) -> None:
        if not cases:
            raise ConfigError("no cases to make mini-batches from; name some in the dataset's split")
        if bare := [case.name for case in cases if case.label is None]:
            raise ConfigError(f"cases without a label map cannot be trained on: {', '.join(bare)}; leave them out")
        if batch < 1 or patches_per_case < 1:
            raise ConfigError(f"batch ({batch}) and patches_per_case ({patches_per_case}) must be at least 1")
        if patch is not None:
            check_sides("a patch", patch, divisor)
        self._store, self._patch, self._batch, self._divisor = store, patch, batch, divisor
        self._augment, self._seed = augment, [int(part) for part in seed]
        self._positive_fraction = positive_fraction
        self._swap = label_swap(augment, store.dataset.organs)
        order = self._rng().permutation(len(cases) * patches_per_case)
        self._order = [cases[item % len(cases)] for item in order]

    def __len__(self) -> int:
        return -(-len(self._order) // self._batch)

    def read(
        self, i: int, *, images: bool = True, labels: bool = True, part: Callable[[Shape3], Region] | None = None
    ) -> Batch:
        """Read the i-th mini-batch.

        Args:
            i: 0 to ``len(self) - 1``.
            images: whether the images are wanted.
            labels: whether the labels are wanted; the images are the same either way.
            part: which region of a sample of some shape is wanted, all of it by default; no more of the scan is read
                than it is made of.
        """
        samples = [self._sample(i, j, case) for j, case in enumerate(self._cases(i))]
        read = [self._read(sample, images, labels, part) for sample in samples]
        return Batch(
            images=self._joined([image for image, _ in read if image is not None]) if images else None,
            labels=self._joined([label for _, label in read if label is not None]) if labels else None,
            annotated=torch.stack([self._annotated(sample) for sample in samples]),
            names=tuple(sample.case.name for sample in samples),
            extents=tuple(sample.padded for sample in samples),
        )

    def shapes(self, i: int) -> list[Shape5]:
        """The shapes of the i-th mini-batch's images, without reading a voxel: one, or one a whole volume."""
        if self._patch is not None:
            return [(self._batch, self._store.channels, *self._patch)]
        return [
            (1, self._store.channels, *padded_sides(self._store.shape(case), self._divisor)) for case in self._cases(i)
        ]

    def share_of(self, planned: Sequence[int]) -> float:
        """How large mini-batches are on average, over the shape (B, C, D, H, W) that a plan is made for."""
        every = sum(math.prod(shape) for i in range(len(self)) for shape in self.shapes(i))
        return every / len(self) / math.prod(planned)

    def _cases(self, i: int) -> list[Case]:
        if not 0 <= i < len(self):
            raise IndexError(f"mini-batch {i} of {len(self)}")
        first = i * self._batch
        return [self._order[item % len(self._order)] for item in range(first, first + self._batch)]

    def _rng(self, *place: int) -> np.random.Generator:
        # The place goes into spawn_key: as a part of the entropy, (1,) and (1, 0) would be the same seed.
        return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=place))

    def _sample(self, i: int, j: int, case: Case) -> _Sample:
        place, change, noise = self._rng(i, j).spawn(3)
        shape = self._store.shape(case)
        if self._patch is None:
            start, size, padded = (0, 0, 0), shape, padded_sides(shape, self._divisor)
        else:
            start, size, padded = self._positive_start(case, shape, self._patch, place), self._patch, self._patch
        return _Sample(case, start, size, padded, draw_change(self._augment, change), noise)

    def _positive_start(self, case: Case, shape: Shape3, patch: Shape3, rng: np.random.Generator) -> Shape3:
        organs = self._store.foreground_voxels(case)
        # Where all are positive nothing is drawn, so that a seed means what it always did.
        positive = self._positive_fraction == 1 or rng.random() < self._positive_fraction
        if organs and positive:
            voxels = organs[sorted(organs)[rng.integers(len(organs))]]
            centre = voxels[rng.integers(len(voxels))]
        else:  # any place will do
            centre = rng.integers(shape)
        low, high = np.array(patch) // 4, np.array(patch) // 4 + 1
        jitter = rng.integers(-low, high)  # at most a quarter patch, so that the voxel stays well inside
        room = np.maximum(np.array(shape) - patch, 0)
        depth, height, width = (int(n) for n in np.clip(centre + jitter - np.array(patch) // 2, 0, room))
        return depth, height, width

    def _annotated(self, sample: _Sample) -> Tensor:
        annotated = self._store.annotated(sample.case)
        return annotated[self._swap] if sample.change.mirrors else annotated

    def _read(
        self, sample: _Sample, image: bool, label: bool, part: Callable[[Shape3], Region] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Image (C, D, H, W) float32 and label (1, D, H, W) int64 of a sample, or the wanted part of them."""
        case, change = sample.case, sample.change
        wanted = (slice(0, sample.padded[0]), slice(0, sample.padded[1]), slice(0, sample.padded[2]))
        if part is not None:
            wanted = part(sample.padded)
        region = widened(wanted, sample.padded, change) if image else wanted
        # What of it lies in the sample before padding; and where that comes from, before flips and turns.
        inside = [slice(min(r.start, n), min(r.stop, n)) for r, n in zip(region, sample.size, strict=True)]
        origin = unturned((inside[0], inside[1], inside[2]), sample.size, change)
        size = [r.stop - r.start for r in origin]
        empty = not all(size)
        grid, box = None, self._box(sample, origin)
        if change.resamples and not empty:
            grid, box = self._grid(sample, origin)
        pixels, truth = self._store.read(case, box, image=image and not empty, label=label and not empty)
        if empty:  # all padding
            pixels = torch.zeros(self._store.channels, *size) if image else None
            truth = torch.zeros(1, *size, dtype=torch.uint8) if label else None
        extents = [r.stop - r.start for r in region]
        if pixels is not None:
            minima = self._store.minima(case)
            pixels = _placed(pixels - minima, grid, "bilinear", size, sample, extents) + minima
            pixels = recoloured(pixels, change, sample.noise, region, sample.padded)
        if truth is not None:
            truth = _placed(truth, grid, "nearest", size, sample, extents).long()
            truth = self._swap[truth] if change.mirrors else truth
        inner = [slice(w.start - r.start, w.stop - r.start) for w, r in zip(wanted, region, strict=True)]
        pixels, truth = (None if t is None else t[(slice(None), *inner)].contiguous() for t in (pixels, truth))
        return pixels, truth

    def _box(self, sample: _Sample, origin: Region) -> Region:
        """The part of the scan that an unrotated part of a sample is."""
        shape = self._store.shape(sample.case)
        depth, height, width = (
            slice(min(a + r.start, m), min(a + r.stop, m)) for a, r, m in zip(sample.start, origin, shape, strict=True)
        )
        return depth, height, width

    def _grid(self, sample: _Sample, origin: Region) -> tuple[Tensor, Region]:
        """Where the voxels of a rotated part of a sample look, and the part of the scan that they look at."""
        change, spacing = sample.change, np.array(self._store.spacing_mm(sample.case))
        matrix_mm = np.eye(3) if change.matrix_mm is None else change.matrix_mm
        matrix = matrix_mm * spacing[None, :] / spacing[:, None]
        size = [r.stop - r.start for r in origin]
        half = (np.array(sample.size) - 1) / 2
        middle = np.array(sample.start) + half
        offset = [r.start + (n - 1) / 2 for r, n in zip(origin, size, strict=True)] - half
        centre = middle + matrix @ offset
        shifts, margin = None, np.zeros(3)
        if change.nodes_mm is not None:
            offsets_mm = [(np.arange(r.start, r.stop) - h) * mm for r, h, mm in zip(origin, half, spacing, strict=True)]
            shifts_mm = elastic_shifts(change.nodes_mm, change.node_spacing_mm, offsets_mm)
            shifts = shifts_mm / torch.from_numpy(spacing).float()[:, None, None, None]
            margin = np.abs(change.nodes_mm).max((1, 2, 3)) / spacing
        box = source_box(centre, size, self._store.shape(sample.case), matrix, margin)
        return sampling_grid(centre, size, box, matrix, shifts), box

    def _joined(self, tensors: list[Tensor]) -> Tensor | list[Tensor]:
        return [tensor[None] for tensor in tensors] if self._patch is None else torch.stack(tensors)


def _placed(
    part: Tensor, grid: Tensor | None, mode: str, size: Sequence[int], sample: _Sample, padded: Sequence[int]
) -> Tensor:
    """Rotate, flip and pad a part that was read; what lies outside the scan is 0."""
    if grid is not None:
        part = functional.grid_sample(part[None].float(), grid, mode=mode, padding_mode="zeros", align_corners=False)[0]
    else:
        part = _padded_end(part, size)
    return _padded_end(turned(part, sample.change, sample.size), padded)


def _padded_end(part: Tensor, size: Sequence[int]) -> Tensor:
    missing = [n - m for n, m in zip(size, part.shape[1:], strict=True)]
    return functional.pad(part, [0, missing[2], 0, missing[1], 0, missing[0]]) if any(missing) else part.contiguous()
