"""The report: figures, words and one self-contained HTML page."""

from contextlab.report.compress import compress_table, compress_words, kept_table, quality_against_bytes
from contextlab.report.figures import by_split, cost_by_length, curve, quality_against_state, training_curves
from contextlab.report.page import build_report, write_compress_page, write_cost_figure
from contextlab.report.suite import suite_table
from contextlab.report.summary import summary_table, summary_words

__all__ = [
    "build_report",
    "by_split",
    "compress_table",
    "compress_words",
    "cost_by_length",
    "curve",
    "kept_table",
    "quality_against_bytes",
    "quality_against_state",
    "suite_table",
    "summary_table",
    "summary_words",
    "training_curves",
    "write_compress_page",
    "write_cost_figure",
]
