"""Plain segmentation networks, which know nothing of devices."""

from lamp3d.nets.from_monai import FromMonai
from lamp3d.nets.hollow import hollow
from lamp3d.nets.seunet import SEUNet
from lamp3d.nets.unet import UNet
from lamp3d.nets.ushape import NormName, UShape

Network = UNet | SEUNet | FromMonai
"""What an experiment can train."""

__all__ = ["FromMonai", "Network", "NormName", "SEUNet", "UNet", "UShape", "hollow"]
