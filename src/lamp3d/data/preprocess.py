"""From a scan to a network's input, and from the network's output back to the scan's own grid.

MONAI is imported where it is used: that takes a second and 0.1 GB, and most processes prepare no scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from nibabel.affines import voxel_sizes
from pydantic import Field, PositiveFloat, field_validator, model_validator
from torch import Tensor

from lamp3d.data.windows import Window, bring_to_windows, stacked
from lamp3d.errors import ConfigError, ScanError
from lamp3d.scan import UNNAMED, Scan
from lamp3d.settings import Settings
from lamp3d.volume import Grid, Volume

if TYPE_CHECKING:
    from monai.data import MetaTensor
    from monai.transforms import Compose

_AXIS_ENDS = (("L", "R"), ("P", "A"), ("I", "S"))
_KEYS = ("image", "label")
_CT_WINDOW, _CT_AIR = (-200.0, 400.0), -500.0

_FARTHEST = 50.0
"""How many times larger or smaller a resampled voxel may be: what is beyond is no patient in mm."""

Spacing = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
"""Of voxels along x, y, z, in mm."""

Percentile = Annotated[float, Field(ge=0, le=100)]


class PreprocessConfig(Settings):
    """How scans are brought to one form.

    Args:
        orientation: what the axes of a prepared scan grow towards; the augmentation's left and right rely on RAS.
        spacing_mm: voxel size of a prepared scan; None keeps the scan's own. Reached to the nearest whole number of
            voxels, so that the scan's extent stays exactly as it is.
        spacing_limits_mm: instead, the smallest and the largest voxel size: only scans beyond a limit are resampled, to
            that limit. For models that are used on others' scans.
        hu_offset: what the dataset's intensities are above Hounsfield units, such as 1024. A scan with values below
            minus half of it is in Hounsfield units, and gets it added.
        window: intensities that become 0 and 1, what lies outside is clipped; one window for all channels or a list of
            them, one a channel, where None stands for ``window_percentiles``. By default -200 and 400 HU for channels
            that are called CT or have no name, and ``window_percentiles`` for all others.
        window_percentiles: of a channel's intensities within the patient, what becomes 0 and 1.
        crop_foreground: cut away the air around the patient.
        foreground_above: raw intensity of the first channel above which a voxel belongs to the patient; by default
            -500 HU where that channel has a window, and the smallest there is where it goes by percentiles.
        margin_voxels: voxels of the scan kept around the foreground.
    """

    orientation: Literal["RAS"] = "RAS"
    spacing_mm: Spacing | None = None
    spacing_limits_mm: tuple[Spacing, Spacing] | None = None
    hu_offset: float = Field(default=0.0, ge=0)
    window: tuple[Window | None, ...] | None = None
    window_percentiles: tuple[Percentile, Percentile] = (0.5, 99.5)
    crop_foreground: bool = True
    foreground_above: float | None = None
    margin_voxels: int = Field(default=2, ge=0)

    @field_validator("window", mode="before")
    @classmethod
    def _is_a_list(cls, window: Any) -> Any:
        pair = isinstance(window, list | tuple) and window and all(isinstance(end, int | float) for end in window)
        return [window] if pair else window

    @model_validator(mode="after")
    def _is_possible(self) -> PreprocessConfig:
        for window in (self.window_percentiles, *(self.window or ())):
            if window is not None and not window[0] < window[1]:
                raise ValueError(f"window {window} must rise: (intensity that becomes 0, intensity that becomes 1)")
        if self.spacing_limits_mm is not None:
            smallest, largest = self.spacing_limits_mm
            if self.spacing_mm is not None:
                raise ValueError("spacing_mm and spacing_limits_mm: give one of them")
            if any(low > high for low, high in zip(smallest, largest, strict=True)):
                raise ValueError(f"spacing_limits_mm {self.spacing_limits_mm} must be (smallest, largest)")
        return self

    def resolved_for(self, channels: Sequence[str]) -> PreprocessConfig:
        """With a window for every channel, and nothing left to their names.

        Raises:
            ConfigError: there are not as many windows as channels.
        """
        ct = [name == UNNAMED or name.casefold().startswith("ct") for name in channels]
        window = tuple(_CT_WINDOW if is_ct else None for is_ct in ct) if self.window is None else self.window
        if len(window) == 1:
            window *= len(channels)
        if len(window) != len(channels):
            raise ConfigError(
                f"preprocess.window has {len(window)} windows for {len(channels)} channel(s) ({', '.join(channels)}); "
                "give one for all of them, or as many."
            )
        above = self.foreground_above
        if above is None and window[0] is not None:
            above = _CT_AIR
        return self.model_copy(update={"window": window, "foreground_above": above})

    def spacing_for(self, spacing_mm: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The voxel size (3,) of a prepared scan whose own is ``spacing_mm``, axes as configured."""
        if self.spacing_mm is not None:
            return np.array(self.spacing_mm)
        return spacing_mm if self.spacing_limits_mm is None else np.clip(spacing_mm, *self.spacing_limits_mm)


@dataclass(frozen=True)
class PreparedScan:
    """A scan as the network wants it, made by `prepare_scan`.

    Args:
        image: (C, D, H, W) float32 in [0, 1], axes as configured.
        label: (1, D, H, W) uint8 on the same grid, when there was a label map.
        affine: (4, 4) float64, voxel index of ``image`` -> mm in RAS+.
        source_affine: (4, 4) float64 of the scan that was prepared.
        labelled_voxels: of the scan that was prepared, that are not cut away.
    """

    image: Tensor
    label: Tensor | None
    affine: npt.NDArray[np.float64]
    source_affine: npt.NDArray[np.float64]
    labelled_voxels: int
    _to_crop: Compose = field(repr=False, compare=False)
    _crop: MetaTensor = field(repr=False, compare=False)

    def restore_labels(self, logits: Tensor) -> Volume:
        """The likeliest class of every voxel of the source scan, on that scan's own grid and affine.

        Class scores are interpolated, not labels (which would leave stairs): one class at a time under a running
        maximum, so that the memory beyond the logits is a few volumes however many classes there are.

        Args:
            logits: (C, D, H, W), scores of the classes on the grid of ``image``.

        Returns:
            A uint8 volume; what was cropped away is background, 0.
        """
        from monai.data import MetaTensor
        from monai.transforms import Resize

        assert logits.shape[1:] == self.image.shape[1:], (tuple(logits.shape), tuple(self.image.shape))
        resize = Resize(self._crop.shape[1:], mode="trilinear", align_corners=False)
        best = torch.full(self._crop.shape, -torch.inf)
        labels = torch.zeros(self._crop.shape, dtype=torch.uint8)
        for value, score in enumerate(logits.detach()):
            here = score[None].float().cpu().contiguous()
            if here.shape != best.shape:
                here = resize(here).as_tensor()
            # Classes come in order, so that the likeliest so far has the largest number among those that were.
            torch.maximum(labels, (here > best).to(torch.uint8).mul_(value), out=labels)
            torch.maximum(best, here, out=best)
        operations = deepcopy(self._crop.applied_operations)
        traced = MetaTensor(labels, affine=self._crop.affine, applied_operations=operations)
        restored = self._to_crop.inverse({"image": traced})["image"]
        return Volume(_in_file_order(restored.as_tensor()[0]).numpy(), self.source_affine)


def prepare_scan(source: Volume | Scan, config: PreprocessConfig, label: Volume | None = None) -> PreparedScan:
    """Orient, crop to the patient, window and resample a scan.

    Args:
        source: raw intensities, or those of every channel.
        config: the form to bring it to.
        label: its label map, on the same grid.

    Raises:
        ScanError: nothing in the scan is brighter than ``foreground_above``, a channel is the same everywhere, or its
            voxels are too large or small to be resampled.
    """
    from monai.data import MetaTensor
    from monai.transforms import Resize
    from monai.transforms.utils import scale_affine

    channels = (source,) if isinstance(source, Volume) else source
    config = config.resolved_for([UNNAMED] * len(channels))
    affine = channels[0].affine
    intensities = stacked(channels, config.hu_offset)
    scan: dict[str, Any] = {"image": _meta(intensities, affine)}
    if label is not None:
        # On the image's affine: the two were found equal up to rounding, and must be turned alike.
        scan["label"] = _meta(label.data.astype(np.uint8)[None], affine)
    above = float(intensities[0].min()) if config.foreground_above is None else config.foreground_above
    to_crop = _to_crop(intensities[0], config, above)
    scan = to_crop(scan)
    crop = scan["image"]
    # Windowed before it is resampled, so that metal of +20,000 does not bleed into its neighbours.
    assert config.window is not None
    bring_to_windows(crop.as_tensor(), config.window, config.window_percentiles, above)
    spacing = np.linalg.norm(np.asarray(crop.affine, dtype=np.float64)[:3, :3], axis=0)
    wanted = config.spacing_for(spacing)
    if (np.maximum(spacing / wanted, wanted / spacing) > _FARTHEST).any():
        own, target = ("×".join(f"{mm:.3g}" for mm in sizes) for sizes in (spacing, wanted))
        raise ScanError(f"voxels of {own} mm, to be resampled to {target} mm: its header has other units, or is wrong")
    size = [max(1, round(n * old / new)) for n, old, new in zip(crop.shape[1:], spacing, wanted, strict=True)]
    scaling = scale_affine(crop.shape[1:], size, align_corners=False)
    return PreparedScan(
        image=_resampled(crop.as_tensor(), size).contiguous(),
        label=_plain(Resize(size, mode="nearest-exact")(scan["label"])).to(torch.uint8) if "label" in scan else None,
        affine=np.asarray(crop.affine, dtype=np.float64) @ scaling,
        source_affine=affine,
        labelled_voxels=int(torch.count_nonzero(scan["label"])) if "label" in scan else 0,
        _to_crop=to_crop,
        # Only its shape and its record of transforms are needed; an expanded scalar takes no memory.
        _crop=MetaTensor(
            torch.zeros(()).expand(1, *crop.shape[1:]),
            affine=crop.affine,
            applied_operations=deepcopy(crop.applied_operations),
        ),
    )


def largest_shape(grid: Grid, config: PreprocessConfig) -> tuple[int, int, int]:
    """What a scan's prepared image has at most: the foreground, to which it is cropped, is not known yet."""
    order = nib.orientations.io_orientation(grid.affine)
    turned = nib.orientations.ornt_transform(order, nib.orientations.axcodes2ornt(config.orientation))
    sources = np.argsort(turned[:, 0])
    shape = np.array(grid.shape)[sources]
    spacing = voxel_sizes(grid.affine)[sources]
    depth, height, width = np.maximum(1, np.round(shape * spacing / config.spacing_for(spacing))).astype(int).tolist()
    return depth, height, width


def _resampled(image: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolated between the voxels; where an axis shrinks, blurred along it first, so that no detail is missed.

    Both are linear, and go axis by axis, so that a matrix an axis does as well: what MONAI makes of unit vectors. It
    takes a tenth of the time and the memory. Weights add up to 1, so that ends are as bright as they were: MONAI blurs
    them with zeros around.
    """
    from monai.transforms import Resize

    for dim, extent in enumerate(size, start=1):
        if extent < image.shape[dim]:
            shrink = Resize((extent,), mode="linear", align_corners=False, anti_aliasing=True)
            weights = shrink(torch.eye(image.shape[dim])).as_tensor()  # (before, after)
            image = (image.movedim(dim, -1) @ (weights / weights.sum(0))).movedim(-1, dim)
    return Resize(size, mode="trilinear", align_corners=False)(image).as_tensor()  # type: ignore[no-any-return]


def _to_crop(first: npt.NDArray[np.float32], config: PreprocessConfig, above: float) -> Compose:
    from monai.transforms import Compose, CropForegroundd, Orientationd

    steps = [Orientationd(_KEYS, axcodes=config.orientation, labels=_AXIS_ENDS, allow_missing_keys=True)]
    if config.crop_foreground:
        darkest, brightest = float(first.min()), float(first.max())
        if brightest <= above:
            raise ScanError(
                f"no voxel is above foreground_above={above}: the scan's values run from {darkest} to {brightest}"
            )
        steps.append(
            CropForegroundd(
                _KEYS,
                source_key="image",
                channel_indices=0,
                select_fn=lambda image: np.asarray(image) > above,  # numpy finds the ends sooner than torch
                margin=config.margin_voxels,
                allow_smaller=True,
                allow_missing_keys=True,
            )
        )
    return Compose(steps)


def _meta(data: npt.NDArray[np.generic], affine: npt.NDArray[np.float64]) -> MetaTensor:
    from monai.data import MetaTensor

    return MetaTensor(torch.from_numpy(data), affine=torch.from_numpy(affine.copy()))


def _in_file_order(volume: Tensor) -> Tensor:
    """The same (X, Y, Z) volume with the first axis the fastest in memory, as files have it.

    In two steps, which torch does block by block; numpy, or nibabel when it writes, takes four times as long.
    """
    x, y, z = volume.shape
    return volume.reshape(x, y * z).T.contiguous().view(y, z, x).transpose(0, 1).contiguous().permute(2, 1, 0)


def _plain(tensor: MetaTensor) -> Tensor:
    plain: Tensor = tensor.as_tensor()
    return plain.contiguous()
