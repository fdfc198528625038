"""Evaluation: curves, shifts and costs; everything returns a tidy table."""

from typing import TYPE_CHECKING

from contextlab.evaluation.breakdown import breakdown
from contextlab.evaluation.cost import cost, static_cost
from contextlab.evaluation.cost_pair import Timed, time_pair
from contextlab.evaluation.drafting import DraftTimed, time_drafts
from contextlab.evaluation.evaluate import evaluate, evaluate_learners, predict
from contextlab.evaluation.measure import Measured, measure, measure_learners
from contextlab.evaluation.results import COLUMNS, mean_over_shots, read_results, summarise, write_results
from contextlab.evaluation.sample_complexity import sample_complexity
from contextlab.evaluation.similarity import layer_read_outs, matching_steps, similarity
from contextlab.evaluation.spec import CompressSpec, EvaluateSpec
from contextlab.lazy import modules_on_demand

if not TYPE_CHECKING:  # else mypy would take any name
    __getattr__ = modules_on_demand(__name__, __path__)

__all__ = [
    "COLUMNS",
    "CompressSpec",
    "DraftTimed",
    "EvaluateSpec",
    "Measured",
    "Timed",
    "breakdown",
    "cost",
    "evaluate",
    "evaluate_learners",
    "layer_read_outs",
    "matching_steps",
    "mean_over_shots",
    "measure",
    "measure_learners",
    "predict",
    "read_results",
    "sample_complexity",
    "similarity",
    "static_cost",
    "summarise",
    "time_drafts",
    "time_pair",
    "write_results",
]
