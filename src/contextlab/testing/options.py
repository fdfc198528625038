"""Every option counts: another value of it changes what a component computes, or is refused.

An option that changes nothing by intent is listed in `WITHOUT_EFFECT` with the reason; a component from elsewhere lists
its own as an attribute of its class, `options_without_effect = {"layout": "both give the same"}`.
"""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from torch import Tensor

from contextlab import registry
from contextlab.errors import InputError
from contextlab.testing.law import Component, require

_PLACE = "says where tokens are, not what is answered"
_ROOM = "the small model of the laws has two key heads, and only one cluster is fewer"
WITHOUT_EFFECT: dict[tuple[str, str, str], str] = {
    ("policy", "block_topk", "offload"): _PLACE,
    ("policy", "infllm", "offload"): _PLACE,
    ("policy", "low_rank_keys", "offload"): _PLACE,
    ("policy", "quest", "offload"): _PLACE,
    ("policy", "retrieval", "offload"): _PLACE,
    ("policy", "specache", "offload"): _PLACE,
    ("policy", "head_offload", "heads"): _PLACE,
    ("policy", "chai", "clusters"): _ROOM,
    ("task", "darkroom", "steps"): "only online agents are put back; prompts are made of single transitions",
}
"""(kind, name, option) -> why another value changes nothing that is compared."""

Mark = list[Any]
"""What is compared of a component: tensors and plain values."""


def first_case(component: Component) -> bool:
    """Whether it has the options of the first case that it is registered with."""
    known = component.name in registry.names(component.kind) and registry.lookup(component.kind, component.name).cases
    return bool(known) and component.options == registry.lookup(component.kind, component.name).cases[0]


def idle_options(
    entry: registry.Entry, marks: Callable[[Mapping[str, Any]], Iterable[Any]], given: Iterable[str] = ()
) -> list[str]:
    """The options of which no other value changes any mark, in no registered case and none near it.

    marks: called with options, it builds the component and gives what is compared, cheap things first; an InputError
    says that they are refused. given: options that the caller sets.
    """
    known = {**WITHOUT_EFFECT, **_own(entry)}
    idle = []
    for parameter in entry.parameters:
        if parameter.name in given or (entry.kind, entry.name, parameter.name) in known:
            continue
        if _counts(entry, parameter, marks) is False:
            idle.append(parameter.name)
    return idle


def hold_to_options(component: Component, marks: Callable[[Mapping[str, Any]], Iterable[Any]], *given: str) -> None:
    """Raises AssertionError with the options that change nothing."""
    idle = idle_options(registry.lookup(component.kind, component.name), marks, given)
    require(not idle, f"another value of {', '.join(idle)} changes nothing")


def _own(entry: registry.Entry) -> dict[tuple[str, str, str], str]:
    listed: Mapping[str, str] = getattr(entry.factory, "options_without_effect", {})
    return {(entry.kind, entry.name, option): reason for option, reason in listed.items()}


def _counts(
    entry: registry.Entry, parameter: registry.Parameter, marks: Callable[[Mapping[str, Any]], Iterable[Any]]
) -> bool | None:
    """Whether some other value makes a difference; None where each is refused.

    In one of the registered cases, or, for an option that only counts beside another, in one with another of its
    options changed.
    """
    built = False
    for case in (*entry.cases, *_neighbours(entry, parameter)):
        if parameter.required and parameter.name not in case:
            return None
        for other in _others(entry, parameter, case):
            try:
                if differ(marks(case), marks({**case, parameter.name: other})):
                    return True
                built = True
            except InputError:
                continue
    return False if built else None


def _neighbours(entry: registry.Entry, parameter: registry.Parameter) -> Iterator[dict[str, Any]]:
    """The registered cases with one option other than `parameter` changed."""
    for case in entry.cases:
        for beside in entry.parameters:
            if beside.name != parameter.name and not (beside.required and beside.name not in case):
                for value in _others(entry, beside, case):
                    yield {**case, beside.name: value}


def _others(entry: registry.Entry, parameter: registry.Parameter, case: Mapping[str, Any]) -> list[Any]:
    value = case.get(parameter.name, parameter.default)
    return others(entry.options_model.model_fields[parameter.name].annotation, value)


def others(annotation: Any, value: Any) -> list[Any]:
    """Other values that an option of this type may have; some of them may be refused."""
    kinds = _alternatives(annotation)
    found: list[Any] = []
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            found += [each for each in typing.get_args(kind) if each != value]
        elif kind is bool:
            found += [not value] if isinstance(value, bool) else [True, False]
        elif kind is int:
            near = [value + 1, 2 * value, 3 * value, value // 2] if type(value) is int else []
            found += [each for each in (*near, 2, 3, 4, 1, 0) if each != value]
        elif kind is float:
            close = [value * 0.5, value * 1.5, value + 0.3] if isinstance(value, int | float) else []
            found += [each for each in (*close, 0.5, 0.67, 0.25, 1.5, 0.0, 1.0, 3.0) if each != value]
    if type(None) in kinds and value is not None:
        found.append(None)
    seen: list[Any] = []
    for each in found:  # True == 1, so by type, too
        if not any(type(each) is type(other) and each == other for other in seen):
            seen.append(each)
    return seen


def _alternatives(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [each for part in typing.get_args(annotation) for each in _alternatives(part)]
    return [annotation]


def differ(first: Iterable[Any], second: Iterable[Any]) -> bool:
    """Whether two series of marks differ; no more is computed than is needed to tell."""
    end = object()
    return any(not same(a, b) for a, b in itertools.zip_longest(first, second, fillvalue=end))


def same(a: Any, b: Any) -> bool:
    """Whether two marks are equal: tensors bit by bit, and what holds tensors part by part."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype
        return alike and bool(((a == b) | (a != a) & (b != b)).all())  # NaN is NaN
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return same(vars(a), vars(b))
    return bool(a == b)
