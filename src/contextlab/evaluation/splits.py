"""The splits of a task that are measured: those that it names, and "option=value", the task with that option."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Mapping

from contextlab.errors import InputError, unknown
from contextlab.evaluation.spec import EvaluateSpec
from contextlab.policies.core.parse import parse_options
from contextlab.prompt import Task

STREAMS = 1_000
"""Streams of prompts that are kept for the splits that tasks name; `evaluate` has 1,000,003 for each seed."""


def split_of(task: Task, name: str, named: Mapping[str, Task] | None = None) -> Task:
    """The task of a split: of a name that the task gives, or of "option=value", such as "length=512".

    named: the splits that the task gives, where they are made already.

    Raises InputError for another name, a value that the option does not take, and one with which the tokens or the
    answers are of another size, which models of the task cannot read.
    """
    named = task.splits() if named is None else named
    if name in named:
        return named[name]
    option, equals, _ = name.partition("=")
    options = [each.name for each in dataclasses.fields(task) if each.init]
    if not equals or option.strip() not in options:
        lead = unknown("split", name, named)
        raise InputError(f"{lead}, or option=value: {unknown('option', option.strip(), options)}" if equals else lead)
    shifted: Task = task.replace(**parse_options(f"split:{name}", "split")[1])
    for key in ("read_in", "input_size", "output_size"):
        ours, theirs = getattr(task, key), getattr(shifted, key)
        if ours != theirs:
            raise InputError(f"split {name!r}: its {key} is {theirs}, and that of training {ours}")
    return shifted


def wanted_splits(task: Task, names: Iterable[str] | None, named: Mapping[str, Task], where: str) -> dict[str, Task]:
    """The tasks of the splits that are asked for, by name. named: those that the task gives.

    Raises InputError, which begins with `where`, for a name that is no split of the task.
    """
    try:
        return {name: split_of(task, name, named) for name in names or ()}
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def chosen_splits(task: Task, spec: EvaluateSpec) -> Iterator[tuple[str, int, Task]]:
    """Name, number of its stream of prompts and task of each split that is wanted.

    One beside 'train' that is the task itself, such as recall's of as many pairs as in training, is no shift of it: it
    is measured only where it is asked for by name. The prompts of an "option=value" depend on its name, not on what
    else is measured.
    """
    named = task.splits()
    wanted = wanted_splits(task, spec.splits, named, "evaluate.splits")
    for index, (name, shifted) in enumerate(named.items()):
        if name in wanted if spec.splits is not None else index == 0 or not _same(shifted, task):
            yield name, index, shifted
    for name, shifted in wanted.items():
        if name not in named:
            yield name, STREAMS + zlib.crc32(name.encode()) % (1_000_003 - STREAMS), shifted


def _same(one: Task, other: Task) -> bool:
    """Whether two tasks are equal; those that cannot be compared, as they hold arrays, are taken to differ."""
    try:
        return type(one) is type(other) and bool(one == other)
    except (RuntimeError, ValueError):
        return False
