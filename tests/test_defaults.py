"""Defaults that users have stay: a recipe, a script or a saved model that leaves an option out means the same tomorrow.

`defaults.json` beside this file has those of every component, spec, command and function that a room of the package
hands out. Where one is changed on purpose, write the file again, and say it in CHANGELOG.md:

    python -m tests.test_defaults
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import pytest

import contextlab
from contextlab import registry
from contextlab.cli.shared import app
from contextlab.spec import Spec

FILE = Path(__file__).with_name("defaults.json")
UNRECORDED = 0.03
"""The file may lag behind by so large a share, so that one who adds an option need not write it each time."""


@cache
def _found() -> dict[str, dict[str, str]]:
    """Owner, such as "mixer gla" or "contextlab.ops.gla", -> option -> its default as Python prints it."""
    return {name: own for name, callable_ in _callables() if (own := _defaults(callable_))}


def _callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    rooms = [importlib.import_module(f"contextlab.{each.name}") for each in iter_modules(contextlab.__path__)]
    for room in rooms:
        for name, each in sorted(_handed_out(room).items()):
            yield f"{room.__name__}.{name}", each
            for method, function in sorted(vars(each).items()) if inspect.isclass(each) else ():
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"{room.__name__}.{name}.{method}", function
    for kind in registry.kinds():
        for entry in registry.entries(kind):
            if entry.factory.__module__.startswith("contextlab."):
                yield f"{kind} {entry.name}", entry.factory
    for command in app.registered_commands:
        assert command.callback is not None
        yield f"command {command.name or command.callback.__name__}", command.callback


def _handed_out(room: ModuleType) -> dict[str, Callable[..., Any]]:
    """Public functions and classes of a room: what it lists, and all specs of its files."""
    names = getattr(room, "__all__", None) or [name for name in vars(room) if not name.startswith("_")]
    own = {name: getattr(room, name) for name in names}
    return {
        name: each
        for name, each in own.items()
        if (inspect.isfunction(each) or inspect.isclass(each)) and each.__module__.startswith(room.__name__)
    }


def _defaults(callable_: Callable[..., Any]) -> dict[str, str]:
    try:
        parameters = inspect.signature(callable_).parameters.values()
    except ValueError:  # a class written in C
        return {}
    return {each.name: _printed(each.default) for each in parameters if each.default is not inspect.Parameter.empty}


def _printed(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Spec):  # its own defaults are on record under its name
        return f"{type(value).__name__}({value.model_dump(exclude_defaults=True) or ''})"
    return (
        f"{value.__module__}.{value.__qualname__}"
        if inspect.isfunction(value) or inspect.isclass(value)
        else repr(value)
    )


def _recorded() -> dict[str, dict[str, str]]:
    return json.loads(FILE.read_text())


def test_defaults_that_users_have_stay():
    found, recorded = _found(), _recorded()
    changed = {
        f"{owner}: {option}": (default, found[owner][option])
        for owner, own in recorded.items()
        for option, default in own.items()
        if option in found.get(owner, {}) and found[owner][option] != default
    }
    assert not changed, f"(before, now) of {changed}; on purpose? see the head of this file"


def test_the_record_of_defaults_is_nearly_whole():
    found, recorded = _found(), _recorded()
    now = {(owner, option) for owner, own in found.items() for option in own}
    then = {(owner, option) for owner, own in recorded.items() for option in own}
    assert len(now ^ then) <= UNRECORDED * len(now), f"write the file again, it lacks or has too much: {now ^ then}"


@pytest.mark.parametrize(
    ("owner", "option", "default"),
    [
        ("mixer gla", "heads", "4"),
        ("model jamba", "depth", "8"),
        ("contextlab.ops.gla", "output_final_state", "False"),
        ("command run", "resume", "False"),
        ("contextlab.evaluation.CompressSpec", "fit", "0"),
        ("contextlab.mixers.Mixer.state_nbytes", "batch", "1"),
    ],
)
def test_defaults_of_each_kind_are_found(owner: str, option: str, default: str):
    assert _found()[owner][option] == default


if __name__ == "__main__":
    lines = (f"{json.dumps(owner)}: {json.dumps(own)}" for owner, own in sorted(_found().items()))
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
