"""Submodules that are imported when they are first named, because what they stand on is slow to import or optional."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType


def modules_on_demand(package: str, folder: Iterable[str]) -> Callable[[str], ModuleType]:
    """A package's `__getattr__`: `package.name` imports the submodule `name` of the package's folder.

    Without it `import contextlab; contextlab.models.pretrained` fails until something else has imported that module.
    folder: the package's `__path__`. Raises AttributeError, as modules do, for any other name.
    """

    def __getattr__(name: str) -> ModuleType:
        if name.startswith("_") or all(name != each.name for each in iter_modules(folder)):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return import_module(f"{package}.{name}")

    return __getattr__
