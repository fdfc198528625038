"""Claim: a paper's sentence, the experiment that tests it here, and the predicate that decides. One YAML a claim."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from contextlab.claims.predicate import Quantity
from contextlab.errors import InputError, unknown
from contextlab.evaluation.spec import EvaluateSpec
from contextlab.experiments import ExperimentSpec
from contextlab.experiments.recipes import read_yaml, set_key
from contextlab.files import present
from contextlab.spec import Spec

Budget = Literal["quick", "gpu"]
BUDGETS: tuple[Budget, ...] = ("quick", "gpu")


class Claim(Spec):
    """What a paper says, as an experiment that can fail.

    paper: its id in the index of papers.
    sentence: what it claims, in our words, with its figure.
    published: where in the paper, and what is printed there.
    scaled: what is smaller here, and why the essence survives.
    recipe: keys of an ExperimentSpec, which takes at most ten minutes of two cores.
    predicate: what is held to which bounds; all must hold.
    control: changes of the recipe, as `--set` takes them, under which the predicate must fail.
    gpu: changes of the recipe for a larger form, for a GPU; empty where there is none.
    changes: how the predicate was changed after a full run, and why; empty where it never was.
    analysis: why it fails here, where it does.
    """

    paper: str
    sentence: str
    published: str
    scaled: str
    recipe: dict[str, Any]
    predicate: tuple[Quantity, ...] = Field(min_length=1)
    control: tuple[str, ...] = Field(min_length=1)
    gpu: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    analysis: str = ""
    _name: str = PrivateAttr("")

    @property
    def name(self) -> str:
        """That of its file."""
        return self._name

    @model_validator(mode="after")
    def _measures_what_it_asks(self) -> Claim:
        spec = self.experiment()
        for place, quantity in enumerate(self.predicate):
            path = f"predicate.{place}"
            if quantity.task not in spec.tasks:
                raise InputError(f"{path}.task: {unknown('task of the recipe', quantity.task, spec.tasks)}")
            task = spec.build_task(quantity.task)
            predictors = {*_models(spec), *task.learners()}
            for who in quantity.weights:
                if who not in predictors:
                    raise InputError(f"{path}.weights: {unknown('model or learner', who, predictors)}")
            splits = _splits(spec, quantity.task)
            if quantity.split not in splits:
                raise InputError(f"{path}.split: {unknown('split that the recipe measures', quantity.split, splits)}")
        return self

    def data(self, budget: Budget = "quick", changes: Sequence[str] = ()) -> dict[str, Any]:
        """The recipe as plain data, in the form of a budget, with changes as `--set` takes them."""
        value = deepcopy(self.recipe)
        for change in (*(self.gpu if budget == "gpu" else ()), *changes):
            set_key(value, change)
        return {"name": self._name or "claim", "description": self.sentence, **value}

    def experiment(self, budget: Budget = "quick", changes: Sequence[str] = ()) -> ExperimentSpec:
        """The recipe. Raises InputError with the key's path where it cannot be, and where there is no such form."""
        if budget == "gpu" and not self.gpu:
            raise InputError(f"claim {self._name} has no form for a GPU; expected --budget quick")
        return ExperimentSpec.parse(self.data(budget, changes), "recipe")


def claim_files() -> dict[str, Path]:
    """The file of each claim that comes with contextlab, by name."""
    folder = Path(str(resources.files("contextlab.claims")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_claim(name_or_path: str | Path) -> Claim:
    """The claim of that name, or in that file. Raises InputError with the nearest name, or the path of a wrong key."""
    known = claim_files()
    path = known.get(str(name_or_path), Path(name_or_path))
    if str(name_or_path) not in known and (path.suffix not in (".yaml", ".yml") or not present(path)):
        raise InputError(unknown("claim", str(name_or_path), known))
    claim = Claim.parse(read_yaml(path), "")
    claim._name = path.stem
    return claim


def _models(spec: ExperimentSpec) -> list[str]:
    """Names of models in the results of an experiment."""
    return [job.model for job in spec.measured()]


def _splits(spec: ExperimentSpec, task: str) -> list[str]:
    """The splits that an experiment measures a task on."""
    chosen: EvaluateSpec = spec.evaluate_spec(task)
    return list(chosen.splits or spec.build_task(task).splits())
