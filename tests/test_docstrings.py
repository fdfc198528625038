"""Every public function with tensors in its signature says their shapes in its docstring."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType

import pytest
from torch import Tensor

import contextlab

SHAPE = re.compile(
    r"\[(?=[^\]]*[A-Za-z.])(?:\w|\.{3}|[ ,:*+/()×-])+\]"  # [B, T, D], [batch, time + 1], [..., k]
    r"|\bscalars?\b|\b(?:same|any|their|its|whose) shape|\bshape(?:s)? of\b|\bshaped (?:like|as)\b"
)
UNFINISHED: set[str] = set()  # rooms whose owner has yet to write them; a finished one must be taken out


def _rooms() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(contextlab.__path__))


def _modules(room: str) -> Iterator[ModuleType]:
    top = import_module(f"contextlab.{room}")
    yield top
    for found in pkgutil.walk_packages(getattr(top, "__path__", ()), f"contextlab.{room}."):
        if not found.name.endswith("__main__"):
            yield import_module(found.name)


def _has_tensors(function: Callable[..., object]) -> bool:
    return any("Tensor" in str(annotation) for annotation in inspect.get_annotations(function).values())


def _documents(owner: type, name: str) -> Iterator[str]:
    """The docstrings of a method and of those that it overrides: what these promise, it keeps."""
    for base in owner.__mro__:
        method = vars(base).get(name)
        yield getattr(getattr(method, "fget", method), "__doc__", None) or ""


def _without_shapes(module: ModuleType) -> list[str]:
    """Names of the module's public functions and methods that take or return tensors and tell no shape."""
    missing = []
    for name, found in vars(module).items():
        if name.startswith("_") or getattr(found, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(found) and _has_tensors(found) and not SHAPE.search(found.__doc__ or ""):
            missing.append(f"{module.__name__}.{name}")
        for method, value in vars(found).items() if inspect.isclass(found) else ():
            function = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if (
                inspect.isfunction(function)
                and not method.startswith("_")
                and _has_tensors(function)
                and not any(SHAPE.search(text) for text in _documents(found, method))
            ):
                missing.append(f"{module.__name__}.{name}.{method}")
    return missing


@pytest.mark.parametrize(
    "room",
    [
        pytest.param(room, marks=pytest.mark.xfail(strict=True)) if room in UNFINISHED else room
        for room in _rooms()
        if room != "cli"  # it prints, and hands no tensors on
    ],
)
def test_shapes_are_told(room):
    missing = [name for module in _modules(room) for name in _without_shapes(module)]
    assert not missing, f"{len(missing)} docstrings tell no shape such as [B, T, D]:\n" + "\n".join(missing)


def test_a_missing_shape_is_seen():
    def told(x: Tensor) -> Tensor:
        """x [B, T] -> the sum over time [B]."""
        return x.sum(-1)

    def untold(x: Tensor) -> Tensor:
        """The sum over time, see [1]."""
        return x.sum(-1)

    class Base:
        def read(self, x: Tensor) -> Tensor:
            """x [B, T] -> [B]."""
            return x

        def count(self, x: Tensor) -> int:
            """How many there are."""
            return len(x)

    class Child(Base):
        def read(self, x: Tensor) -> Tensor:
            return -x

    module = ModuleType("made_up")
    for each in (told, untold, Base, Child):
        each.__module__ = "made_up"
        setattr(module, each.__name__, each)
    assert _without_shapes(module) == ["made_up.untold", "made_up.Base.count"]
