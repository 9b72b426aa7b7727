"""One device: what lamp3d's arithmetic, bf16 and channels-last are worth, and how near to the machine's peak they come.

    lamp3d bench pipeline --only single

Plain PyTorch in fp32 and default layout is the peer. The peak is that of the fastest of some large convolutions,
forward and both gradients, in the same process. FLOPs are counted by torch; a step is forward and backward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import network
from lamp3d.graph import arithmetic, laid_out, lay_out_weights
from lamp3d.graph.allocator import keep_freed_memory

CPU = torch.device("cpu")
LARGE = ((32, 48), (64, 32), (64, 48), (128, 32))
"""Channels and side of the convolutions that the peak is taken from."""


def measure(side: int, rounds: int) -> dict[str, Any]:
    """Seconds of a training step of U-Net-16 at batch 1 in every way; to be called in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, Any] = {"side": side, "seconds": {}}
    found["seconds"]["plain PyTorch, fp32"] = timed(plain(side), rounds)  # before the allocator is changed
    keep_freed_memory()
    found["seconds"]["plain PyTorch, fp32, freed memory kept"] = timed(plain(side), rounds)
    for precision in ("fp32", "bf16"):
        for channels_last in (False, True):
            name = f"lamp3d, {precision}{', channels-last' if channels_last else ''}"
            found["seconds"][name] = timed(ours(side, precision, channels_last), rounds)
    found["gflop"] = gflop(side)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        peak = max(peak_of(channels, extent, dtype, rounds) for channels, extent in LARGE)
        best = min(s for name, s in found["seconds"].items() if name.startswith(f"lamp3d, {precision}"))
        found[f"{precision}_peak_gflops"] = peak
        found[f"{precision}_share_of_peak"] = found["gflop"] / best / peak
    return found


def plain(side: int) -> Callable[[], None]:
    """A step of the network as it is."""
    model, image = network(), torch.randn(1, 1, side, side, side)

    def step() -> None:
        model.zero_grad()
        torch.autograd.backward(model(image).square().mean())

    return step


def ours(side: int, precision: str, channels_last: bool) -> Callable[[], None]:
    """A step of the network as lamp3d computes its cells."""
    model, image = network(), laid_out(torch.randn(1, 1, side, side, side), channels_last)
    lay_out_weights(model, channels_last)

    def step() -> None:
        model.zero_grad()
        with arithmetic(CPU, precision):
            logits: Tensor = model(image)
        torch.autograd.backward(logits.float().square().mean())

    return step


def gflop(side: int) -> float:
    """Of a step, in 10⁹ operations."""
    model, image = network().to("meta"), torch.randn(1, 1, side, side, side, device="meta")
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(model(image).square().mean())
    return float(counter.get_total_flops()) / 1e9


def peak_of(channels: int, side: int, dtype: torch.dtype, rounds: int) -> float:
    """10⁹ operations a second of one large 3³ convolution, forward and backward, channels-last."""
    image = laid_out(torch.randn(1, channels, side, side, side, dtype=dtype), True).requires_grad_()
    layer = nn.Conv3d(channels, channels, 3, padding=1, bias=False, dtype=dtype)
    lay_out_weights(layer, True)
    gradient = torch.randn_like(image)

    def step() -> None:
        image.grad = layer.weight.grad = None
        torch.autograd.backward(layer(image), gradient)

    return 3 * 2 * 27 * channels**2 * side**3 / 1e9 / timed(step, rounds)


def timed(step: Callable[[], object], rounds: int) -> float:
    """The median seconds of a step, after two that warm up."""
    took = []
    for turn in range(rounds + 2):
        begin = time.perf_counter()
        step()
        if turn > 1:
            took.append(time.perf_counter() - begin)
    return statistics.median(took)
