"""A law: a statement about every component of one kind, and a check that finds the smallest case that breaks it.

```python
@law("mixer", "causality", "Outputs do not change when later inputs do.", reading=readings())
def causality(component: Component, reading: Reading) -> None: ...
```
"""

from __future__ import annotations

import math
import random
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, HypothesisException
from torch import Tensor

from contextlab.errors import InputError
from contextlab.plugins import line_in


class LawBroken(AssertionError):
    """A component breaks a law: `law`, `component`, `reason` in one line, and the smallest `case` that shows it."""

    def __init__(self, law: Law, component: Component, reason: str, case: str) -> None:
        shown = f" (smallest case found: {case})" if case else ""
        super().__init__(f"{component.kind} {component.label} breaks the law {law.name!r}: {reason}{shown}")
        self.law, self.component, self.reason, self.case = law, component, reason, case


@dataclass(frozen=True)
class Component:
    """One component under test, with the options of one of its registered cases.

    factory: what is registered, a class or function; it need not be registered to be held to a law.
    make: called without arguments, or with further options, it gives a fresh one; None calls the factory.
    beside: what it is tried with, of a learner the task.
    """

    kind: str
    name: str
    factory: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    make: Callable[..., Any] | None = field(default=None, repr=False)
    beside: Any = field(default=None, repr=False)

    @property
    def label(self) -> str:
        """Its name and options, in few characters."""
        shown = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}[{shown}]" if shown else self.name

    def build(self, **more: Any) -> Any:
        """A fresh one."""
        return self.factory(**self.options, **more) if self.make is None else self.make(**more)


class Drawing(Protocol):
    """What a law draws for a component: any of what there is, and such as are most likely to break it."""

    def __call__(self, component: Component) -> st.SearchStrategy[Any]:
        """Any, the simplest first."""

    def typical(self, component: Component, number: int, chance: random.Random) -> Any:
        """One that asks for much at once; `number` counts those of a law."""


Draws = st.SearchStrategy[Any] | Drawing
TYPICAL = 4
"""Typical cases that are tried before any are searched for."""


def always(component: Component) -> bool:
    """A law that holds for all."""
    return True


@dataclass(frozen=True)
class Law:
    """One law of a kind of component.

    name: a word or few. statement: what holds, in one line.
    check: called with the component and what is drawn; it raises any error where the law is broken.
    draws: argument of `check` -> Hypothesis strategy, or what gives one for a component, and typical cases. Empty:
        `check` is called once.
    holds_for: the components that it is about.
    share: of the examples that a Hypothesis profile asks for, those that it is tried on: below 1 where cases are much
        alike, as where no cut is used of what is drawn.
    """

    kind: str
    name: str
    statement: str
    check: Callable[..., None] = field(repr=False)
    draws: Mapping[str, Draws] = field(default_factory=dict, repr=False)
    holds_for: Callable[[Component], bool] = field(default=always, repr=False)
    share: float = field(default=1.0, repr=False)

    def __call__(self, component: Component, *, examples: int | None = None) -> None:
        """Hold the component to the law. Raises LawBroken.

        examples: cases to try, the same each time; None leaves their number (but for `share`) and choice to the
            Hypothesis profile.
        """
        case = ""

        def attempt(seed: int, drawn: Mapping[str, Any]) -> None:
            nonlocal case
            shown = [f"{name}: {value}" for name, value in drawn.items()] + (
                [f"parameters of seed {seed}"] if drawn else []
            )
            case = ", ".join(shown)  # the last case that Hypothesis tries is the smallest that fails
            with torch.random.fork_rng(devices=[]):
                seed_cpu(seed)
                self.check(component, **drawn)

        try:
            if self.draws:
                self._try(component, attempt, examples)
            else:
                attempt(0, {})
        except Flaky as error:
            said = "it fails on a case that it then passes: it is not deterministic"
            raise LawBroken(self, component, said, case) from error
        except HypothesisException:  # the law itself is wrong
            raise
        except Exception as error:
            raise LawBroken(self, component, in_one_line(error) + raised_at(error, component), case) from error

    def _try(self, component: Component, attempt: Attempt, examples: int | None) -> None:
        """Typical cases, which take no search and no least ones, and what more is asked for by Hypothesis."""
        name = f"{self.name} {component.label}"
        draws = {key: each(component) if callable(each) else each for key, each in self.draws.items()}
        count = math.ceil(self.share * settings().max_examples) if examples is None else examples
        typical = {key: each.typical for key, each in self.draws.items() if not isinstance(each, st.SearchStrategy)}
        first = min(count, TYPICAL) if typical.keys() == draws.keys() else 0
        for number in range(first):
            chance = random.Random(crc32(f"{name} {number}".encode()))
            drawn = {key: each(component, number, chance) for key, each in typical.items()}
            seed = chance.randrange(2**31)
            try:
                attempt(seed, drawn)
            except Exception:
                search(name, attempt, draws, max(count, 100))  # for a smaller one
                attempt(seed, drawn)
                raise
        if count > first:
            search(name, attempt, draws, examples, self.share)


Attempt = Callable[[int, Mapping[str, Any]], None]


def seed_cpu(seed: int) -> None:
    """Seed what is drawn on the CPU, and nothing else.

    `torch.manual_seed` would also note a seed for each device that may be used later, with a stack trace: a law that
    tries many cases spends as long on that as on what it holds.
    """
    torch.default_generator.manual_seed(seed)


def search(
    name: str,
    attempt: Attempt,
    draws: Mapping[str, st.SearchStrategy[Any]],
    examples: int | None,
    share: float = 1.0,
) -> None:
    """Call `attempt` with seeds and draws until it fails, then with ever smaller ones; raises what the smallest did."""

    def body(drawn_seed: int, drawn: Mapping[str, Any]) -> None:
        attempt(drawn_seed, drawn)

    body.__name__ = re.sub(r"\W", "_", name)  # under which Hypothesis remembers what failed
    options: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    options |= {"report_multiple_bugs": False, "phases": [p for p in Phase if p is not Phase.explain]}
    if examples is not None:
        options |= {"max_examples": examples, "derandomize": True, "database": None}
    elif share < 1:
        options["max_examples"] = math.ceil(share * settings().max_examples)
    held = given(st.integers(0, 2**31), st.fixed_dictionaries(dict(draws)))(settings(**options)(body))
    if options.get("derandomize", settings().derandomize):
        # Hypothesis would draw by this file's source: the same few cases for every law and component.
        held = seed(crc32(name.encode()))(held)
    held()


_laws: dict[str, dict[str, Law]] = {}


def law(
    kind: str,
    name: str,
    statement: str,
    *,
    holds_for: Callable[[Component], bool] = always,
    share: float = 1.0,
    **draws: Draws,
) -> Callable[[Callable[..., None]], Law]:
    """Decorator: make a check a law of all components of a kind. It stands in the order of its definition."""

    def add(check: Callable[..., None]) -> Law:
        made = Law(kind, name, statement, check, draws, holds_for, share)
        _laws.setdefault(kind, {})[name] = made
        return made

    return add


def known_laws(kind: str) -> list[Law]:
    """The laws of a kind, in order."""
    return list(_laws.get(kind, {}).values())


def in_one_line(error: BaseException) -> str:
    """What an error says, in one line; errors that no law raised with their type."""
    said = " ".join(str(error).split()) or "it raised"
    return said if type(error) is AssertionError and str(error) else f"{type(error).__name__}: {said}"


def raised_at(error: BaseException, component: Component) -> str:
    """`, at line 12 of my_mixer.py`, where an error that no law raised came from the component's own file; else ""."""
    file = getattr(sys.modules.get(component.factory.__module__), "__file__", None)
    line = None if type(error) is AssertionError or file is None else line_in(error, Path(file))
    return "" if line is None or file is None else f", at line {line} of {Path(file).name}"


def require(holds: object, otherwise: str) -> None:
    """Raises AssertionError with these words unless it holds."""
    if not holds:
        raise AssertionError(otherwise)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-9, what: str = "outputs") -> None:
    """Raises AssertionError unless two tensors agree within `tolerance`, in parts of the largest where that is over 1.

    got, expected: of the same shape and dtype.
    """
    require(got.shape == expected.shape, f"{what} have shape {list(got.shape)}, expected {list(expected.shape)}")
    require(got.dtype == expected.dtype, f"{what} have dtype {got.dtype}, expected {expected.dtype}")
    if not expected.numel():
        return
    got, expected = got.detach(), expected.detach()
    allowed = tolerance * max(1.0, expected.abs().max().item())
    difference = torch.where(got == expected, 0.0, (got - expected).abs()).max().item()  # infinities may agree
    require(difference <= allowed, f"{what} differ by {difference:.3g}, allowed {allowed:.3g}")


def refused(call: Callable[[], object], *words: str) -> None:
    """Raises AssertionError unless `call` raises an InputError of one line that has these words in it."""
    try:
        call()
    except InputError as error:
        for each in words:
            require(each in str(error), f"refused in other words: {error}; expected {each!r}")
        require("\n" not in str(error), f"refused in more than one line: {error}")
        return
    raise AssertionError(f"it is not refused: expected an InputError that says {words[0]!r}")
