"""Recipes: find, read and change the YAML files that are ExperimentSpecs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from contextlab.errors import InputError, unknown
from contextlab.experiments.made_with import naming_plugins
from contextlab.experiments.paths import flatten
from contextlab.experiments.spec import ExperimentSpec
from contextlab.files import present, read_text, short
from contextlab.spec import describe
from contextlab.strict_yaml import DEEPEST, LARGEST_TEXT, check_tree, parse_yaml


@dataclass(frozen=True)
class Recipe:
    """A recipe that comes with contextlab."""

    name: str
    path: Path
    description: str


def recipe_files() -> dict[str, Path]:
    """The file of each recipe that comes with contextlab, by name; none is read, which takes 20 ms each."""
    folder = Path(str(resources.files("contextlab.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipes() -> list[Recipe]:
    """The recipes that come with contextlab, by name."""
    found = []
    for name, path in recipe_files().items():
        data = read_yaml(path)
        found.append(Recipe(name, path, " ".join(str(data.get("description", "")).split())))
    return found


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a recipe, given its name or a path. Raises InputError with the nearest name."""
    path = Path(name_or_path)
    if present(path) and not path.is_dir():
        return path
    known = recipe_files()
    if str(name_or_path) in known:  # also where a folder bears the name, such as a run's
        return known[str(name_or_path)]
    if present(path):
        raise InputError(f"{short(path)}: is a folder; expected a recipe's YAML file or the name of a recipe")
    if path.suffix in (".yaml", ".yml"):
        raise InputError(f"{short(path)}: no such file")
    raise InputError(unknown("recipe", str(name_or_path), known))


def quick_form(name: str) -> str:
    """The name of a recipe's quick form. Raises InputError when it has none."""
    known = recipe_files()
    if f"{name}-quick" in known:
        return f"{name}-quick"
    having = sorted(each.removesuffix("-quick") for each in known if each.endswith("-quick"))
    raise InputError(f"--quick: {name} has no quick form; those that have one: {', '.join(having)}")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises InputError when it is empty, not YAML, huge or deeply nested."""
    data = parse_yaml(read_text(path, LARGEST_TEXT), short(path))
    expected = "expected keys such as name, tasks, models (see: contextlab show recipe demo)"
    if data is None:
        raise InputError(f"{short(path)}: empty; {expected}")
    if not isinstance(data, dict):
        raise InputError(
            f"{short(path)}: expected a mapping with keys such as name, tasks, models, got {describe(data)}"
        )
    return data


def load_recipe(
    name_or_path: str | Path, changes: Sequence[str] = (), sweep: Mapping[str, Any] | None = None
) -> ExperimentSpec:
    """Read a recipe and apply `path.to.key=value` changes. Raises InputError with the key's path.

    sweep: keys of a SweepSpec that extend and replace the recipe's own.
    """
    path = find_recipe(name_or_path)
    data = read_yaml(path)
    if "stages" in data:
        raise InputError(f"{short(path)}: has stages; contextlab run takes such a recipe, each of its stages is a run")
    for change in changes:
        set_key(data, change)
    if sweep is not None:
        own = data.get("sweep") or {}
        if not isinstance(own, Mapping) or not isinstance(own.get("over") or {}, Mapping):
            raise InputError(f"sweep: expected a mapping with the key over, got {describe(own)}")
        over = {**flatten(own.get("over") or {}), **flatten(sweep.get("over") or {})}
        if not over:
            raise InputError(
                f"{short(path)}: sweeps over no field; give --over, for example --over train.learning_rate=1e-3,3e-3"
            )
        data["sweep"] = {**own, **sweep, "over": over}
        if sweep.get("halving") is True and isinstance(own.get("halving"), Mapping):
            data["sweep"]["halving"] = own["halving"]  # it is on already, in a form of its own
    with naming_plugins(path):
        return ExperimentSpec.parse(data, "")


def set_key(data: dict[str, Any], change: str) -> None:
    """Apply `path.to.key=value` (the value is YAML) to nested mappings and lists, in place.

    Raises InputError when the key or the value cannot be; the value is held to the bounds of a recipe's file.
    """
    path, equals, text = change.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {_cut(change)}: expected path.to.key=value, for example train.steps=100")
    path = _cut(path.strip())
    if len(keys) > DEEPEST:
        raise InputError(f"--set {path}: nested more than {DEEPEST} levels deep")
    value = parse_yaml(text, f"--set {path}: {_cut(text)!r}") if text.strip() else ""
    current: Any = data
    for i, key in enumerate(keys[:-1]):
        current = _step(current, key, ".".join(keys[: i + 1]))
    if isinstance(current, list):
        current[_index(current, keys[-1], path)] = value
    elif isinstance(current, dict):
        current[keys[-1]] = value
    else:
        raise InputError(f"--set {path}: {_cut('.'.join(keys[:-1]))} is {describe(current)}, which has no keys")
    check_tree(data, f"--set {path}")


def _step(current: Any, key: str, path: str) -> Any:
    if isinstance(current, list):
        return current[_index(current, key, path)]
    if isinstance(current, dict):
        if current.get(key) is None:
            current[key] = {}
        return current[key]
    raise InputError(f"--set {_cut(path)}: the key before it is {describe(current)}, which has no keys")


def _index(items: list[Any], key: str, path: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(items)):
        expected = f"an index from 0 to {len(items) - 1} of a list" if items else "another key: the list here is empty"
        raise InputError(f"--set {_cut(path)}: expected {expected}, got {_cut(key)!r}")
    return int(key)


def _cut(text: str) -> str:
    """What a message shows of a text: one line of at most 80 characters."""
    shown = text if text.isprintable() else repr(text)[1:-1]
    return shown if len(shown) <= 80 else f"{shown[:80]}..."
