"""How scans are shared out for prediction, and what a forward holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lamp3d.data import PreprocessConfig
from lamp3d.data.preprocess import largest_shape
from lamp3d.errors import PlanError
from lamp3d.graph.footprint import LiveBytes
from lamp3d.nets import SEUNet, UNet
from lamp3d.parallel import Engine
from lamp3d.plan import make_plan
from lamp3d.plan.inference import Sharing, forward_bytes, share_out
from lamp3d.plan.slabs import Slabs, longest_axes
from lamp3d.predict import Predictor
from lamp3d.volume import Volume, read_grid, write_nifti

VOLUME = (1, 1, 48, 32, 64)


def ways(scans: int, devices: int, limit: int | None = None) -> list[Sharing]:
    network = UNet(1, 3, filters=2).eval()
    return share_out(network, VOLUME, scans, devices, precision="fp32", channels_last=False, limit=limit)


@pytest.mark.parametrize(
    ("scans", "devices", "at_once", "slabs"),
    [
        (1, 1, 1, ()),
        (1, 4, 1, (4,)),
        (2, 2, 2, ()),
        (3, 2, 1, (2,)),  # two rounds of two would leave a device idle for a whole scan
        (5, 2, 2, ()),
        (2, 4, 2, (2,)),
        (8, 4, 4, ()),
    ],
)
def test_no_device_is_idle_and_no_scan_cut_without_need(
    scans: int, devices: int, at_once: int, slabs: tuple[int, ...]
) -> None:
    best = ways(scans, devices)[0]
    assert (best.at_once, best.slabs.mesh) == (at_once, slabs)
    assert best.fits
    assert best.most_voxels is None


class LayerNormed(nn.Module):
    """Moves the channels to the end and back, which is not done on slabs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv3d(1, 4, 1), nn.LayerNorm(4), nn.Conv3d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x).permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3))


def test_what_slabs_refuse_is_predicted_whole() -> None:
    ways = share_out(LayerNormed().eval(), VOLUME, 1, 2, precision="fp32", channels_last=False, limit=None)
    assert [(way.at_once, way.slabs) for way in ways] == [(1, Slabs())]


def test_a_scan_that_one_device_cannot_take_is_shared() -> None:
    together, apart = sorted(ways(2, 2), key=lambda way: way.at_once)
    assert together.peak_bytes < 0.7 * apart.peak_bytes
    tight = ways(2, 2, (together.peak_bytes + apart.peak_bytes) // 2)[0]
    assert (tight.at_once, tight.slabs, tight.fits) == (1, Slabs((2,), (4,)), True)
    too_tight = ways(2, 2, together.peak_bytes // 2)[0]
    assert (too_tight.at_once, too_tight.fits) == (1, False)
    assert too_tight.most_voxels == pytest.approx(48 * 32 * 64 / 2, rel=1e-3)


@pytest.mark.parametrize("kind", [UNet, SEUNet])
def test_a_forward_holds_what_was_said(kind: type[UNet | SEUNet]) -> None:
    network = kind(1, 3, filters=4).eval()
    plan = make_plan(network, (1, 1, 32, 32, 32), channels_last=False, repeats=1)
    engine, volume = Engine(network, plan), torch.zeros(VOLUME)
    list(engine.stream([volume]))  # what values look like is found the first time, which holds more
    with LiveBytes() as live:
        list(engine.stream([volume]))
    weights = sum(parameter.nbytes for parameter in network.parameters())
    said = forward_bytes(network, VOLUME, Slabs(), precision="fp32", channels_last=False)
    assert said == pytest.approx(live.highest + volume.nbytes + weights, rel=0.01)


def test_a_mean_over_mirror_images_holds_what_was_said() -> None:
    network = UNet(1, 40, filters=2).eval()  # whose outputs are most of it
    engine = Engine(network, make_plan(network, (1, 1, 32, 32, 32), channels_last=False, repeats=1))
    twins = torch.tensor([0, *range(39, 0, -1)])
    predictor = Predictor(engine, PreprocessConfig(window=(0, 1)), network.divisor, mirror_axes=(0, 1), twins=twins)
    volume = torch.zeros(VOLUME[1:])
    list(predictor.predict_prepared([volume]))
    with LiveBytes() as live:
        list(predictor.predict_prepared([volume]))
    weights = sum(parameter.nbytes for parameter in network.parameters())
    said, once = (
        forward_bytes(network, VOLUME, Slabs(), precision="fp32", channels_last=False, mirrored=mirrored)
        for mirrored in (True, False)
    )
    assert live.highest + volume.nbytes + weights == pytest.approx(said, rel=0.03)
    assert said > 1.5 * once


def test_slabs_hold_their_part_and_the_whole_output() -> None:
    network = UNet(1, 60, filters=2).eval()
    whole, half = (
        forward_bytes(network, VOLUME, longest_axes(VOLUME, mesh), precision="fp32", channels_last=False)
        for mesh in ((), (2,))
    )
    assert 60 * 4 * 48 * 32 * 64 < half < whole + 60 * 4 * 48 * 32 * 64 / 2


def test_a_volume_beyond_the_memory_is_refused_before_it_is_computed() -> None:
    network = UNet(1, 3, filters=2).eval()
    engine = Engine(network, make_plan(network, (1, 1, 32, 32, 32), repeats=1))
    predictor = Predictor(engine, PreprocessConfig(window=(0, 1)), network.divisor, most_voxels=20_000)
    data = np.random.default_rng(0).random((17, 32, 32), np.float32)  # 17 planes are padded to 32
    with pytest.raises(PlanError, match=r"32×32×32 voxels does not fit.*0\.02 million.*--window"):
        predictor.predict(Volume(data, np.eye(4)))


def test_headers_tell_the_largest_shape(tmp_path: Path) -> None:
    turned = np.array([[0, 0, -2.0, 0], [1.5, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 0, 1]])  # axes: y, z, x
    write_nifti(Volume(np.zeros((20, 30, 40), np.int16), turned), tmp_path / "scan.nii.gz")
    grid = read_grid(tmp_path / "scan.nii.gz")
    assert grid is not None
    assert grid.shape == (20, 30, 40)
    np.testing.assert_array_equal(grid.affine, turned)
    plain = PreprocessConfig(window=(0, 1), crop_foreground=False)
    assert largest_shape(grid, plain) == (40, 20, 30)
    assert largest_shape(grid, plain.model_copy(update={"spacing_mm": (1.0, 3.0, 3.0)})) == (80, 10, 30)
    (tmp_path / "broken.nii.gz").write_bytes(b"no scan")
    assert read_grid(tmp_path / "broken.nii.gz") is None
    assert read_grid(tmp_path) is None
