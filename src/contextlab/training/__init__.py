"""Training: `train(model, task, spec)`, its spec and its result, and the step that it repeats."""

from typing import TYPE_CHECKING

from contextlab.lazy import modules_on_demand
from contextlab.training.ensemble import Member, train_together
from contextlab.training.examples import draw_examples
from contextlab.training.run import TrainResult
from contextlab.training.spec import CurriculumSpec, Ia3Spec, LoraSpec, TrainSpec
from contextlab.training.step import TrainState, train_step
from contextlab.training.trainer import train

if not TYPE_CHECKING:  # else mypy would take any name
    __getattr__ = modules_on_demand(__name__, __path__)

__all__ = [
    "CurriculumSpec",
    "Ia3Spec",
    "LoraSpec",
    "Member",
    "TrainResult",
    "TrainSpec",
    "TrainState",
    "draw_examples",
    "train",
    "train_step",
    "train_together",
]
