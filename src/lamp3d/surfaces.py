"""How far the surfaces of two masks lie apart: HD95 and surface Dice."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial import KDTree
from torch import Tensor
from torch.nn import functional as F

AT_ONCE = 1 << 22
"""Voxels whose surfaces are found at once, so that large masks take no more memory."""

Array = npt.NDArray[np.float64]


def surface_scores(
    predicted: Tensor, expected: Tensor, spacing_mm: tuple[float, float, float], tolerance_mm: float
) -> tuple[float, float]:
    """HD95 in mm and surface Dice of two masks (D, H, W), neither of them empty."""
    from monai.metrics import compute_hausdorff_distance  # a second, for those who score nothing

    with warnings.catch_warnings():
        # MONAI 1.6 passes this deprecated argument to itself.
        warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
        hd95_mm = compute_hausdorff_distance(
            predicted[None, None], expected[None, None], include_background=True, percentile=95, spacing=spacing_mm
        )
        surfaces = _surfaces(torch.stack([predicted, expected]), spacing_mm)
    # Elements weigh by their area: a voxel's long side would count like its short one otherwise.
    (here, areas_here), (there, areas_there) = surfaces
    near_here = KDTree(there).query(here)[0] <= tolerance_mm
    near_there = KDTree(here).query(there)[0] <= tolerance_mm
    near = areas_here[near_here].sum() + areas_there[near_there].sum()
    return hd95_mm.item(), float(near / (areas_here.sum() + areas_there.sum()))


def _surfaces(masks: Tensor, spacing_mm: tuple[float, float, float]) -> list[tuple[Array, Array]]:
    """The surface elements of masks (2, D, H, W): their places (n, 3) in mm, and areas (n,) in mm².

    A few planes at once: an element lies between eight voxels, and a speck at a scan's other end makes masks large.
    """
    from monai.metrics.utils import get_mask_edges

    masks = F.pad(masks, [1] * 6)
    planes = max(1, AT_ONCE // masks[0, 0].numel())
    found: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for begin in range(0, masks.shape[1] - 1, planes):
        part = masks[:, begin : begin + planes + 1]
        if part.any():
            *edges, area_here, area_there = get_mask_edges(part[0], part[1], crop=False, spacing=spacing_mm)
            for of_mask, edge, area in zip(found, edges, (area_here, area_there), strict=True):
                of_mask.append((edge.nonzero() + torch.tensor([begin, 0, 0]), area[edge]))
    surfaces = []
    for of_mask in found:
        places, areas = (torch.cat(parts).double().numpy() for parts in zip(*of_mask, strict=True))
        surfaces.append((places * spacing_mm, areas))
    return surfaces
