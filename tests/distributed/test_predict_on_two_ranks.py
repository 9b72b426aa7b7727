"""Two ranks, as a pipeline or sharing volumes, predict what one does: whole volumes, windows, mirror images."""

import numpy as np
import torch

from lamp3d.data.preprocess import PreprocessConfig
from lamp3d.nets import UNet
from lamp3d.parallel import Engine, launch
from lamp3d.plan import Plan, make_plan
from lamp3d.predict import Predictor
from lamp3d.volume import Volume

WAYS = ({}, {"window": (32, 16, 16)}, {"mirror_axes": (0, 2), "twins": torch.tensor([0, 2, 1])})
PREPROCESS = PreprocessConfig(window=(0, 1000), foreground_above=100, margin_voxels=1)


def network() -> UNet:
    torch.manual_seed(0)
    return UNet(1, 3, filters=2).eval()


def scan() -> Volume:
    data = np.zeros((20, 30, 18), np.float32)
    data[1:-2, 2:-1, 1:-1] = np.random.default_rng(0).uniform(200, 900, (17, 27, 16))
    return Volume(data, np.diag([-2.0, 2.0, 3.0, 1.0]))


def predict(plan: Plan) -> list[tuple[Volume | None, list[torch.Tensor | None]]]:
    """In each worker: for every way to predict, the label map of a scan and the logits of two volumes."""
    engine = Engine(network(), plan)
    images = [torch.rand(1, 16, 17, 30, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    given = images if engine.reads_input else [image.to("meta") for image in images]
    results = []
    for way in WAYS:
        predictor = Predictor(engine, PREPROCESS, divisor=16, **way)
        labels = predictor.predict(scan())
        logits = list(predictor.predict_prepared(given))
        results.append((labels, logits))
    return results


def test_two_ranks_predict_what_one_does():
    net = network()
    shape = (2, 1, 32, 16, 16)
    alone, pipeline, slabs = (
        make_plan(
            net,
            shape,
            devices=k,
            data=1,
            space=space,
            micro_batches=2,
            schedule="gpipe",
            channels_last=False,
            repeats=1,
        )
        for k, space in ((1, 1), (2, 1), (2, 2))
    )
    expected = predict(alone)
    none, of_pipeline = launch(predict, devices=2, args=(pipeline,))
    of_slabs, none_either = launch(predict, devices=2, args=(slabs,))
    assert none == none_either == [(None, [None, None])] * len(WAYS)
    for found in (of_pipeline, of_slabs):
        for (labels, logits), (expected_labels, expected_logits) in zip(found, expected, strict=True):
            np.testing.assert_array_equal(labels.data, expected_labels.data)
            np.testing.assert_array_equal(labels.affine, scan().affine)
            for ours, theirs in zip(logits, expected_logits, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)  # norms over four voxels
