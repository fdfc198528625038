"""Experiments: specs, recipes, runs."""

from typing import TYPE_CHECKING

from contextlab.experiments.models import find_model, find_own_model
from contextlab.experiments.recipes import find_recipe, load_recipe, quick_form, recipes
from contextlab.experiments.run import Run, evaluate_run, open_run, run
from contextlab.experiments.spec import ExperimentSpec, ModelEntry, MultiTaskEntry, TaskEntry
from contextlab.lazy import modules_on_demand
from contextlab.plugins import load_plugins

if not TYPE_CHECKING:  # else mypy would take any name
    __getattr__ = modules_on_demand(__name__, __path__)

__all__ = [
    "ExperimentSpec",
    "ModelEntry",
    "MultiTaskEntry",
    "Run",
    "TaskEntry",
    "evaluate_run",
    "find_model",
    "find_own_model",
    "find_recipe",
    "load_plugins",
    "load_recipe",
    "open_run",
    "quick_form",
    "recipes",
    "run",
]
