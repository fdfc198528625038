"""SweepSpec: at which values of its fields a model is trained, as data, and the settings that are tried.

A path is `train.KEY`, `options.KEY` of a model's preset or spec, or `spec.KEY` of the ModelSpec that they make, such
as `spec.layers.0.options.expand`. A trial is one setting, path -> value; its number is its place among the settings.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, model_serializer, model_validator

from contextlab.errors import InputError, nearest
from contextlab.models import ModelSpec
from contextlab.spec import Spec, describe
from contextlab.training.spec import TrainSpec
from contextlab.training.validation import ValidationSpec

MOST_TRIALS = 10_000
"""Of one model on one task."""
SHAPES = ("values", "log", "range", "integers")
DIGITS = 6
"""Of the points of a range: 1e-4 and 1e-2 in three points are 0.0001, 0.001 and 0.01, no more digits than one reads."""

EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")

Setting = Mapping[str, Any]
"""What one trial changes: path -> value."""


class Values(Spec):
    """The values of one field. A plain list stands for `{values: list}`, and one value for a list of it.

    values: these.
    log: from the first to the second, evenly on a logarithmic scale, for example `{log: [1e-4, 1e-2], n: 5}`.
    range: from the first to the second, evenly.
    integers: whole numbers from the first to the second, both among them.
    n: so many points, the ends among them. Without it `integers` are all whole numbers, and `log` and `range` any
        number between, which a grid cannot try.
    """

    values: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    log: tuple[PositiveFloat, PositiveFloat] | None = None
    range: tuple[float, float] | None = None
    integers: tuple[int, int] | None = None
    n: Annotated[int, Field(ge=2, le=MOST_TRIALS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _list_is_values(cls, data: Any) -> Any:
        if isinstance(data, Mapping | Values):
            return data
        return {"values": tuple(_number(value) for value in (data if isinstance(data, list | tuple) else (data,)))}

    @model_validator(mode="after")
    def _one_shape(self) -> Values:
        given = [name for name in SHAPES if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(f"expected a list of values, or one of {', '.join(SHAPES[1:])}, got {given or 'none'}")
        if self.values is not None:
            if self.n is not None:
                raise InputError("n: a list has as many points as it has values; leave n out")
            if len({json.dumps(value, sort_keys=True, default=str) for value in self.values}) < len(self.values):
                raise InputError(f"values: expected different ones, got {describe(list(self.values))}")
        elif not self.ends[0] < self.ends[1]:
            raise InputError(f"{given[0]}: expected a smaller and a larger number, got {describe(list(self.ends))}")
        return self

    @model_serializer
    def _plain(self) -> Any:
        if self.values is not None:
            return list(self.values)
        shape = {name: list(pair) for name in SHAPES[1:] if (pair := getattr(self, name)) is not None}
        return shape if self.n is None else {**shape, "n": self.n}

    @property
    def ends(self) -> tuple[Any, Any]:
        """The first and the last value."""
        found = self.log or self.range or self.integers
        return found if found is not None else (self.values[0], self.values[-1])  # type: ignore[index]

    def points(self) -> list[Any] | None:
        """All values, in order; None of a range without `n`, which has any number between its ends."""
        if self.values is not None:
            return list(self.values)
        low, high = self.ends
        if self.n is None:
            if self.integers is None:
                return None
            if high - low >= MOST_TRIALS:
                raise InputError(
                    f"integers: more than {MOST_TRIALS} from {low} to {high}; give n, the number of points"
                )
            return list(range(low, high + 1))
        found = [self.at(i / (self.n - 1)) for i in range(self.n)]
        return list(dict.fromkeys(found))

    def at(self, share: float) -> Any:
        """The number at this share, from 0 to 1, of the way from the first to the second."""
        low, high = self.ends
        if share in (0, 1):
            return high if share else low
        if self.log is not None:
            return _rounded(low * (high / low) ** share)
        between = low + (high - low) * share
        return round(between) if self.integers is not None else _rounded(between)

    def draw(self, source: random.Random) -> Any:
        """One value, each as likely as another; of `log` on its scale."""
        points = self.points()
        return self.at(source.random()) if points is None else points[int(source.random() * len(points))]


class SweepSpec(Spec):
    """At which values each model is trained. The best on validation prompts is then measured as any model is.

    over: path -> values: `train.KEY`; `options.KEY` of every model that has such an option; `spec.KEY` of ModelSpec;
        each with `models.NAME.` before it of one model. Levels do as well: `{train: {steps: [100, 200]}}`.
    sampler: "grid" tries every combination; "random" draws `trials` of them.
    trials: of each model on each task, where they are drawn.
    seed: of what is drawn; all models draw the same.
    validation: the prompts by which the best is chosen; never those of training or of `evaluate`.
    """

    over: dict[str, Values] = Field(default_factory=dict)
    sampler: Literal["grid", "random"] = "grid"
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
        for path, values in self.over.items():
            try:
                points = values.points()
            except InputError as error:
                raise InputError(f"over.{path}: {error}") from None
            if points is None and self.sampler == "grid":
                raise InputError(f"over.{path}: a grid needs n, the number of points, for example n: 5")
        return self

    def settings(self) -> list[Setting]:
        """Every trial's setting, in order. Raises InputError where there are too many, or too few to draw from."""
        points = [values.points() for values in self.over.values()]
        counted = [len(each) for each in points if each is not None]
        size = math.prod(counted) if len(counted) == len(points) else math.inf
        if self.sampler == "grid":
            if size > MOST_TRIALS:
                raise InputError(f"a grid of {size:,} trials for each model; expected at most {MOST_TRIALS:,}")
            product = itertools.product(*(each or [] for each in points))
            return [dict(zip(self.over, combination, strict=True)) for combination in product]
        assert self.trials is not None
        if self.trials > size:
            raise InputError(f"trials: {self.trials}, but there are only {size} different settings; use sampler grid")
        source = random.Random(self.seed)
        found: dict[str, Setting] = {}
        while len(found) < self.trials:
            setting = {path: values.draw(source) for path, values in self.over.items()}
            found.setdefault(json.dumps(setting, default=str), setting)
        return list(found.values())


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
    over |= flatten(given)
    kept = {path: values for path, values in over.items() if values is not None}
    base = {} if top is None else top.model_dump(exclude_unset=True)
    return SweepSpec.parse({**base, **changes, "over": kept}, f"models.{name}.sweep")


def check_path(path: str, where: str, options: Iterable[str], models: Iterable[str] = ()) -> None:
    """Refuse a path that no model has. options: that the models know. models: names that a path may begin with.

    Raises InputError with the nearest path.
    """
    root, _, rest = path.partition(".")
    of_models = list(models)
    known = [f"train.{key}" for key in TrainSpec.model_fields if key != "until"] + [f"options.{key}" for key in options]
    known += [f"spec.{key}" for key in ModelSpec.model_fields]
    ahead = ""
    if root == "models" and of_models:
        name, _, path_of_model = rest.partition(".")
        if name not in of_models:
            near = nearest(name, of_models)
            hint = f"; did you mean 'models.{near}.{path_of_model}'?" if near else ""
            raise InputError(f"{where}.{path}: no model of this experiment is called {name!r}{hint}")
        ahead, path = f"models.{name}.", path_of_model
    if ".".join(path.split(".")[:2]) in known:
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
    for path, value in setting.items():
        first, *keys = path.split(".")
        if first == root and keys:
            changed = put(changed, keys, value, path)
    return dict(changed)


def setting_words(setting: Setting) -> str:
    """train.learning_rate=0.001, options.width=64."""
    return ", ".join(f"{path}={value:.6g}" if isinstance(value, float) else f"{path}={value}"
                     for path, value in setting.items())  # fmt: skip


def _has(path: str, knows: Callable[[str], bool]) -> bool:
    root, *keys = path.split(".")
    return root != "options" or (bool(keys) and knows(keys[0]))


def _number(value: Any) -> Any:
    """1e-3, which YAML takes for a text, as the number that it is."""
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
