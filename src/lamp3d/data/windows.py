"""Intensities of a scan's channels, each brought to 0 to 1 by a window of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lamp3d.errors import ScanError
from lamp3d.scan import Scan

Window = tuple[float, float]
"""Intensities that become 0 and 1."""

_MOST_RANKED = 1 << 22


def stacked(channels: Scan, hu_offset: float) -> npt.NDArray[np.float32]:
    """All channels (C, X, Y, Z), the first axis the fastest, as files have it.

    Args:
        channels: them.
        hu_offset: what intensities are above Hounsfield units; a channel that is in these gets it added.
    """
    backwards = tuple(reversed(channels[0].data.shape))
    every = np.empty((len(channels), *backwards), np.float32).transpose(0, 3, 2, 1)
    for into, channel in zip(every, channels, strict=True):
        into[...] = channel.data
        if channel.data.min() < -hu_offset / 2 < 0:
            into += hu_offset
    return every


def bring_to_windows(
    image: Tensor, windows: Sequence[Window | None], percentiles: tuple[float, float], above: float
) -> None:
    """Bring every channel to [0, 1], in place.

    Args:
        image: (C, X, Y, Z) float32.
        windows: of each channel; None: what the percentiles say.
        percentiles: of a channel's intensities within the patient.
        above: what belongs to the patient, in the first channel.

    Raises:
        ScanError: a channel without a window is the same everywhere.
    """
    from monai.transforms import ScaleIntensityRange  # a second, for those who prepare no scan

    patient = image[0] > above if None in windows else None
    for channel, (values, window) in enumerate(zip(image, windows, strict=True)):
        if window is None:
            within = values[patient][:: 1 + values.numel() // _MOST_RANKED].numpy()
            low, high = np.percentile(within, percentiles) if within.size else (0.0, 0.0)
            if not low < high:
                raise ScanError(
                    f"channel {channel} is {low:g} nearly everywhere in the patient, whose voxels are those above "
                    f"{above:g} in channel 0"
                )
        else:
            low, high = window
        image[channel] = ScaleIntensityRange(low, high, 0.0, 1.0, clip=True)(values)
