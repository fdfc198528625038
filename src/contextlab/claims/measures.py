"""Measures: what a claim can take beside the results of its recipe, by name, with options; each gives a tidy table.

A measure is a frozen dataclass of its options. It says which names its table tells of, and of which kind the table is
(`cells.Kind`); quantities are taken from it as from a task's results.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pandas as pd
import torch
from pydantic import Field, ValidationError

from contextlab.claims.cells import Kind, Table
from contextlab.errors import InputError, unknown
from contextlab.evaluation.results import table
from contextlab.experiments import ExperimentSpec, Run
from contextlab.experiments.entries import ModelEntry
from contextlab.models import ModelSpec, preset
from contextlab.registry import Entry
from contextlab.spec import Spec

if TYPE_CHECKING:
    from contextlab.models import Model

M = TypeVar("M", bound="type[Measure]")


class Measure(ABC):
    """Base of measures."""

    kind: ClassVar[Kind]
    of_run: ClassVar[bool] = False
    """Whether it reads what the recipe's run left; else it is kept, and not taken again where it is asked anew."""

    @abstractmethod
    def names(self, spec: ExperimentSpec | None) -> Sequence[str]:
        """What the table tells of. Raises InputError where the options do not fit the claim's recipe."""

    @abstractmethod
    def rows(self, run: Run | None, device: torch.device) -> pd.DataFrame:
        """Measure: a tidy table, whose `model` is the name and whose `seed` is the training, the turn or the draw."""

    def table(self, rows: pd.DataFrame) -> Table:
        """What quantities are taken from."""
        return Table(rows, self.kind)


class MeasureEntry(Spec):
    """A measure of a claim.

    measure: its name, one of `MEASURES`.
    options: its own.
    """

    measure: str
    options: dict[str, Any] = Field(default_factory=dict)

    def build(self, path: str) -> Measure:
        """The measure. Raises InputError with the key's path."""
        if self.measure not in MEASURES:
            raise InputError(f"{path}.measure: {unknown('measure', self.measure, MEASURES)}")
        entry = MEASURES[self.measure]
        try:
            made: Measure = entry.factory(**entry.check(self.options, path=f"{path}.options"))
        except TypeError:
            entry.check(self.options, path=f"{path}.options")
            raise
        except InputError as error:
            told = str(error)
            raise InputError(told if path in told else f"{path}.options: {told}") from None
        return made


MEASURES: dict[str, Entry] = {}
"""Every measure by name."""


def measure(name: str) -> Callable[[M], M]:
    """Decorator: make a measure known as `name`."""

    def add(made: M) -> M:
        MEASURES[name] = Entry("measure", name, made)
        return made

    return add


def spec_of(model: Mapping[str, Any], path: str) -> ModelSpec:
    """The ModelSpec of a model that is given as in a recipe: {preset, options} or {spec}.

    Raises InputError with the key's path.
    """
    entry = ModelEntry.parse(model, path)
    if entry.source is not None:
        raise InputError(f"{path}.from: a measure takes models that are not trained; give preset or spec")
    try:
        return preset(entry.preset, **entry.options) if entry.preset is not None else ModelSpec.parse(entry.spec)
    except (InputError, ValidationError) as error:
        raise InputError(f"{path}: {error}") from None


def built(models: Mapping[str, Mapping[str, Any]], device: torch.device) -> dict[str, Model]:
    """The models by name, with weights drawn from seed 0, not in training."""
    from contextlab.models import build_model

    return {name: build_model(spec_of(each, name)).to(device).eval() for name, each in models.items()}


def apart(said: torch.Tensor, wanted: torch.Tensor) -> float:
    """The greatest difference over the greatest size of what is wanted; infinite where something is no number.

    said, wanted: [...] of one shape.
    """
    return float(((said - wanted).abs().max() / wanted.abs().max()).nan_to_num(nan=math.inf))


def told(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The table of rows that have model, seed, metric, value and perhaps length, ci_low, ci_high."""
    return table(
        {"run": "", "kind": "model", "task": "", "split": "train", "n": 1, "ci_low": row["value"],
         "ci_high": row["value"], **row}
        for row in rows
    )  # fmt: skip
