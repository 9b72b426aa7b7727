"""MONAI's 3D networks, unmodified and tiny."""

from collections.abc import Callable, Iterator

from monai.networks import nets
from torch import nn

Make = Callable[[], nn.Module]

WIDTHS = (4, 4, 8, 8, 8, 4)

NETWORKS: dict[str, tuple[Make, int | tuple[int, int, int]]] = {
    "UNet": (lambda: nets.UNet(3, 1, 2, (2, 4, 8), (2, 2), num_res_units=1), 16),
    "BasicUNet": (lambda: nets.BasicUNet(3, 1, 2, features=WIDTHS), (16, 32, 16)),
    "DynUNet": (lambda: nets.DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[2, 4, 8]), 16),
    "DynUNet, deep supervision": (
        lambda: nets.DynUNet(
            3, 1, 2, [3, 3, 3, 3], [1, 2, 2, 2], [2, 2, 2], filters=[2, 4, 8, 8], deep_supervision=True,
            deep_supr_num=2,
        ),
        16,
    ),
    "SegResNet": (lambda: nets.SegResNet(3, 8, 1, 2, blocks_down=(1, 1, 1), blocks_up=(1, 1)), 8),
    "SegResNetDS": (lambda: nets.SegResNetDS(3, 8, 1, 2, blocks_down=(1, 1, 1), dsdepth=2, norm="INSTANCE"), 16),
    "VNet": (lambda: nets.VNet(3, 1, 2), 16),
    "AttentionUnet": (lambda: nets.AttentionUnet(3, 1, 2, (2, 4, 8), (2, 2)), 16),
    "BasicUNetPlusPlus": (lambda: nets.BasicUNetPlusPlus(3, 1, 2, features=WIDTHS), (16, 16, 32)),
    "MedNeXt": (lambda: nets.MedNeXt(3, 4, 1, 2, 2, 2, kernel_size=5), (32, 16, 16)),
    "UNETR": (lambda: nets.UNETR(1, 2, (32, 32, 32), feature_size=4, hidden_size=24, mlp_dim=24, num_heads=2), 32),
    "SwinUNETR": (
        lambda: nets.SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
        (64, 32, 32),
    ),
}  # fmt: skip
"""How to make each, and the side or sides of a volume that it takes, the longest where tests cut it into slabs."""


def networks_on(devices: int, *, full: bool) -> Iterator[tuple[int, str]]:
    """Numbers and names of those that are tried on so many devices: all, or every second one."""
    return ((number, name) for number, name in enumerate(NETWORKS) if full or (number + devices) % 2 == 0)
