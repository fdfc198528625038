"""Imports when they are first needed: of submodules by their name, and of packages without their complaints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any


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


@contextmanager
def without_bars() -> Iterator[None]:
    """Within, transformers shows no bars of its own, such as "Loading weights"; those of downloads are shown."""
    theirs: Any = import_module("transformers.utils.logging")
    shown = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            theirs.enable_progress_bar()


@contextmanager
def without_logs() -> Iterator[None]:
    """Within, no warnings are logged: torchao, when imported, logs which of its kernels are for other machines."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
