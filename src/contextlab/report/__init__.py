"""The report: figures, words and one self-contained HTML page."""

from contextlab.report.figures import by_split, cost_by_length, curve, quality_against_state, training_curves
from contextlab.report.page import build_report, write_cost_figure
from contextlab.report.summary import summary_table, summary_words

__all__ = [
    "build_report",
    "by_split",
    "cost_by_length",
    "curve",
    "quality_against_state",
    "summary_table",
    "summary_words",
    "training_curves",
    "write_cost_figure",
]
