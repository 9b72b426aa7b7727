"""Studies: many runs of one question, resumable, and the tables and the figure that answer it."""

from lamp3d.study.config import Row, StudyConfig, load_study
from lamp3d.study.driver import plan_study, run_study, score_test_split, time_predictions
from lamp3d.study.report import write_study_report
from lamp3d.study.result import RunResult, read_results

__all__ = [
    "Row",
    "RunResult",
    "StudyConfig",
    "load_study",
    "plan_study",
    "read_results",
    "run_study",
    "score_test_split",
    "time_predictions",
    "write_study_report",
]
