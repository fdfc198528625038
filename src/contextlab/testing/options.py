"""Every option counts: from each registered case another value of it changes what is computed, or is refused.

An option that changes nothing by intent is listed in `WITHOUT_EFFECT` with the reason, one that counts in some cases
only in `BESIDE_OTHERS`. A component from elsewhere lists its own as attributes of its class,
`options_without_effect = {"layout": "both give the same"}`, `options_beside_others = {"rank": "needs low_rank"}`.
"""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from contextlab import registry
from contextlab.errors import InputError
from contextlab.testing.law import Component, require

_PLACE = "says where tokens are, not what is answered"
_ROOM = "the small model of the laws has two key heads, and only one cluster is fewer"
_BETWEEN = "of half-spaces only; between two whole numbers all are the same"
_LIMIT = "a limit: what is beyond it is refused, and nothing else changes"
WITHOUT_EFFECT: dict[tuple[str, str, str], str] = {
    ("policy", "block_topk", "offload"): _PLACE,
    ("policy", "infllm", "offload"): _PLACE,
    ("policy", "low_rank_keys", "offload"): _PLACE,
    ("policy", "quest", "offload"): _PLACE,
    ("policy", "retrieval", "offload"): _PLACE,
    ("policy", "specache", "offload"): _PLACE,
    ("policy", "head_offload", "heads"): _PLACE,
    ("policy", "chai", "clusters"): _ROOM,
    ("learner", "halving", "most"): _LIMIT,
    ("learner", "halving", "thresholds"): _BETWEEN,
    ("learner", "listops_evaluator", "depth"): _LIMIT,
    ("learner", "version_space", "most"): _LIMIT,
    ("learner", "version_space", "thresholds"): _BETWEEN,
    ("task", "darkroom", "steps"): "only online agents are put back; prompts are made of single transitions",
}
"""(kind, name, option) -> why another value changes nothing that is compared."""

ANY = "*"
_ROTARY, _STRUCTURE = "counts beside a rotary position", "counts beside the structure of that kind"
_ALONE = "counts where a token reads more than itself"
_FIRST = "counts where the first tokens are not kept anyway"
BESIDE_OTHERS: dict[tuple[str, str, str], str] = {
    ("mlp", ANY, "blocks"): _STRUCTURE,
    ("mlp", ANY, "rank"): _STRUCTURE,
    ("mixer", ANY, "rope_base"): _ROTARY,
    ("mixer", ANY, "rope_fraction"): _ROTARY,
    ("mixer", ANY, "norm_eps"): "counts beside qk_norm",
    ("mixer", "clex_attention", "sample"): "counts while it is trained",
    ("mixer", "disentangled_attention", "max_distance"): "counts beside as many buckets",
    ("mixer", "linear_attention", "period"): "counts beside the features of that name",
    ("mixer", "mamba2", "heads"): "given head_dim it says the same again, or is refused",
    ("mixer", "mamba3", "heads"): "given head_dim it says the same again, or is refused",
    ("mixer", "multi_scale_window", "kv_heads"): "of four heads each has keys of its own",
    ("mixer", "sliding_window", "dilation"): _ALONE,
    ("mixer", "sliding_window", "position"): _ALONE,
    ("mixer", "sse", "balance"): "counts where not all partitions are read",
    ("mixer", "sse", "layout"): "counts where not all partitions are read, and there for how many operations",
    ("policy", ANY, "sinks"): _FIRST,
    ("policy", "ada_kv", "every"): "counts for policies that evict later, too",
    ("policy", "ada_kv", "floor"): "counts where a head would be left with less",
    ("policy", "streaming_llm", "window"): "it keeps the last tokens anyway",
    ("task", "boolean_function", "pool_seed"): "counts where functions are held out",
    ("task", "linear_regression", "pool_seed"): "counts beside a pool",
    ("task", "random_automata", "fewest_states"): "counts beside more states than edges need",
    ("task", "random_automata", "pool_seed"): "counts beside a pool",
}
"""(kind, name, option) -> beside what it counts, as in some registered cases it does nothing. Name "*": of all."""


def first_case(component: Component) -> bool:
    """Whether it has the options of the first case that it is registered with."""
    known = _cases(component)
    return bool(known) and component.options == known[0]


def a_case(component: Component) -> bool:
    """Whether it has the options of a case that it is registered with."""
    return any(component.options == case for case in _cases(component))


def _cases(component: Component) -> tuple[Mapping[str, Any], ...]:
    known = component.name in registry.names(component.kind)
    return registry.lookup(component.kind, component.name).cases if known else ()


Marks = Callable[[Mapping[str, Any]], Iterable[Any]]
"""Called with options, it builds the component and gives what is compared, cheap things first; an InputError says that
they are refused."""


def hold_to_options(component: Component, marks: Marks, *given: str) -> None:
    """Raises AssertionError with the options that change nothing in the component's own case.

    Those that count only beside others must count in some case, which is asked of the first. given: options that the
    caller sets.
    """
    entry = registry.lookup(component.kind, component.name)
    first = first_case(component)
    bases = [Kept(marks(case)) for case in entry.cases]
    base = bases[entry.cases.index(component.options)]
    idle = []
    for parameter in entry.parameters:
        if parameter.name in given or parameter.name in _listed(entry, WITHOUT_EFFECT, "options_without_effect"):
            continue
        if parameter.name in _listed(entry, BESIDE_OTHERS, "options_beside_others"):
            counts = _counts_somewhere(entry, parameter, marks, bases) if first else None
        else:
            counts = _counts(entry, parameter, component.options, marks, base)
        if counts is False:
            idle.append(parameter.name)
    meant = "options_without_effect, or options_beside_others, may say why"
    require(not idle, f"another value of {', '.join(idle)} changes nothing ({meant})")


def idle_options(entry: registry.Entry, marks: Marks) -> list[str]:
    """The options of which no other value changes any mark, in no case of the entry and none near it."""
    known = _listed(entry, WITHOUT_EFFECT, "options_without_effect")
    wanted = [parameter for parameter in entry.parameters if parameter.name not in known]
    bases = [Kept(marks(case)) for case in entry.cases]
    return [parameter.name for parameter in wanted if _counts_somewhere(entry, parameter, marks, bases) is False]


def _listed(entry: registry.Entry, ours: Mapping[tuple[str, str, str], str], attribute: str) -> dict[str, str]:
    """The entry's options that are listed, here or on its class, with the reason."""
    named = ((entry.kind, ANY), (entry.kind, entry.name))
    found = {option: why for who in named for (kind, name, option), why in ours.items() if (kind, name) == who}
    return found | dict(getattr(entry.factory, attribute, {}))


class Kept:
    """What an iterator gave so far, and then the rest of it, as often as it is asked for; and its refusal likewise."""

    def __init__(self, source: Iterable[Any]) -> None:
        self.source, self.known = iter(source), list[Any]()
        self.refused: InputError | None = None

    def __iter__(self) -> Iterator[Any]:
        yield from self.known
        if self.refused is not None:
            raise self.refused
        try:
            for each in self.source:
                self.known.append(each)
                yield each
        except InputError as error:
            self.refused = error
            raise


def _counts(
    entry: registry.Entry,
    parameter: registry.Parameter,
    case: Mapping[str, Any],
    marks: Marks,
    base: Iterable[Any],
) -> bool | None:
    """Whether some other value makes a difference to `base`, the marks of this case; None where each is refused."""
    built = False
    for other in _others(entry, parameter, case):
        try:
            if differ(base, marks({**case, parameter.name: other})):
                return True
            built = True
        except InputError:
            continue
    return False if built else None


def _counts_somewhere(
    entry: registry.Entry, parameter: registry.Parameter, marks: Marks, bases: Iterable[Iterable[Any]]
) -> bool | None:
    """Whether some other value makes a difference; None where each is refused.

    In one of the registered cases, or, for an option that only counts beside another, in one with another of its
    options changed.
    """
    built = False
    first, rest = _neighbours(entry, parameter)
    named, others = (((case, Kept(marks(case))) for case in cases) for cases in (first, rest))
    for case, base in itertools.chain(named, zip(entry.cases, bases, strict=True), others):
        if parameter.required and parameter.name not in case:
            return None
        found = _counts(entry, parameter, case, marks, base)
        if found:
            return True
        built = built or found is False
    return False if built else None


def _neighbours(
    entry: registry.Entry, parameter: registry.Parameter
) -> tuple[Iterator[dict[str, Any]], Iterator[dict[str, Any]]]:
    """The registered cases with one other option changed: one that `BESIDE_OTHERS` names, and the rest."""
    words = _listed(entry, BESIDE_OTHERS, "options_beside_others").get(parameter.name, "").split()

    def changed(named: bool) -> Iterator[dict[str, Any]]:
        for case in entry.cases:
            for beside in entry.parameters:
                if beside.name == parameter.name or (beside.required and beside.name not in case):
                    continue
                if (beside.name in words) is named:
                    for value in _others(entry, beside, case):
                        yield {**case, beside.name: value}

    return changed(True), changed(False)


def _others(entry: registry.Entry, parameter: registry.Parameter, case: Mapping[str, Any]) -> list[Any]:
    value = case.get(parameter.name, parameter.default)
    return others(entry.options_model.model_fields[parameter.name].annotation, value)


def others(annotation: Any, value: Any) -> list[Any]:
    """Other values that an option of this type may have; some of them may be refused."""
    if isinstance(value, Tensor):
        return []
    kinds = alternatives(annotation)
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
    if isinstance(value, tuple) and value and isinstance(value[0], int | float):
        found += [(each, *value[1:]) for each in others(type(value[0]), value[0])]
    seen: list[Any] = []
    for each in found:  # True == 1, so by type, too
        if not any(type(each) is type(other) and each == other for other in seen):
            seen.append(each)
    return seen


def alternatives(annotation: Any) -> list[Any]:
    """The types of an annotation, each of a union's apart."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return alternatives(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [each for part in typing.get_args(annotation) for each in alternatives(part)]
    return [annotation]


_ROUNDING = 1e-13
"""What is closer than this, absolutely or relatively, is the same number of float64."""


def differ(first: Iterable[Any], second: Iterable[Any]) -> bool:
    """Whether two series of marks differ; no more is computed than is needed to tell."""
    end = object()
    return any(not same(a, b) for a, b in itertools.zip_longest(first, second, fillvalue=end))


def same(a: Any, b: Any) -> bool:
    """Whether two marks are equal, of float64 but for rounding, which is another on each machine.

    What holds tensors is compared part by part.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.dtype == torch.float64:
            return torch.allclose(a, b, rtol=_ROUNDING, atol=_ROUNDING, equal_nan=True)
        return bool(((a == b) | (a != a) & (b != b)).all())  # NaN is NaN
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return same(vars(a), vars(b))
    return bool(a == b)
