from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lamp3d.data.preprocess import PreprocessConfig
from lamp3d.errors import ConfigError
from lamp3d.nets import UNet, from_monai
from lamp3d.parallel import Engine
from lamp3d.plan import make_plan
from lamp3d.predict import PredictConfig, Predictor, check_window, single_parts, with_largest_parts
from lamp3d.volume import Volume


class Threshold(nn.Module):
    """Class 1 above 0.5: local, so that windows and whole volume agree; refuses sides that 4 does not divide."""

    def forward(self, x: Tensor) -> Tensor:
        assert all(side % 4 == 0 for side in x.shape[2:]), x.shape
        return torch.cat([0.5 - x, x - 0.5], dim=1)


class OneRankEngine:
    """The surface of Engine that prediction uses, for one rank with any role; two volumes in flight."""

    device = torch.device("cpu")
    is_first_slab = True
    plan = SimpleNamespace(micro_batches=3)

    def __init__(self, net: nn.Module, reads_input: bool = True, holds_output: bool = True):
        self.net, self.reads_input, self.holds_output = net, reads_input, holds_output
        self.calls: list[tuple[int, ...] | None] = []
        self.outputs: deque[Tensor] = deque()  # of the other ranks, for one that holds the output but reads no input

    def forward(self, images: Tensor | None) -> Tensor | None:
        assert (images is not None) == self.reads_input
        self.calls.append(None if images is None else tuple(images.shape))
        if not self.holds_output:
            return None
        if images is None:
            return self.outputs.popleft()
        with torch.no_grad():
            self.outputs.append(self.net(images))
        return self.outputs[-1].clone()

    def stream(self, volumes):
        waiting = deque()
        for volume in volumes:
            waiting.append(self.forward(volume))
            if len(waiting) == 2:
                yield waiting.popleft()
        yield from waiting


PREPROCESS = PreprocessConfig(window=(0, 1000), foreground_above=100, margin_voxels=1)


def scan(shape=(17, 22, 13)) -> tuple[Volume, np.ndarray]:
    """A bright block in a body in air, on a flipped and anisotropic grid."""
    data = np.zeros(shape, np.float32)
    data[2:-1, 3:-2, 1:-1] = 300
    data[5:9, 8:15, 4:9] = 900
    affine = np.diag([-2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = 50, -40, 30
    return Volume(data, affine), (data > 500).astype(np.uint8)


@pytest.mark.parametrize("window", [None, (8, 8, 8), (32, 8, 16)])
def test_labels_come_back_on_the_scans_own_grid(window):
    volume, expected = scan()
    prediction = Predictor(OneRankEngine(Threshold()), PREPROCESS, divisor=4, window=window).predict(volume)
    assert prediction is not None
    assert prediction.data.dtype == np.uint8
    np.testing.assert_array_equal(prediction.data, expected)
    np.testing.assert_array_equal(prediction.affine, volume.affine)


def test_volumes_of_different_shapes_stream_in_order():
    images = [torch.full((1, 5 + i, 8, 9), 0.1 * i) for i in range(5)]
    engine = OneRankEngine(Threshold())
    results = list(Predictor(engine, PREPROCESS, divisor=4).predict_prepared(iter(images)))
    assert [result.shape for result in results] == [(2, 5 + i, 8, 9) for i in range(5)]
    for i, result in enumerate(results):
        torch.testing.assert_close(result[1], images[i][0] - 0.5)
    assert set(engine.calls) == {(1, 1, 8, 8, 12), (1, 1, 12, 8, 12)}


@pytest.mark.parametrize("reads_input", [True, False])
@pytest.mark.parametrize("window", [None, (8, 8, 8)])
def test_ranks_without_the_output_make_the_same_calls(window, reads_input):
    images = [torch.rand(1, 10, 9, 8), torch.rand(1, 8, 8, 17)]
    whole_engine = OneRankEngine(Threshold())
    list(Predictor(whole_engine, PREPROCESS, 4, window).predict_prepared(images))

    engine = OneRankEngine(Threshold(), reads_input, holds_output=False)
    given = images if reads_input else [image.to("meta") for image in images]
    assert list(Predictor(engine, PREPROCESS, 4, window).predict_prepared(given)) == [None, None]
    assert engine.calls == (whole_engine.calls if reads_input else [None] * len(whole_engine.calls))


@pytest.mark.parametrize("window", [None, (8, 8, 8)])
def test_a_rank_with_the_output_alone_needs_no_voxels(window):
    images = [torch.rand(1, 10, 9, 8), torch.rand(1, 8, 8, 17)]
    one_device = OneRankEngine(Threshold())
    expected = list(Predictor(one_device, PREPROCESS, 4, window).predict_prepared(images))

    last = OneRankEngine(Threshold(), reads_input=False)
    last.outputs = one_device.outputs
    given = [image.to("meta") for image in images]
    for result, wanted in zip(Predictor(last, PREPROCESS, 4, window).predict_prepared(given), expected, strict=True):
        assert torch.equal(result, wanted)


def test_the_engine_on_one_device_gives_the_networks_own_logits():
    torch.manual_seed(0)
    net = UNet(1, 3, filters=2).eval()
    engine = Engine(net, make_plan(net, (2, 1, 32, 16, 16), devices=1, micro_batches=2, repeats=1))
    images = [torch.rand(1, 16, 17, 30), torch.rand(1, 32, 16, 16)]
    whole = list(Predictor(engine, PREPROCESS, net.divisor).predict_prepared(images))
    with torch.no_grad():
        padded = nn.functional.pad(images[0][None], (0, 2, 0, 15), value=images[0].min().item())
        torch.testing.assert_close(whole[0], net(padded)[0, :, :, :17, :30], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole[1], net(images[1][None])[0], rtol=1e-4, atol=1e-4)
    windows = list(Predictor(engine, PREPROCESS, net.divisor, (32, 16, 16)).predict_prepared(images))
    assert windows[0].shape == whole[0].shape
    torch.testing.assert_close(windows[1], whole[1])


HALVES_FIVE_TIMES = from_monai("UNet", {"channels": [2] * 6, "strides": [2] * 5}, 1, 2, divisor=32)


@pytest.mark.parametrize(
    ("window", "network", "message"),
    [
        ((64, 70, 80), UNet(1, 2, filters=2), "window of 64x70x80.*multiple of 16.*take 64x64x80 or 64x80x80"),
        ((32, 0, 32), UNet(1, 2, filters=2), "take 32x16x32"),
        ((32, 32, 32), UNet(1, 2, filters=2, stem_stride=2), "a single voxel at the coarsest level"),
        (
            (32, 32, 32),
            from_monai("UNet", {"channels": [2] * 6, "strides": [2] * 5}, 1, 2, 32),
            "UNet does not accept an input of 1×1×32×32×32",
        ),
    ],
)
def test_windows_that_the_network_cannot_take_are_refused(window, network, message):
    with pytest.raises(ConfigError, match=message):
        check_window(window, network)
    check_window((64, 64, 32), network)


class Sided(nn.Module):
    """Three channels that tell left from right, up from down, and where in the volume they are."""

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x[0, 0].numel(), dtype=x.dtype).reshape(x[0, 0].shape) / x[0, 0].numel()
        return torch.cat([x, x.roll(1, 2) * place, x.roll(1, 3) + place], dim=1)


TWINS = torch.tensor([0, 2, 1])


@pytest.mark.parametrize("window", [None, (8, 8, 8)])
@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 2)])
def test_mirror_images_are_averaged(window, axes):
    images = [torch.rand(1, 10, 9, 8), torch.rand(1, 8, 8, 17)]
    plain = Predictor(OneRankEngine(Sided()), PREPROCESS, 4, window)
    every = [(), *((axis,) for axis in axes), *([axes] if len(axes) > 1 else [])]
    expected = []
    for image in images:
        of_views = []
        for view in every:
            dims = [1 + axis for axis in view]
            (logits,) = plain.predict_prepared([image.flip(dims)])
            of_views.append((logits[TWINS] if 0 in view else logits).flip(dims))
        expected.append(torch.stack(of_views).mean(0))

    mirrored = Predictor(OneRankEngine(Sided()), PREPROCESS, 4, window, mirror_axes=axes, twins=TWINS)
    for result, wanted in zip(mirrored.predict_prepared(iter(images)), expected, strict=True):
        torch.testing.assert_close(result, wanted)

    other_rank = OneRankEngine(Sided(), reads_input=False, holds_output=False)
    given = [image.to("meta") for image in images]
    other = Predictor(other_rank, PREPROCESS, 4, window, mirror_axes=axes, twins=TWINS)
    assert list(other.predict_prepared(given)) == [None, None]
    assert len(other_rank.calls) == len(mirrored.engine.calls)


def test_organs_that_are_one_piece_have_one_piece():
    labels = np.zeros((6, 7, 8), np.uint8)
    labels[0, 0, :3] = 1
    labels[1, 1, 3] = 1  # touches at a corner
    labels[4:6, 4:6, 4:6] = 1
    labels[4, 4, 4] = 2  # within it
    labels[2, 6, 0:2] = 2
    labels[0, 6, 7] = 3
    found = with_largest_parts(labels, (1, 2, 4))  # 4 is nowhere
    expected = labels.copy()
    expected[:2, :2, :4] = 0
    expected[4, 4, 4] = 0
    np.testing.assert_array_equal(found, expected)
    assert labels[0, 0, 0] == 1  # what was given is as it was
    assert with_largest_parts(labels, ()) is labels

    volume, expected = scan()
    volume.data[12, 16, 9] = 900  # a speck
    (kept, all_) = (
        Predictor(OneRankEngine(Threshold()), PREPROCESS, divisor=4, single_parts=single).predict(volume)
        for single in ((1,), ())
    )
    np.testing.assert_array_equal(kept.data, expected)
    assert all_.data.sum() > expected.sum()


def test_an_organ_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"largest_part names Spleen; the organs are Liver, Tumour"):
        single_parts(PredictConfig(largest_part=("Liver", "Spleen")), ("Liver", "Tumour"))
    assert single_parts(PredictConfig(largest_part=("Tumour",)), ("Liver", "Tumour")) == (2,)
