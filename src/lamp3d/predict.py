"""From a scan to its label map, through a network that may be spread over several devices.

All ranks of the engine call the same methods with the same scans. A rank that neither reads the network's input nor
holds its output does no work on voxels: it only needs to know the shapes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor
from torch.nn import functional as F

from lamp3d.data.preprocess import PreprocessConfig, prepare_scan
from lamp3d.errors import ConfigError
from lamp3d.parallel import Engine
from lamp3d.parallel.sharded import whole
from lamp3d.volume import Volume

WINDOW_OVERLAP = 0.5


class Predictor:
    """Predicts label maps of whole scans in one pass, or by a sliding window.

    Args:
        engine: the network on its devices, in evaluation mode.
        preprocess: how the scans that the network was trained on were prepared.
        divisor: what every side of the network's input must be a multiple of (16 for the U-Net with four levels).
        window: the sides of the sliding window in voxels (paper §3, "64³"); None predicts the whole volume at once.
        classes: how many channels of the output to predict with, the rest being deep supervision; None: all.

    Raises:
        ConfigError: if the window's sides are not multiples of the divisor.
    """

    def __init__(
        self,
        engine: Engine,
        preprocess: PreprocessConfig,
        divisor: int,
        window: tuple[int, int, int] | None = None,
        classes: int | None = None,
    ) -> None:
        if window is not None and any(side <= 0 or side % divisor for side in window):
            raise ConfigError(
                f"the window's sides {window} must be multiples of {divisor}, by which this network halves its "
                f"volumes: take {tuple(max(1, round(side / divisor)) * divisor for side in window)}"
            )
        self.engine = engine
        self.preprocess = preprocess
        self.divisor = divisor
        self.window = window
        self.classes = classes
        # Ranks that share a volume all learn the result; one of them is enough to hand it on.
        self.holds_result = engine.holds_output and engine.is_first_slab

    def predict(self, scan: Volume) -> Volume | None:
        """The label map of one scan, on the scan's own grid.

        Args:
            scan: the raw scan, the same on every rank.

        Returns:
            uint8 labels with the scan's shape and affine; None on all ranks but one that holds the network's output.

        Raises:
            ScanError: if the scan cannot be prepared (no foreground, for instance).
        """
        prepared = prepare_scan(scan, self.preprocess)
        (logits,) = self.predict_prepared([prepared.image])
        return None if logits is None else prepared.restore_labels(logits)

    def predict_prepared(self, images: Iterable[Tensor]) -> Iterator[Tensor | None]:
        """The logits of prepared volumes, in order; whole volumes follow each other through the pipeline.

        Args:
            images: (1, D, H, W) tensors of any shapes. A rank that does not read the network's input only looks at
                the shapes, so that it may give tensors on the meta device.

        Yields:
            (C, D, H, W) logits on the engine's device, or None on all ranks but one that holds the network's output.
        """
        if self.window is None:
            yield from self._whole(images)
        else:
            yield from (self._by_window(image, self.window) for image in images)

    def _whole(self, images: Iterable[Tensor]) -> Iterator[Tensor | None]:
        shapes: deque[torch.Size] = deque()

        def padded() -> Iterator[Tensor | None]:
            for image in images:
                shapes.append(image.shape)
                yield self._pad(image)[None].to(self.engine.device) if self.engine.reads_input else None

        for logits in self.engine.stream(padded()):
            _, depth, height, width = shapes.popleft()
            logits = whole(logits)
            yield logits[0, : self.classes, :depth, :height, :width] if self.holds_result else None

    def _pad(self, image: Tensor) -> Tensor:
        """Pads each axis at its end to a multiple of the divisor, with the image's minimum, as training does."""
        missing = [-side % self.divisor for side in image.shape[1:]]
        if not any(missing):
            return image
        depth, height, width = missing
        return F.pad(image, (0, width, 0, height, 0, depth), value=image.min().item())

    def _by_window(self, image: Tensor, window: tuple[int, int, int]) -> Tensor | None:
        engine = self.engine
        if engine.reads_input:
            volume, padding = image[None].to(engine.device), image.min().item()
        else:
            # MONAI lays the windows out by the shape alone; one voxel, expanded, has it without the memory.
            volume, padding = torch.zeros((), device=engine.device).expand(1, *image.shape), 0.0
        logits = sliding_window_inference(
            volume,
            roi_size=window,
            sw_batch_size=engine.plan.micro_batches,  # as many windows as fill the pipeline
            predictor=self._forward,
            overlap=WINDOW_OVERLAP,
            mode="gaussian",
            cval=padding,
            # All ranks must call the engine for the same windows, but only one has results to stitch together.
            device=engine.device if self.holds_result else torch.device("meta"),
        )
        assert isinstance(logits, Tensor)
        return logits[0] if self.holds_result else None

    def _forward(self, windows: Tensor) -> Tensor:
        logits = whole(self.engine.forward(windows if self.engine.reads_input else None))
        return (
            logits[:, : self.classes].float()
            if self.holds_result
            else windows.new_zeros(len(windows), 1, *windows.shape[2:])
        )
