"""A convolution of a concatenation, or a sum of convolutions: which is cheaper, level by level.

    lamp3d bench pipeline --only concat

The first convolution of each decoder block of U-Net-16, forward and both gradients, one thread, lamp3d's arithmetic.
Neither its norm nor what makes its inputs is counted. The concatenation is what need not be kept for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.pipeline.single import CPU, timed
from lamp3d.graph import arithmetic, laid_out
from lamp3d.graph.allocator import keep_freed_memory

LEVELS = 4


def measure(side: int, rounds: int) -> dict[str, Any]:
    """Milliseconds by precision, layout and level: of the concatenation, of the sum; bytes of the concatenation."""
    torch.set_num_threads(1)
    keep_freed_memory()
    found: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        for channels_last in (False, True):
            name = f"{precision}{', channels-last' if channels_last else ''}"
            found[name] = [
                {
                    "channels": 16 * 2**level,
                    "side": side // 2**level,
                    "concatenated_ms": 1e3 * timed(step(side, level, precision, channels_last, False), rounds),
                    "summed_ms": 1e3 * timed(step(side, level, precision, channels_last, True), rounds),
                    "concatenation_bytes": 2
                    * 16
                    * 2**level
                    * (side // 2**level) ** 3
                    * (4 if precision == "fp32" else 2),
                }
                for level in range(LEVELS)
            ]
    return found


def step(side: int, level: int, precision: str, channels_last: bool, summed: bool) -> Callable[[], None]:
    """Forward and backward of one such convolution."""
    channels, extent = 16 * 2**level, side // 2**level
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    volumes = [
        laid_out(torch.randn(1, channels, extent, extent, extent, dtype=dtype), channels_last).requires_grad_()
        for _ in range(3)
    ]
    skip, up, gradient = volumes
    weight = laid_out(torch.randn(channels, 2 * channels, 3, 3, 3), channels_last).requires_grad_()

    def run() -> None:
        weight.grad = skip.grad = up.grad = None
        with arithmetic(CPU, precision):
            if summed:
                made = F.conv3d(skip, weight[:, :channels], padding=1)
                made += F.conv3d(up, weight[:, channels:], padding=1)
            else:
                made = F.conv3d(torch.cat([skip, up], 1), weight, padding=1)
        torch.autograd.backward(made, gradient.detach())

    return run
