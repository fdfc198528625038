"""Claim: a paper's sentence, the experiment that tests it here, and the predicate that decides. One YAML a claim."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from contextlab.claims.measures import Measure, MeasureEntry
from contextlab.claims.predicate import Quantity, Sum
from contextlab.errors import InputError, unknown
from contextlab.evaluation.spec import EvaluateSpec
from contextlab.experiments import ExperimentSpec
from contextlab.experiments.entries import Name
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
    recipe: keys of an ExperimentSpec, which takes at most ten minutes of two cores; empty where nothing is trained.
    measures: what is taken beside the recipe's results, or in their place: name -> a measure with its options.
    predicate: what is held to which bounds; all must hold.
    control: changes of the recipe, as `--set` takes them, under which the predicate must fail; those of `measures.`
        are of the measures.
    gpu: changes of the recipe for a larger form, for a GPU; empty where there is none.
    changes: how the predicate was changed after a full run, and why; empty where it never was.
    analysis: why it fails here, where it does.
    """

    paper: str
    sentence: str
    published: str
    scaled: str
    recipe: dict[str, Any] = Field(default_factory=dict)
    measures: dict[Name, MeasureEntry] = Field(default_factory=dict)
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
        if spec is None and not self.measures:
            raise InputError("expected a recipe or measures, as there is nothing to decide by")
        tasks = spec.tasks if spec is not None else {}
        for name in self.measures:
            if name in tasks:
                raise InputError(f"measures.{name}: a task of the recipe has this name, too; choose another")
        told_of = {name: _names(made, spec, f"measures.{name}.options") for name, made in self.measured().items()}
        for place, quantity in enumerate(self.predicate):
            for key, part in quantity.sums().items():
                path, of = ".".join(filter(None, (f"predicate.{place}", key))), str(part.task)
                if of in told_of:
                    known, of_what = told_of[of], f"name of measure {of}"
                elif spec is not None and of in tasks:
                    known, of_what = [*_models(spec), *spec.build_task(of).learners()], "model or learner"
                    _check_split(part, _splits(spec, of), path)
                else:
                    kind = "task of the recipe or measure" if self.measures else "task of the recipe"
                    raise InputError(f"{path}.task: {unknown(kind, of, [*tasks, *told_of])}")
                for who in part.weights or ():
                    if who not in known:
                        raise InputError(f"{path}.weights: {unknown(of_what, who, known)}")
        return self

    def data(self, budget: Budget = "quick", changes: Sequence[str] = ()) -> dict[str, Any]:
        """The recipe as plain data, in the form of a budget, with changes as `--set` takes them; empty: there is none.

        Those whose key begins with `measures.` change the measures (`measured`).
        """
        return self._changed(budget, changes)[0]

    def measured(self, budget: Budget = "quick", changes: Sequence[str] = ()) -> dict[str, Measure]:
        """The measures by name, likewise. Raises InputError with the key's path where one cannot be."""
        entries = self._changed(budget, changes)[1]
        return {name: MeasureEntry.parse(each, f"measures.{name}").build(f"measures.{name}") for name, each in entries}

    def _changed(self, budget: Budget, changes: Sequence[str]) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
        value = deepcopy(self.recipe)
        beside = {"measures": {name: each.model_dump(mode="json") for name, each in self.measures.items()}}
        for change in (*(self.gpu if budget == "gpu" else ()), *changes):
            set_key(beside if change.startswith("measures.") else value, change)
        measures = list(beside["measures"].items())
        return ({"name": self._name or "claim", "description": self.sentence, **value} if value else {}), measures

    def experiment(self, budget: Budget = "quick", changes: Sequence[str] = ()) -> ExperimentSpec | None:
        """The recipe; None where there is none.

        Raises InputError with the key's path where it cannot be, and where there is no such form.
        """
        if budget == "gpu" and not self.gpu:
            raise InputError(f"claim {self._name} has no form for a GPU; expected --budget quick")
        data = self.data(budget, changes)
        return ExperimentSpec.parse(data, "recipe") if data else None


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
    """The splits that an experiment measures a task on, and what it counts of its models ("cost")."""
    chosen: EvaluateSpec = spec.evaluate_spec(task)
    return [*(chosen.splits or spec.build_task(task).splits()), "cost"]


def _check_split(part: Sum, splits: list[str], path: str) -> None:
    """Raises InputError where a sum asks for a split that is not measured; with a slope along lengths for a pattern."""
    wanted = str(part.split)
    if wanted not in splits and not (part.slope == "length" and fnmatch.filter(splits, wanted)):
        raise InputError(f"{path}.split: {unknown('split that the recipe measures', wanted, splits)}")


def _names(made: Measure, spec: ExperimentSpec | None, path: str) -> list[str]:
    """What a measure tells of. Raises InputError with the key's path."""
    try:
        return list(made.names(spec))
    except InputError as error:
        raise InputError(f"{path}.{error}") from None
