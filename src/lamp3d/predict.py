"""From a scan to its label map, through a network that may be spread over several devices.

All ranks of the engine call the same methods with the same scans. A rank that neither reads the network's input nor
holds its output does no work on voxels: it only needs to know the shapes.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import scipy.ndimage
import torch
from torch import Tensor
from torch.nn import functional as F

from lamp3d.data.augment import LEFT_RIGHT_AXIS
from lamp3d.data.preprocess import PreparedScan, PreprocessConfig, prepare_scan
from lamp3d.errors import ConfigError, PlanError
from lamp3d.graph import trace
from lamp3d.nets import Network, UShape
from lamp3d.parallel import Engine
from lamp3d.plan import counted
from lamp3d.scan import Scan
from lamp3d.settings import Settings
from lamp3d.sides import Shape3, Sides, check_sides, padded_sides, sides_or_none
from lamp3d.space.sharded import whole
from lamp3d.volume import Volume

WINDOW_OVERLAP = 0.5


class PredictConfig(Settings):
    """How a network's output becomes a label map.

    Args:
        mirror: average the output over the scan's mirror images, along the axes that training flips; takes twice as
            long an axis.
        largest_part: organs of which only the largest connected part is kept: those that are one piece in everybody.
        window: "whole" volumes at once, or the sides of a sliding window in voxels, for validation too: where whole
            volumes do not fit, and for networks that take but one size.
    """

    mirror: bool = False
    largest_part: tuple[str, ...] = ()
    window: Sides = "whole"

    @property
    def window_shape(self) -> Shape3 | None:
        """Voxels of a window; None for whole volumes."""
        return sides_or_none(self.window)


def single_parts(config: PredictConfig, organs: Sequence[str]) -> tuple[int, ...]:
    """The labels of the organs that are one piece.

    Raises:
        ConfigError: the configuration names an organ that is not there.
    """
    if unknown := sorted(set(config.largest_part) - set(organs)):
        raise ConfigError(f"predict.largest_part names {', '.join(unknown)}; the organs are {', '.join(organs)}.")
    return tuple(1 + organs.index(organ) for organ in config.largest_part)


def check_window(window: Shape3 | None, network: Network) -> None:
    """Whether a network can take such windows.

    Raises:
        ConfigError: a side is no multiple of the network's divisor, or they are too small to normalise.
    """
    if window is None:
        return
    check_sides("a window", window, network.divisor)
    if isinstance(network, UShape):
        network.check_input((1, network.in_channels, *window))
    else:
        trace(network, (1, network.in_channels, *window))


class Predictor:
    """Predicts label maps of whole scans in one pass, or by a sliding window.

    Args:
        engine: the network on its devices, in evaluation mode.
        preprocess: how the scans that the network was trained on were prepared.
        divisor: what every side of the network's input must be a multiple of (16 for the U-Net with four levels).
        window: the sides of the sliding window in voxels (paper §3, "64³"), of which `check_window` thinks well; None
            predicts the whole volume at once.
        classes: how many channels of the output to predict with, the rest being deep supervision; None: all.
        mirror_axes: of (D, H, W), along which the scan is mirrored too: the output is the mean over all mirror images.
        twins: the channel that each channel becomes in a left-right mirror image; None: none has a side.
        single_parts: labels of which only the largest connected part is kept.
        most_voxels: of a padded volume that the devices have memory for; None: any number.
    """

    def __init__(
        self,
        engine: Engine,
        preprocess: PreprocessConfig,
        divisor: int,
        window: Shape3 | None = None,
        classes: int | None = None,
        mirror_axes: Sequence[int] = (),
        twins: Tensor | None = None,
        single_parts: Sequence[int] = (),
        most_voxels: int | None = None,
    ) -> None:
        self.engine = engine
        self.preprocess = preprocess
        self.divisor = divisor
        self.window = window
        self.classes = classes
        self.twins = twins
        self.single_parts = single_parts
        self.most_voxels = most_voxels
        self.views = [axes for n in range(1 + len(mirror_axes)) for axes in itertools.combinations(mirror_axes, n)]
        # Ranks that share a volume all learn the result; one of them is enough to hand it on.
        self.holds_result = engine.holds_output and engine.is_first_slab

    def prepare(self, scan: Volume | Scan) -> PreparedScan:
        """A scan as the network wants it. What is wrong with it is wrong on all ranks alike, before any computes.

        Raises:
            ScanError: if the scan cannot be prepared (no foreground, for instance).
            PlanError: it is larger than the devices have memory for.
        """
        prepared = prepare_scan(scan, self.preprocess)
        sides = padded_sides(prepared.image.shape[1:], self.divisor)
        if self.most_voxels is not None and math.prod(sides) > self.most_voxels:
            shape, devices = "×".join(map(str, sides)), counted(self.engine.plan.slabs, "device")
            raise PlanError(
                f"a whole volume of {shape} voxels does not fit: the memory of {devices} is "
                f"enough for {self.most_voxels / 1e6:.3g} million. Predict with more --devices, or by a sliding "
                "window, such as --window 128."
            )
        return prepared

    def predict(self, scan: Volume | Scan | PreparedScan) -> Volume | None:
        """The label map of one scan, on the scan's own grid.

        Args:
            scan: the raw scan or its channels, or what `prepare` made of them; the same on every rank.

        Returns:
            uint8 labels with the scan's shape and affine; None on all ranks but one that holds the network's output.

        Raises:
            ScanError, PlanError: as from `prepare`.
        """
        prepared = scan if isinstance(scan, PreparedScan) else self.prepare(scan)
        (logits,) = self.predict_prepared([prepared.image])
        if logits is None:
            return None
        labels = prepared.restore_labels(logits)
        return replace(labels, data=with_largest_parts(labels.data, self.single_parts))

    def predict_prepared(self, images: Iterable[Tensor]) -> Iterator[Tensor | None]:
        """The logits of prepared volumes, in order; whole volumes follow each other through the pipeline.

        Args:
            images: (C, D, H, W) tensors of any shapes. A rank that does not read the network's input only looks at
                the shapes, so that it may give tensors on the meta device.

        Yields:
            (C, D, H, W) logits on the engine's device, or None on all ranks but one that holds the network's output.
        """
        if len(self.views) == 1:
            yield from self._outputs(images)
            return
        views = (image.flip([1 + axis for axis in axes]) for image in images for axes in self.views)
        mean: Tensor | None = None
        for axes, logits in zip(itertools.cycle(self.views), self._outputs(views), strict=False):
            if logits is not None:
                logits = self._mirrored_back(logits, axes).div_(len(self.views))
                mean = logits if mean is None else mean.add_(logits)
            if axes == self.views[-1]:
                yield mean
                mean = None

    def _mirrored_back(self, logits: Tensor, axes: Sequence[int]) -> Tensor:
        if LEFT_RIGHT_AXIS in axes and self.twins is not None:
            logits = logits[self.twins.to(logits.device)]
        return logits.flip([1 + axis for axis in axes]).float()  # a copy in any case

    def _outputs(self, images: Iterable[Tensor]) -> Iterator[Tensor | None]:
        if self.window is None:
            yield from self._whole(images)
        else:
            yield from (self._by_window(image, self.window) for image in images)

    def _whole(self, images: Iterable[Tensor]) -> Iterator[Tensor | None]:
        shapes: deque[torch.Size] = deque()

        def padded() -> Iterator[Tensor | None]:
            for image in images:
                shapes.append(image.shape)
                sides = padded_sides(image.shape[1:], self.divisor)
                yield _padded(image, sides)[None].to(self.engine.device) if self.engine.reads_input else None

        for logits in self.engine.stream(padded()):
            _, depth, height, width = shapes.popleft()
            logits = whole(logits)
            yield logits[0, : self.classes, :depth, :height, :width] if self.holds_result else None

    def _by_window(self, image: Tensor, window: Shape3) -> Tensor | None:
        from monai.inferers import sliding_window_inference  # a second, for those who predict whole volumes

        engine = self.engine
        depth, height, width = image.shape[1:]
        larger = [max(sides) for sides in zip(image.shape[1:], window, strict=True)]  # or no window fits in
        if engine.reads_input:
            volume = _padded(image, larger)[None].to(engine.device)
        else:
            # MONAI lays the windows out by the shape alone; one voxel, expanded, has it without the memory.
            volume = torch.zeros((), device=engine.device).expand(1, len(image), *larger)
        logits = sliding_window_inference(
            volume,
            roi_size=window,
            sw_batch_size=engine.plan.micro_batches,  # as many windows as fill the pipeline
            predictor=self._forward,
            overlap=WINDOW_OVERLAP,
            mode="gaussian",
            # All ranks must call the engine for the same windows, but only one has results to stitch together.
            device=engine.device if self.holds_result else torch.device("meta"),
        )
        assert isinstance(logits, Tensor)
        return logits[0, :, :depth, :height, :width] if self.holds_result else None

    def _forward(self, windows: Tensor) -> Tensor:
        logits = whole(self.engine.forward(windows if self.engine.reads_input else None))
        return (
            logits[:, : self.classes].float()
            if self.holds_result
            else windows.new_zeros(len(windows), 1, *windows.shape[2:])
        )


def _padded(image: Tensor, sides: Sequence[int]) -> Tensor:
    """Each axis at its end, with each channel's minimum, as training does."""
    depth, height, width = (to - side for side, to in zip(image.shape[1:], sides, strict=True))
    if not depth + height + width:
        return image
    missing = (0, width, 0, height, 0, depth)
    return torch.stack([F.pad(channel, missing, value=channel.min().item()) for channel in image])


def with_largest_parts(labels: npt.NDArray[np.generic], single: Iterable[int]) -> npt.NDArray[np.generic]:
    """A label map in which some labels have but their largest connected part; what else they had is background.

    Args:
        labels: integers, of any shape.
        single: those labels; voxels that touch at a corner are connected.
    """
    if not (values := list(single)):
        return labels
    labels, boxes = labels.copy(order="K"), scipy.ndimage.find_objects(labels)
    for value in values:
        box = boxes[value - 1] if value <= len(boxes) else None
        if box is not None:
            mask = labels[box] == value
            parts, count = scipy.ndimage.label(mask, np.ones((3,) * mask.ndim))
            if count > 1:
                sizes = np.bincount(parts.ravel())
                labels[box][mask & (parts != 1 + sizes[1:].argmax())] = 0
    return labels
