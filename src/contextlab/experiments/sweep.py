"""SweepSpec: at which values of its fields a model is trained, as data, and the settings that are tried.

A path is `train.KEY`, `options.KEY` of a model's preset or spec, or `spec.KEY` of the ModelSpec that they make, such
as `spec.layers.0.options.expand`. A trial is one setting, path -> value; its number is its place among the settings.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, model_validator

from contextlab.errors import InputError, nearest
from contextlab.experiments.values import MOST_TRIALS, SHAPES, Values
from contextlab.models import ModelSpec
from contextlab.spec import Spec, describe
from contextlab.training.spec import TrainSpec
from contextlab.training.validation import ValidationSpec

MOST_DRAWS = 100
"""For each setting that is wanted: values are rounded, so that a narrow range has few."""

Setting = Mapping[str, Any]
"""What one trial changes: path -> value."""


class SweepSpec(Spec):
    """At which values each model is trained. The best on validation prompts is then measured as any model is.

    over: path -> values: `train.KEY`; `options.KEY` of every model that has such an option; `spec.KEY` of ModelSpec;
        each with `models.NAME.` before it of one model. Levels do as well: `{train: {steps: [100, 200]}}`.
    sampler: "grid" tries every combination; "random" draws `trials` of them; Optuna's "tpe" (tree-structured Parzen
        estimators, 1012.2599) and "gp" (Gaussian processes) choose each by the scores of those before it.
    trials: of each model on each task, where they are drawn.
    seed: of what is drawn; all models draw the same.
    validation: the prompts by which the best is chosen; never those of training or of `evaluate`.
    """

    over: dict[str, Values] = Field(default_factory=dict)
    sampler: Literal["grid", "random", "tpe", "gp"] = "grid"
    trials: Annotated[int, Field(ge=1, le=MOST_TRIALS)] | None = None
    seed: NonNegativeInt = 0
    validation: ValidationSpec = Field(default_factory=ValidationSpec)

    @model_validator(mode="before")
    @classmethod
    def _paths(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("over"), Mapping):
            return {**data, "over": flatten(data["over"])}
        return data

    @model_validator(mode="after")
    def _possible(self) -> SweepSpec:
        if self.sampler == "grid" and self.trials is not None:
            raise InputError(
                f"trials: a grid tries every combination; leave it out, or set sampler to random to draw {self.trials}"
            )
        if self.sampler != "grid" and self.trials is None:
            raise InputError(f"trials: required by sampler {self.sampler!r}: how many settings to draw, for example 16")
        for one, other in itertools.permutations(self.over, 2):
            if f"{_place(other)}.".startswith(f"{_place(one)}."):
                raise InputError(
                    f"over.{other}: {one} is swept too, and one would undo the other; expected one of them"
                )
        for path, values in self.over.items():
            try:
                points = values.points()
            except InputError as error:
                raise InputError(f"over.{path}: {error}") from None
            if points is None and self.sampler == "grid":
                raise InputError(f"over.{path}: a grid needs n, the number of points, for example n: 5")
        return self

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


def flatten(over: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Levels of keys as paths: {train: {steps: [1, 2]}} -> {train.steps: [1, 2]}."""
    found: dict[str, Any] = {}
    for key, value in over.items():
        here = f"{path}.{key}" if path else str(key)
        levels = isinstance(value, Mapping) and not set(SHAPES) & value.keys()
        for name, values in (flatten(value, here) if levels and value else {here: value}).items():
            if name in found:
                raise InputError(f"over.{name}: given twice")
            found[name] = values
    return found


def own_sweep(top: SweepSpec | None, changes: Mapping[str, Any], name: str, knows: Callable[[str], bool]) -> SweepSpec:
    """The sweep of one model: that of all, as its own changes and extends it. It may have no field: then it is none.

    top: of the experiment. changes: of the model's entry; a path with null is swept no more.
    name: of the model. knows: whether it has an option; what it lacks is not swept.
    """
    general = {} if top is None else top.over
    mine = f"models.{name}."
    over: dict[str, Any] = {
        path: values for path, values in general.items() if not path.startswith("models.") and _has(path, knows)
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
    return SweepSpec.parse({**base, **changes, "over": kept}, f"models.{name}.sweep")


def check_path(path: str, where: str, options: Iterable[str], models: Iterable[str] = ()) -> None:
    """Refuse a path that no model has. options: that the models know. models: names that a path may begin with.

    Raises InputError with the nearest path.
    """
    root, _, rest = path.partition(".")
    of_models = list(models)
    known = [f"train.{key}" for key in TrainSpec.model_fields] + [f"options.{key}" for key in options]
    known += [f"spec.{key}" for key in ModelSpec.model_fields]
    ahead = ""
    if root == "models" and of_models:
        name, _, path_of_model = rest.partition(".")
        if name not in of_models:
            near = nearest(name, of_models)
            hint = f"; did you mean 'models.{near}.{path_of_model}'?" if near else ""
            raise InputError(f"{where}.{path}: no model of this experiment is called {name!r}{hint}")
        ahead, path = f"models.{name}.", path_of_model
    if ".".join(path.split(".")[:2]) in known and all(path.split(".")):
        return
    by_end = [each for each in known if each.partition(".")[2] == path]
    near = by_end[0] if by_end else nearest(path, known)
    hint = f"; did you mean {ahead + near!r}?" if near else ""
    raise InputError(
        f"{where}.{ahead}{path}: no field of a model or its training{hint} (expected train.KEY, options.KEY, spec.KEY)"
    )


def put(data: Any, keys: list[str], value: Any, path: str) -> Any:
    """A copy of nested mappings and lists in which the value at these keys is another. Raises InputError."""
    key, *rest = keys
    if isinstance(data, Mapping):
        return {**data, key: put(data.get(key) or {}, rest, value, path) if rest else value}
    if isinstance(data, list | tuple):
        if not (key.isascii() and key.isdigit() and int(key) < len(data)):
            raise InputError(f"{path}: expected an index from 0 to {len(data) - 1} of a list, got {key!r}")
        return [put(each, rest, value, path) if rest and i == int(key) else value if i == int(key) else each
                for i, each in enumerate(data)]  # fmt: skip
    raise InputError(f"{path}: the key before {key!r} is {describe(data)}, which has no keys")


def with_setting(data: Mapping[str, Any], setting: Setting, root: str) -> dict[str, Any]:
    """Plain data of a spec with those values of a setting that are below `root`: "train", "options" or "spec"."""
    changed: Any = dict(data)
    fields = (TrainSpec if root == "train" else ModelSpec).model_fields
    for path, value in setting.items():
        first, *keys = path.split(".")
        if first == root and keys:
            if len(keys) > 1 and keys[0] not in changed and keys[0] in fields:
                if root == "options":
                    raise InputError(f"{path}: no option gives {keys[0]}; sweep spec.{'.'.join(keys)}")
                default = fields[keys[0]].get_default(call_default_factory=True)
                changed[keys[0]] = default.model_dump() if isinstance(default, Spec) else default or {}
            changed = put(changed, keys, value, path)
    return dict(changed)


def setting_words(setting: Setting) -> str:
    """train.learning_rate=0.001, options.width=64."""
    return ", ".join(f"{path}={value:.6g}" if isinstance(value, float) else f"{path}={value}"
                     for path, value in setting.items())  # fmt: skip


def _place(path: str) -> str:
    """What a path changes: an option that is a key of ModelSpec is that key of what comes of it."""
    root, _, rest = path.partition(".")
    return f"spec.{rest}" if root == "options" else path


def _has(path: str, knows: Callable[[str], bool]) -> bool:
    root, *keys = path.split(".")
    return root != "options" or (bool(keys) and knows(keys[0]))
