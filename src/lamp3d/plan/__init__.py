"""Who does what: profile the cells, cut them optimally, predict the step, write it down as a plan."""

from lamp3d.plan.amounts import counted, format_bytes, parse_bytes
from lamp3d.plan.choice import Planning
from lamp3d.plan.plan import DevicePlan, Plan, StagePlan, check_schedule
from lamp3d.plan.planner import find_plans, make_plan
from lamp3d.plan.schedule import SCHEDULES, Action
from lamp3d.plan.simulate import TimeLine

__all__ = [
    "SCHEDULES",
    "Action",
    "DevicePlan",
    "Plan",
    "Planning",
    "StagePlan",
    "TimeLine",
    "check_schedule",
    "counted",
    "find_plans",
    "format_bytes",
    "make_plan",
    "parse_bytes",
]
