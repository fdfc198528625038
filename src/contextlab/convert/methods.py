"""Methods and data as they are written on the command line: `svd:rank=8`, `language_modelling:corpus=notes.txt`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from contextlab import registry
from contextlab.convert.base import Conversion
from contextlab.convert.calibration import Calibration
from contextlab.errors import InputError, unknown
from contextlab.files import present
from contextlab.policies.core.parse import parse_options
from contextlab.prompt import Task

LENGTH = 256
"""Tokens in a prompt of text, where the model reads so many."""


def read_method(text: str | Conversion, call: str, **options: Any) -> Conversion:
    """The conversion that a text describes: "NAME" or "NAME:option=value,...". options: further ones.

    call: "shrink" or "merge", whose methods are the choices where the name is unknown.

    Raises InputError with the nearest name, or on impossible options.
    """
    if isinstance(text, Conversion):
        if options:
            raise InputError(
                f"{text.name}: is made already; give its options where it is made, not {', '.join(options)}"
            )
        return text
    name, own = parse_options(text, "method")
    if name not in registry.names("conversion"):
        if name in registry.names("mixer"):
            raise InputError(f"{name!r} is a mixer: use `contextlab convert --to {name}`")
        raise InputError(
            unknown("method", name, [each.name for each in registry.entries("conversion") if _of(each, call)])
        )
    made: Conversion = registry.lookup("conversion", name).build(**{**own, **options})
    return made


def _of(entry: registry.Entry, call: str) -> bool:
    """Whether a conversion is one that `merge` takes, or that `shrink` does without training."""
    needs: frozenset[str] = entry.factory.needs  # type: ignore[attr-defined] # what is registered is a conversion
    merges = "models" in needs or entry.family == "growth"
    return merges if call == "merge" else not merges and "training" not in needs


def read_data(text: str | Task, model: Any) -> Task:
    """The task that a text names: a file or folder of text, or "TASK:option=value,...", for a model of ours.

    Raises InputError where it is neither, or does not fit the model.
    """
    task = text if isinstance(text, Task) else _read_data(text, model.spec.max_length)
    from contextlab.training.trainer import check_sizes

    try:
        check_sizes(model, task, "give what the model was trained on, or its like")
    except InputError as error:
        raise InputError(f"data {text if isinstance(text, str) else type(task).__name__}: {error}") from None
    return task


def check_data(texts: Iterable[str] | None) -> None:
    """Refuse data that are neither text nor a task, or have options that the task has not: before a model is loaded.

    Raises InputError.
    """
    for text in texts or ():
        entry, options = _named(text)
        entry.check(options)


def _read_data(text: str, longest: int | None) -> Task:
    entry, options = _named(text)
    if "corpus" in options and present(Path(text)):
        options["length"] = min(LENGTH, longest or LENGTH)
    task: Task = entry.build(**options)
    return task


def _named(text: str) -> tuple[registry.Entry, dict[str, Any]]:
    """The task that a text names, and its options. Raises InputError where it is no name, and no file."""
    if present(Path(text)):
        return registry.lookup("task", "language_modelling"), {"corpus": text}
    name, options = parse_options(text, "data")
    if name not in registry.names("task"):
        raise InputError(f"data: there is no file {text[:80]!r}, and {unknown('task', name, registry.names('task'))}")
    return registry.lookup("task", name), options


def tasks_of(data: Any, model: Any) -> list[Task]:
    """The tasks among what was given to calibrate or train a model on; none of a `Calibration`."""
    return [] if isinstance(data, Calibration) else [read_data(each, model) for each in as_list(data)]


def calibration_of(data: Any, tasks: Sequence[Task], model: Any, prompts: int, seed: int) -> Calibration | None:
    """Prompts of the tasks on the model's device; without tasks `data`, which may be a `Calibration` already."""
    if tasks:
        return Calibration.of_task(tasks, prompts, seed=seed, device=next(model.parameters()).device)
    return data if isinstance(data, Calibration) else None


def as_list(given: Any) -> list[Any]:
    """One thing, several or None, as a list."""
    if given is None:
        return []
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
