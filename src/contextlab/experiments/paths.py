"""Paths to what a sweep changes: `train.KEY`, `options.KEY` of a model, `spec.KEY` of the ModelSpec that comes of it.

`options.KEY` are those of a model's preset or spec; a path may go on, as in `spec.layers.0.options.expand`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from contextlab.errors import InputError, nearest
from contextlab.experiments.values import SHAPES
from contextlab.models import ModelSpec
from contextlab.spec import Spec, describe
from contextlab.training.spec import TrainSpec

Setting = Mapping[str, Any]
"""What one trial changes: path -> value."""


def flatten(
    over: Mapping[str, Any], path: str = "", leaves: Collection[str] = SHAPES, where: str = "over"
) -> dict[str, Any]:
    """Levels of keys as paths: {train: {steps: [1, 2]}} -> {train.steps: [1, 2]}.

    leaves: keys of a mapping that is no level. where: the key that holds them, for messages.
    """
    found: dict[str, Any] = {}
    for key, value in over.items():
        here = f"{path}.{key}" if path else str(key)
        levels = isinstance(value, Mapping) and not set(leaves) & value.keys()
        for name, values in (flatten(value, here, leaves, where) if levels and value else {here: value}).items():
            if name in found:
                raise InputError(f"{where}.{name}: given twice")
            found[name] = values
    return found


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


def overlap(one: str, other: str) -> bool:
    """Whether one path is the other, or lies below it."""
    first, second = sorted((f"{place(one)}.", f"{place(other)}."), key=len)
    return second.startswith(first)


def place(path: str) -> str:
    """What a path changes: an option that is a key of ModelSpec is that key of what comes of it."""
    root, _, rest = path.partition(".")
    return f"spec.{rest}" if root == "options" else path


def has(path: str, knows: Callable[[str], bool]) -> bool:
    root, *keys = path.split(".")
    return root != "options" or (bool(keys) and knows(keys[0]))
