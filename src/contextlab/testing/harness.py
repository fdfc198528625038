"""What is held to what: the components of a kind, its laws, and the two ways to put one to the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from contextlab import registry
from contextlab.errors import InputError, unknown
from contextlab.testing import (  # noqa: F401  (importing them makes their laws known)
    adapters,
    conversion_sizes,
    conversions,
    forms,
    learners,
    mixer_numbers,
    mixers,
    mlps,
    models,
    objective,
    packed,
    policies,
    probes,
    sited,
    tasks,
)
from contextlab.testing.law import Component, Law, LawBroken, known_laws

CASES: dict[str, Callable[[registry.Entry], Iterator[Component]]] = {
    "mixer": mixers.cases,
    "mlp": mlps.cases,
    "model": models.cases,
    "task": tasks.cases,
    "learner": learners.cases,
    "policy": policies.cases,
    "conversion": conversions.cases,
    "linear": forms.cases,
    "probe": probes.cases,
}


def laws(kind: str) -> list[Law]:
    """The laws of a kind: "mixer", "mlp", "model", "task", "learner", "policy", "conversion", "linear" or "probe"."""
    if kind not in CASES:
        raise InputError(unknown("kind of component", kind, CASES))
    return known_laws(kind)


def components(kind: str, *names: str) -> list[Component]:
    """Registered components in each option case. names: which; none for all. Raises InputError on unknown ones."""
    if kind not in CASES:
        raise InputError(unknown("kind of component", kind, CASES))
    entries = [registry.lookup(kind, name) for name in names] or registry.entries(kind)
    return [component for entry in entries for component in CASES[kind](entry)]


def parametrize_with_laws(kind: str, *names: str, leave_out: Collection[str] = ()) -> Any:
    """Decorator of a pytest function with an argument `law`: one test for each law and option case.

    kind: "mixer", "mlp", "model", "task", "learner", "policy", "conversion", "linear" or "probe".
    names: registered names; none for all.
    leave_out: names of laws.

    ```python
    @parametrize_with_laws("mixer", "my_mixer")
    def test_my_mixer_keeps_the_laws(law):
        law()
    ```
    """
    import pytest

    known = [law.name for law in laws(kind)]
    for name in leave_out:
        if name not in known:
            raise InputError(unknown(f"law of {kind}", name, known))
    return pytest.mark.parametrize(
        "law",
        [
            pytest.param(functools.partial(law, component), id=f"{component.label}: {law.name}")
            for component in components(kind, *names)
            for law in laws(kind)
            if law.name not in leave_out and law.holds_for(component)
        ],
    )


@dataclass(frozen=True)
class Held:
    """What came of one law for one component: `broken` is None where it is held."""

    law: Law
    component: Component
    broken: LawBroken | None


def check(kind: str, name: str, *, examples: int = 25) -> Iterator[Held]:
    """Hold a registered component to every law of its kind, in all its option cases, one after another.

    examples: the cases that are tried for each law; they are the same each time.
    """
    for component in components(kind, name):
        for law in laws(kind):
            if law.holds_for(component):
                try:
                    law(component, examples=examples)
                except LawBroken as broken:
                    yield Held(law, component, broken)
                else:
                    yield Held(law, component, None)
