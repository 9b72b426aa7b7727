"""The benchmark's peer computes what the plain network computes, so that their times may be compared."""

import pytest
import torch
from torch import Tensor, nn

from lamp3d.errors import ConfigError
from lamp3d.nets import SEUNet, UNet

pytest.importorskip("torchgpipe", reason="the peers of the benchmarks come with `pip install lamp3d[bench]`")

from benchmarks.pipeline.peers import torchgpipe_unet


def step(network: nn.Module, model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    network.zero_grad()
    logits = model(images)
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize(
    "cuts",
    [["decoder3.conv1"], ["cat_2"], ["encoder2.conv1", "encoder5.norm1 + encoder5.act1", "up2"]],
    ids=["one level", "at a skip", "four stages"],
)
def test_torchgpipe_equals_the_plain_network(cuts: list[str], chunks: int) -> None:
    torch.manual_seed(0)
    network = UNet(1, 3, filters=2).double()
    images = torch.randn(6, 1, 32, 32, 16, dtype=torch.float64)
    logits, gradients = step(network, network, images)
    peer = torchgpipe_unet(network, cuts, chunks)
    assert len(peer.partitions) == len(cuts) + 1
    peer_logits, peer_gradients = step(network, peer, images)
    torch.testing.assert_close(peer_logits, logits, rtol=1e-10, atol=0)
    assert gradients.keys() == peer_gradients.keys()
    for name, expected in gradients.items():
        error = (peer_gradients[name] - expected).abs().max() / expected.abs().max()
        assert error < 1e-10, name


@pytest.mark.parametrize(
    ("network", "cuts", "says"),
    [
        (UNet(1, 2, filters=2), ["decoder9"], "no cell begins with 'decoder9'"),
        (UNet(1, 2, filters=2), ["up2", "pool1"], "not in the order"),
        (SEUNet(1, 2, filters=2), ["up2"], "no chain"),
    ],
)
def test_what_torchgpipe_cannot_run_is_refused(network: nn.Module, cuts: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        torchgpipe_unet(network, cuts, 2)
