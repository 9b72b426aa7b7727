"""The paper's U-Net (§2.2)."""

from collections.abc import Sequence
from typing import Literal, final

from torch import Tensor, nn

from lamp3d.nets.ushape import NormFactory, NormName, UShape, activation, convolution, norm_factory


@final
class ConvBlock(nn.Module):
    """Two 3x3x3 convolutions, each followed by a norm and LeakyReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, out_channels, stride)
        self.norm1 = norm(out_channels)
        self.act1 = activation()
        self.conv2 = convolution(out_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.act2 = activation()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, D, H, W) -> (B, out_channels, D / stride, H / stride, W / stride)."""
        x = self.act1(self.norm1(self.conv1(x)))
        x = self.act2(self.norm2(self.conv2(x)))
        return x


@final
class UNet(UShape):
    """The paper's U-Net: five encoder and four decoder blocks of two convolutions, concatenated skips (§2.2).

    With one input and ten output channels it has 22,578,570, 90,299,146 and 361,166,346 parameters for f = 32, 64, 128.

    Args:
        in_channels: channels of the images (1 for CT).
        out_channels: channels of the logits, the background included.
        filters: channels f of the first block, where the following have 2f, 4f, 8f, 16f; or those of all five levels.
        norm: `instance`, `batch`, or `group` (up to eight groups).
        stem_stride: 2 works at half the resolution inside, as the paper's released code does.
        max_filters: upper limit of the channels of any block, None for no limit.
        deep_supervision: how many coarser decoder levels give logits too, 0 to 3; see `UShape`.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        filters: int | Sequence[int] = 32,
        norm: NormName = "instance",
        stem_stride: Literal[1, 2] = 1,
        max_filters: int | None = None,
        deep_supervision: int = 0,
    ) -> None:
        factory = norm_factory(norm)

        def block(inputs: int, outputs: int, stride: int) -> ConvBlock:
            return ConvBlock(inputs, outputs, stride, factory)

        super().__init__(in_channels, out_channels, filters, block, stem_stride, max_filters, deep_supervision)
