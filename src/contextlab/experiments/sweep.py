"""SweepSpec: at which values of its fields a model is trained, as data, and the settings that are tried.

For the paths of fields see `experiments.paths`. A trial is one setting, path -> value; its number is its place among
the settings.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from contextlab.errors import InputError, nearest
from contextlab.experiments.halving import HalvingSpec
from contextlab.experiments.paths import Setting, flatten, has, place
from contextlab.experiments.tied import TIED, TiedSpec, check_ties, own_ties
from contextlab.experiments.values import MOST_TRIALS, SHAPES, Values
from contextlab.spec import Spec, describe
from contextlab.training.validation import ValidationSpec

MOST_DRAWS = 100
"""For each setting that is wanted: values are rounded, so that a narrow range has few."""


class SweepSpec(Spec):
    """At which values each model is trained. The best on validation prompts is then measured as any model is.

    over: path -> values: `train.KEY`; `options.KEY` of every model that has such an option; `spec.KEY` of ModelSpec;
        each with `models.NAME.` before it of one model. Levels do as well: `{train: {steps: [100, 200]}}`.
    tied: path -> the swept field that its value follows, for example `{train.matrix_learning_rate: {to:
        train.learning_rate, times: 6.67}}`; the field itself is no axis of the sweep.
    sampler: "grid" tries every combination; "random" draws `trials` of them; Optuna's "tpe" (tree-structured Parzen
        estimators, 1012.2599) and "gp" (Gaussian processes) choose each by the scores of those before it.
    trials: of each model on each task, where they are drawn.
    seed: of what is drawn; all models draw the same.
    validation: the prompts by which the best is chosen; never those of training or of `evaluate`.
    halving: drops trials before their end, of a grid or of random ones; true takes its defaults, null drops none.
    """

    over: dict[str, Values] = Field(default_factory=dict)
    tied: dict[str, TiedSpec] = Field(default_factory=dict)
    sampler: Literal["grid", "random", "tpe", "gp"] = "grid"
    trials: Annotated[int, Field(ge=1, le=MOST_TRIALS)] | None = None
    seed: NonNegativeInt = 0
    validation: ValidationSpec = Field(default_factory=ValidationSpec)
    halving: HalvingSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _paths(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            flat = {
                key: flatten(data[key], leaves=leaves, where=key)
                for key, leaves in (("over", SHAPES), ("tied", TIED))
                if isinstance(data.get(key), Mapping)
            }
            return {**data, **flat}
        return data

    @field_validator("halving", mode="before")
    @classmethod
    def _on_or_off(cls, data: Any) -> Any:
        return ({} if data else None) if isinstance(data, bool) else data

    @model_validator(mode="after")
    def _possible(self) -> SweepSpec:
        if self.sampler == "grid" and self.trials is not None:
            raise InputError(
                f"trials: a grid tries every combination; leave it out, or set sampler to random to draw {self.trials}"
            )
        if self.sampler != "grid" and self.trials is None:
            raise InputError(f"trials: required by sampler {self.sampler!r}: how many settings to draw, for example 16")
        if self.halving is not None and self.adaptive:
            raise InputError(
                f"halving: sampler {self.sampler!r} goes by scores at the end of training, which halving does not wait "
                "for; expected sampler grid or random, or halving null"
            )
        for one, other in itertools.permutations(self.over, 2):
            if f"{place(other)}.".startswith(f"{place(one)}."):
                raise InputError(
                    f"over.{other}: {one} is swept too, and one would undo the other; expected one of them"
                )
        check_ties(self.over, self.tied)
        for path, values in self.over.items():
            try:
                points = values.points()
            except InputError as error:
                raise InputError(f"over.{path}: {error}") from None
            if points is None and self.sampler == "grid":
                raise InputError(f"over.{path}: a grid needs n, the number of points, for example n: 5")
        return self

    def ties(self, setting: Setting) -> Setting:
        """The values of the tied fields at a setting, path -> value."""
        return {path: tie.value(setting[tie.to]) for path, tie in self.tied.items() if tie.to in setting}

    def settings(self) -> list[Setting]:
        """Every trial's setting, in order; where a sampler chooses them by others' scores, such as it may choose.

        Raises InputError where there are too many, or too few to draw from.
        """
        if not self.over:  # nothing to draw, however many trials others have
            return [{}]
        points = [values.points() for values in self.over.values()]
        counted = [len(each) for each in points if each is not None]
        size = math.prod(counted) if len(counted) == len(points) else math.inf
        if self.sampler == "grid":
            if size > MOST_TRIALS:
                raise InputError(f"a grid of {size:,} trials for each model; expected at most {MOST_TRIALS:,}")
            product = itertools.product(*(each or [] for each in points))
            return [dict(zip(self.over, combination, strict=True)) for combination in product]
        assert self.trials is not None
        if self.adaptive:
            return [self._stand_in(number, points) for number in range(self.trials)]
        if self.trials > size:
            raise InputError(f"trials: {self.trials}, but there are only {size} different settings; use sampler grid")
        source = random.Random(self.seed)
        found: dict[str, Setting] = {}
        for _ in range(MOST_DRAWS * self.trials):
            if len(found) == self.trials:
                break
            setting = {path: values.draw(source) for path, values in self.over.items()}
            found.setdefault(json.dumps(setting, default=str), setting)
        if len(found) < self.trials:
            raise InputError(
                f"trials: {self.trials}, but only {len(found)} different settings were drawn; widen the ranges, or set "
                f"trials to at most {len(found)}"
            )
        return list(found.values())

    @property
    def adaptive(self) -> bool:
        """Whether each trial is chosen by the scores of those before it."""
        return self.sampler not in ("grid", "random")

    def _stand_in(self, number: int, points: Sequence[list[Any] | None]) -> Setting:
        """Every value of a list and both ends of a range come up, so that what is impossible is found beforehand."""
        ends = [
            each if each is not None else list(values.ends)
            for each, values in zip(points, self.over.values(), strict=True)
        ]
        return {path: each[number % len(each)] for path, each in zip(self.over, ends, strict=True)}


def own_sweep(top: SweepSpec | None, changes: Mapping[str, Any], name: str, knows: Callable[[str], bool]) -> SweepSpec:
    """The sweep of one model: that of all, as its own changes and extends it. It may have no field: then it is none.

    top: of the experiment. changes: of the model's entry; a path with null is swept no more.
    name: of the model. knows: whether it has an option; what it lacks is not swept, and what it ties to what this
        model does not sweep is not tied.
    """
    general = {} if top is None else top.over
    mine = f"models.{name}."
    over: dict[str, Any] = {
        path: values for path, values in general.items() if not path.startswith("models.") and has(path, knows)
    }
    over |= {path.removeprefix(mine): values for path, values in general.items() if path.startswith(mine)}
    given = changes.get("over") or {}
    if not isinstance(given, Mapping):
        raise InputError(f"models.{name}.sweep.over: expected a mapping from paths to values, got {describe(given)}")
    own = flatten(given)
    for path, values in own.items():
        if values is None and path not in (*general, *over):
            near = nearest(path, over)
            hint = f"; did you mean {near!r}?" if near else ""
            raise InputError(f"models.{name}.sweep.over.{path}: null takes a field away, but it is not swept{hint}")
    over |= own
    kept = {path: values for path, values in over.items() if values is not None}
    base = {} if top is None else top.model_dump(exclude_unset=True)
    tied = own_ties({} if top is None else top.tied, changes.get("tied") or {}, name, kept, knows)
    return SweepSpec.parse({**base, **changes, "over": kept, "tied": tied}, f"models.{name}.sweep")
