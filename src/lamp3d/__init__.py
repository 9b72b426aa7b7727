"""Large 3D segmentation networks on whole volumes: automated model parallelism for PyTorch."""

from lamp3d.errors import LampError
from lamp3d.nets import SEUNet, UNet
from lamp3d.parallel import Engine, launch, mean_over_cases
from lamp3d.plan import Plan, make_plan

__version__ = "0.1.0"
__all__ = ["Engine", "LampError", "Plan", "SEUNet", "UNet", "__version__", "launch", "make_plan", "mean_over_cases"]
