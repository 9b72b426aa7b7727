"""What a run came to, for people: a self-contained page, and pictures that stand alone."""

from lamp3d.report.cells import cells_picture
from lamp3d.report.figures import plan_picture, time_line_picture
from lamp3d.report.overlay import overlay_picture
from lamp3d.report.page import write_report

__all__ = ["cells_picture", "overlay_picture", "plan_picture", "time_line_picture", "write_report"]
