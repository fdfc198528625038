"""The report: figures, words and one self-contained HTML page."""

from typing import TYPE_CHECKING

from contextlab.lazy import modules_on_demand
from contextlab.report.compress import compress_table
from contextlab.report.compress_figure import quality_against_bytes
from contextlab.report.compress_total import weights_words
from contextlab.report.figures import by_split, cost_by_length, curve, quality_against_state, training_curves
from contextlab.report.kept import compress_words, kept_tables, not_served
from contextlab.report.page import build_report, write_compress_page, write_cost_figure
from contextlab.report.sentences import summary_words
from contextlab.report.suite import suite_table
from contextlab.report.summary import summary_table
from contextlab.report.sweep import chosen_table
from contextlab.report.sweep_figure import by_swept_field

if not TYPE_CHECKING:  # else mypy would take any name
    __getattr__ = modules_on_demand(__name__, __path__)

__all__ = [
    "build_report",
    "by_split",
    "by_swept_field",
    "chosen_table",
    "compress_table",
    "compress_words",
    "cost_by_length",
    "curve",
    "kept_tables",
    "not_served",
    "quality_against_bytes",
    "quality_against_state",
    "suite_table",
    "summary_table",
    "summary_words",
    "training_curves",
    "weights_words",
    "write_compress_page",
    "write_cost_figure",
]
