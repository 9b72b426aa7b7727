"""Who does what: profile the cells, cut them optimally, predict the step, write it down as a plan."""

from lamp3d.plan.plan import Plan, StagePlan, format_bytes, parse_bytes
from lamp3d.plan.planner import make_plan
from lamp3d.plan.schedule import SCHEDULES, Action

__all__ = ["SCHEDULES", "Action", "Plan", "StagePlan", "format_bytes", "make_plan", "parse_bytes"]
