"""Plain segmentation networks, which know nothing of devices."""

from lamp3d.nets.hollow import hollow
from lamp3d.nets.others import Wrapped, from_function, from_monai, made_by
from lamp3d.nets.seunet import SEUNet
from lamp3d.nets.unet import UNet
from lamp3d.nets.ushape import NormName, UShape

Network = UNet | SEUNet | Wrapped
"""What an experiment can train."""

__all__ = [
    "Network",
    "NormName",
    "SEUNet",
    "UNet",
    "UShape",
    "Wrapped",
    "from_function",
    "from_monai",
    "hollow",
    "made_by",
]
