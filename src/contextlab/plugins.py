"""Plugins: modules of the user's own that register components; imported only when asked for by name."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from contextlab.errors import InputError


def load_plugins(plugins: Sequence[str]) -> None:
    """Import modules by name or .py path. Raises InputError in one line when one cannot be imported."""
    for plugin in plugins:
        path = Path(plugin)
        if path.suffix == ".py":
            _load_file(path)
            continue
        try:
            importlib.import_module(plugin)
        except Exception as error:
            raise InputError(f"--plugin {plugin}: cannot be imported ({type(error).__name__}: {error})") from None


def _load_file(path: Path) -> None:
    name = f"contextlab_plugin_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and Path(str(known.__file__)) == path.resolve():
        return
    if not path.is_file():
        raise InputError(f"--plugin {path}: no such file")
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"--plugin {path}: cannot be imported ({type(error).__name__}: {error})") from None
