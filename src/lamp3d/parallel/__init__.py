"""Running a plan: the engine, its transfers, and the launcher of its workers."""

from lamp3d.parallel.engine import Engine
from lamp3d.parallel.launch import launch

__all__ = ["Engine", "launch"]
