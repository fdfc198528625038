"""Constructions: weights, written down rather than trained, of models that carry out known algorithms.

Each is a model by name (`contextlab list models --family construction`) that equals a learner at every prefix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from contextlab.constructions.base import Construction, construction
from contextlab.constructions.copying import CopyConstruction
from contextlab.constructions.gradient import GradientDescentConstruction, PreconditionedConstruction
from contextlab.constructions.lookup import InductionConstruction
from contextlab.constructions.machine import SubleqConstruction
from contextlab.constructions.second_order import GradientDescentPlusPlusConstruction, NewtonConstruction
from contextlab.constructions.selection import ModelSelectionConstruction
from contextlab.constructions.softmax import KernelSmootherConstruction, NearestNeighbourConstruction
from contextlab.lazy import modules_on_demand

if not TYPE_CHECKING:  # else mypy would take any name
    __getattr__ = modules_on_demand(__name__, __path__)

__all__ = [
    "Construction",
    "CopyConstruction",
    "GradientDescentConstruction",
    "GradientDescentPlusPlusConstruction",
    "InductionConstruction",
    "KernelSmootherConstruction",
    "ModelSelectionConstruction",
    "NearestNeighbourConstruction",
    "NewtonConstruction",
    "PreconditionedConstruction",
    "SubleqConstruction",
    "construction",
]
