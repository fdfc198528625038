"""Plugins: modules of the user's own that register components; imported only when asked for by name."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from contextlab.errors import InputError

_loaded: dict[str, ModuleType] = {}
"""Plugins that were named and imported, by their names."""


def load_plugins(plugins: Sequence[str]) -> None:
    """Import modules by name or .py path. Raises InputError in one line when one cannot be imported."""
    for plugin in plugins:
        path = Path(plugin)
        if path.suffix == ".py":
            _load_file(path)
            continue
        try:
            _loaded[plugin] = importlib.import_module(plugin)
        except Exception as error:
            raise _refusal(plugin, error) from None


def plugin_options(plugins: Sequence[str]) -> str:
    """The options of the command line that name plugins, each with a blank before it; "" for none."""
    return "".join(f" --plugin {shlex.quote(each)}" for each in plugins)


def plugin_module(name: str) -> ModuleType | None:
    """The plugin of that name that has been loaded, a file's without its folder and ".py"; None where there is none."""
    return _loaded.get(name)


def is_imported(plugin: str) -> bool:
    """Whether a module, by name or .py path, has been imported."""
    path = Path(plugin)
    if path.suffix != ".py":
        return plugin in sys.modules
    known = sys.modules.get(_module_name(path))
    return known is not None and Path(str(known.__file__)) == path.resolve()


def _module_name(path: Path) -> str:
    return f"contextlab_plugin_{path.stem}"


def _load_file(path: Path) -> None:
    name = _module_name(path)
    if is_imported(str(path)):
        _loaded[path.stem] = sys.modules[name]
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
        raise _refusal(str(path), error, path.resolve()) from None
    _loaded[path.stem] = module


def _refusal(plugin: str, error: Exception, path: Path | None = None) -> InputError:
    """What is wrong with a plugin, in one line; of a file, on which of its lines."""
    line = None if path is None else line_in(error, path)
    where = "" if line is None else f", line {line}"
    if isinstance(error, InputError):
        return InputError(f"--plugin {plugin}{where}: {error}")
    told = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    return InputError(f"--plugin {plugin}{where}: cannot be imported ({type(error).__name__}: {told})")


def line_in(error: BaseException, path: Path) -> int | None:
    """The line of a file from which an error came, the innermost; None where it did not come from there."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(path)]
    return lines[-1] if lines else None
