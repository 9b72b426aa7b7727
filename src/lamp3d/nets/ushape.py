"""The U shape that all networks here share: five encoder blocks, four decoder blocks, four skips (paper §2.2, eq. 2).

    images ─ encoder1 ───────────── skip1 ───────────── cat ─ decoder1 ─ logits
                pool1                                   up1
               encoder2 ─────────── skip2 ───── cat ─ decoder2
                  pool2                         up2
                 encoder3 ───────── skip3 cat ─ decoder3
                    pool3                 up3
                   encoder4 ─ skip4 ─ cat ─ decoder4
                        pool4         up4
                              encoder5

Every operation is a small child module with a name of its own and `forward` reads no concrete shape, so that a graph
tracer sees single convolutions and norms and can cut a network anywhere, also inside one level.
"""

import math
from abc import ABC
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamp3d.errors import ConfigError
from lamp3d.sides import check_sides

LEVELS = 5
NEGATIVE_SLOPE = 0.01

NormName = Literal["instance", "batch", "group"]
NormFactory = Callable[[int], nn.Module]
BlockFactory = Callable[[int, int, int], nn.Module]

NORMS: dict[str, NormFactory] = {
    "instance": lambda channels: nn.InstanceNorm3d(channels, affine=True),
    "batch": lambda channels: nn.BatchNorm3d(channels),
    "group": lambda channels: nn.GroupNorm(math.gcd(channels, 8), channels),
}


def activation() -> nn.LeakyReLU:
    """The networks' activation, in place: what it overwrites (a norm's output, a sum) no backward needs.

    U-Net-16 on 64³ saves 222 MiB for its backward instead of 307 MiB (float32), at the same speed.
    """
    return nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True)


def convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv3d:
    """A 3x3x3 convolution in front of a norm, which would cancel a bias: so it has none."""
    return nn.Conv3d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def norm_factory(norm: NormName) -> NormFactory:
    """The maker of a norm layer for a number of channels.

    Raises:
        ConfigError: `norm` is none of `instance`, `batch`, `group`.
    """
    if norm not in NORMS:
        raise ConfigError(f"norm={norm!r} is unknown; choose one of {', '.join(NORMS)}")
    return NORMS[norm]


class UShape(nn.Module, ABC):
    """A U of one kind of block; logits at the resolution of the images.

    Down-sampling is max pooling by 2. Up-sampling is a transposed convolution, kernel and stride 2, that brings the
    channels to those of the skip (3D U-Net, Çiçek et al. 2016, and the paper's released code). Its windows do not
    overlap, so cutting the volume into slabs needs no halo there, and it is as fast as the alternatives:
    `docs/decisions/upsampling.md` has the measurement.

    Args:
        in_channels: channels of the images (1 for CT).
        out_channels: channels of the logits, the background included.
        filters: channels f of the first block, where the following have 2f, 4f, 8f, 16f; or those of all five levels.
        block: makes a block from (in_channels, out_channels, stride).
        stem_stride: 2 halves the resolution in the first convolution and doubles it again in front of the logits, as
            the paper's released code does; an eighth of the memory for coarser features.
        max_filters: upper limit of the channels of any block, None for no limit.
        deep_supervision: so many coarser decoder levels, 0 to 3, give logits too, brought to the images' resolution and
            joined behind the others along the channels (`docs/decisions/deep-supervision.md`).

    Attributes:
        heads: how many logits of out_channels channels lie behind each other; the first are those to predict with.
        divisor: every spatial size of the images must be a multiple of it (16, or 32 with `stem_stride=2`).

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        filters: int | Sequence[int],
        block: BlockFactory,
        stem_stride: Literal[1, 2] = 1,
        max_filters: int | None = None,
        deep_supervision: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(filters, int) and len(filters) != LEVELS:
            raise ConfigError(f"filters={filters} must be one number, or one for each of the {LEVELS} levels")
        smallest = filters if isinstance(filters, int) else min(filters)
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("filters", smallest)):
            if value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if stem_stride not in (1, 2):
            raise ConfigError(f"stem_stride={stem_stride} is neither 1 (full resolution) nor 2 (half resolution)")
        if max_filters is not None and max_filters < smallest:
            raise ConfigError(f"max_filters={max_filters} is below filters={filters}; raise it or leave it out")
        if deep_supervision not in range(LEVELS - 1):
            raise ConfigError(f"deep_supervision={deep_supervision} must be between 0 and {LEVELS - 2}")

        self.in_channels = in_channels
        self.heads = 1 + deep_supervision
        self.divisor = stem_stride * 2 ** (LEVELS - 1)
        widths = [filters * 2**level for level in range(LEVELS)] if isinstance(filters, int) else filters
        f1, f2, f3, f4, f5 = widths if max_filters is None else [min(width, max_filters) for width in widths]

        self.encoder1 = block(in_channels, f1, stem_stride)
        self.pool1 = nn.MaxPool3d(2)
        self.encoder2 = block(f1, f2, 1)
        self.pool2 = nn.MaxPool3d(2)
        self.encoder3 = block(f2, f3, 1)
        self.pool3 = nn.MaxPool3d(2)
        self.encoder4 = block(f3, f4, 1)
        self.pool4 = nn.MaxPool3d(2)
        self.encoder5 = block(f4, f5, 1)

        self.up4 = nn.ConvTranspose3d(f5, f4, kernel_size=2, stride=2)
        self.decoder4 = block(2 * f4, f4, 1)
        self.up3 = nn.ConvTranspose3d(f4, f3, kernel_size=2, stride=2)
        self.decoder3 = block(2 * f3, f3, 1)
        self.up2 = nn.ConvTranspose3d(f3, f2, kernel_size=2, stride=2)
        self.decoder2 = block(2 * f2, f2, 1)
        self.up1 = nn.ConvTranspose3d(f2, f1, kernel_size=2, stride=2)
        self.decoder1 = block(2 * f1, f1, 1)

        self.head = nn.Sequential()
        if stem_stride == 2:
            half = max(1, f1 // 2)
            self.head.add_module("up", nn.ConvTranspose3d(f1, half, kernel_size=2, stride=2))
            self.head.add_module("act", activation())
            f1 = half
        self.logits = nn.Conv3d(f1, out_channels, kernel_size=1)
        self.coarse_logits = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(width, out_channels, kernel_size=1),
                nn.Upsample(scale_factor=stem_stride * 2**level, mode="trilinear"),
            )
            for level, width in enumerate((f2, f3, f4)[:deep_supervision], start=1)
        )

        self._smallest = 2 if any(isinstance(child, nn.InstanceNorm3d) for child in self.modules()) else 1
        self.apply(_initialise)
        self.register_forward_pre_hook(_check_images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, heads * out_channels, D, H, W) of images (B, in_channels, D, H, W)."""
        skip1 = self.encoder1(images)
        skip2 = self.encoder2(self.pool1(skip1))
        skip3 = self.encoder3(self.pool2(skip2))
        skip4 = self.encoder4(self.pool3(skip3))
        x = self.encoder5(self.pool4(skip4))
        level4 = self.decoder4(torch.cat([skip4, self.up4(x)], dim=1))
        level3 = self.decoder3(torch.cat([skip3, self.up3(level4)], dim=1))
        level2 = self.decoder2(torch.cat([skip2, self.up2(level3)], dim=1))
        level1 = self.decoder1(torch.cat([skip1, self.up1(level2)], dim=1))
        logits: Tensor = self.logits(self.head(level1))
        if len(self.coarse_logits) == 0:
            return logits
        levels = (level2, level3, level4)
        coarse = [head(level) for head, level in zip(self.coarse_logits, levels, strict=False)]
        return torch.cat([logits, *coarse], dim=1)

    def check_input(self, shape: Sequence[int]) -> None:
        """Refuse a shape of images that the network cannot take; `forward` does not look, so that it can be traced.

        Raises:
            ConfigError: not (B, in_channels, D, H, W), or D, H, W no multiples of `divisor`, or too small to normalise.
        """
        shape = tuple(shape)
        if len(shape) != 5:
            raise ConfigError(f"images of shape {shape} are not (batch, channels, depth, height, width)")
        check_sides("images", shape[2:], self.divisor)
        if math.prod(shape[2:]) < self._smallest * self.divisor**3:
            raise ConfigError(
                f"images of size {shape[2:]} leave a single voxel at the coarsest level, which instance norm cannot "
                f"normalise; make one size {2 * self.divisor}, or choose norm='group'"
            )


def _initialise(module: nn.Module) -> None:
    """Kaiming's initialisation; a transposed convolution without overlap and activation keeps the variance instead."""
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, a=NEGATIVE_SLOPE, nonlinearity="leaky_relu")
    elif isinstance(module, nn.ConvTranspose3d):
        nn.init.normal_(module.weight, std=module.in_channels**-0.5)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _check_images(network: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Before a plain call: a clear message instead of one about the sizes of a concatenation. Tracers pass proxies."""
    assert isinstance(network, UShape)
    if inputs and type(inputs[0]) is Tensor and not torch.compiler.is_compiling():
        network.check_input(inputs[0].shape)
