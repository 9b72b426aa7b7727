"""Running a plan: the engine, its transfers, and the launcher of its workers."""

from lamp3d.parallel.engine import Engine
from lamp3d.parallel.launch import launch
from lamp3d.parallel.loss import mean_over_cases

__all__ = ["Engine", "launch", "mean_over_cases"]
