"""The U-Net with squeeze-and-excitation residual blocks (AnatomyNet, Zhu et al. 2019)."""

from collections.abc import Sequence
from typing import Literal, final

from torch import Tensor, nn

from lamp3d.errors import ConfigError
from lamp3d.nets.ushape import NormFactory, NormName, UShape, activation, convolution, norm_factory


@final
class SEResidualBlock(nn.Module):
    """Two convolutions whose channels are re-weighted by what the whole volume looks like, around a shortcut.

    AnatomyNet squeezes the output of the second norm. Behind an instance norm its mean would be the norm's own bias,
    the same for every image, so the squeeze reads what goes into that norm. With a batch norm the two are the same
    function, since the first layer of the gate absorbs the norm's scale and shift.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: NormFactory, se_reduction: int) -> None:
        super().__init__()
        hidden = max(1, out_channels // se_reduction)
        self.conv1 = convolution(in_channels, out_channels, stride)
        self.norm1 = norm(out_channels)
        self.act1 = activation()
        self.conv2 = convolution(out_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.squeeze = nn.AdaptiveAvgPool3d(1)
        self.reduce = nn.Conv3d(out_channels, hidden, kernel_size=1)
        self.act_gate = activation()
        self.expand = nn.Conv3d(hidden, out_channels, kernel_size=1)
        self.gate = nn.Sigmoid()
        self.shortcut = nn.Sequential()
        if in_channels != out_channels or stride != 1:
            project = nn.Conv3d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
            self.shortcut.add_module("conv", project)
            self.shortcut.add_module("norm", norm(out_channels))
        self.act2 = activation()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, D, H, W) -> (B, out_channels, D / stride, H / stride, W / stride)."""
        features = self.conv2(self.act1(self.norm1(self.conv1(x))))
        gate = self.gate(self.expand(self.act_gate(self.reduce(self.squeeze(features)))))
        out: Tensor = self.act2(self.norm2(features) * gate + self.shortcut(x))
        return out


@final
class SEUNet(UShape):
    """The U-Net of squeeze-and-excitation residual blocks, as in AnatomyNet, at four levels (paper §3).

    With one input and ten output channels it has 23,040,418, 92,137,274 and 368,500,330 parameters for f = 32, 64, 128.

    Args:
        in_channels: channels of the images (1 for CT).
        out_channels: channels of the logits, the background included.
        filters: channels f of the first block, where the following have 2f, 4f, 8f, 16f; or those of all five levels.
        norm: `instance`, `batch`, or `group` (up to eight groups).
        stem_stride: 2 works at half the resolution inside, as the paper's released code does.
        max_filters: upper limit of the channels of any block, None for no limit.
        deep_supervision: how many coarser decoder levels give logits too, 0 to 3; see `UShape`.
        se_reduction: the gate's hidden layer has one unit for this many channels, and at least one.

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
        se_reduction: int = 8,
    ) -> None:
        if se_reduction < 1:
            raise ConfigError(f"se_reduction={se_reduction} must be at least 1")
        factory = norm_factory(norm)

        def block(inputs: int, outputs: int, stride: int) -> SEResidualBlock:
            return SEResidualBlock(inputs, outputs, stride, factory, se_reduction)

        super().__init__(in_channels, out_channels, filters, block, stem_stride, max_filters, deep_supervision)
