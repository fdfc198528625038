"""The laws that every learner is held to, on every task that names it, in each of the task's option cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from pydantic import PositiveFloat
from torch import Tensor

import contextlab.tasks  # noqa: F401  (registers every task)
from contextlab import build_task, registry
from contextlab.errors import InputError
from contextlab.learners import (
    BaumWelch,
    BayesMixture,
    BestArmPosterior,
    BigramBackcopyLearner,
    ChainLearner,
    ClassPosterior,
    ExponentialWeights,
    GradientDescent,
    KernelSmoother,
    MarkovOracle,
    SampledFormulas,
    ThompsonSampling,
)
from contextlab.prompt import Learner, Prompt
from contextlab.testing import Component, LawBroken, laws
from contextlab.testing.learners import cases, looks_ahead, of_task

TASKS = [
    pytest.param(entry, options, id=f"{entry.name}-{number}")
    for entry in registry.entries("task")
    for number, options in enumerate(entry.cases)
]
OPTIONS = "options"
LAWS = {law.name: law for law in laws("learner") if law.name != OPTIONS}
UNNAMED = (
    "exponential_weights",
    "gaussian_smoother",
    "gd_plus_plus",
    "kernel_ridge",
    "omp",
    "pool_posterior",
    "preconditioned_gd",
)
"""Learners that no task's registered case names."""


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("entry", "options"), TASKS)
def test_learners_keep_the_laws(entry: registry.Entry, options: dict, law: str) -> None:
    for component in of_task(entry.name, entry.build(**options)):
        LAWS[law](component)


@cache
def modes() -> dict[type, dict[object, Component]]:
    """Each learner beside the first task case that names it, and beside the first for each choice of its options."""
    found: dict[type, dict[object, Component]] = {}
    for each in TASKS:
        entry, options = each.values
        for component in of_task(entry.name, entry.build(**options)):
            chosen = {name: x for name, x in vars(component.build()).items() if isinstance(x, str | bool | None)}
            found.setdefault(component.factory, {}).setdefault(str(chosen), component)
    return found


@pytest.mark.parametrize("entry", registry.entries("learner"), ids=lambda entry: entry.name)
def test_every_option_of_a_learner_counts(entry: registry.Entry) -> None:
    law = next(law for law in laws("learner") if law.name == OPTIONS)
    found = [] if entry.name in UNNAMED else list(modes()[entry.factory].values())
    if entry.name in ("exponential_weights", "pool_posterior"):
        found = named_by_none(entry.name)
    elif not found:
        task = build_task("linear_regression", dimensions=4, examples=10, noise=0.3)
        make = partial(entry.build, **entry.cases[-1])
        found = [Component("learner", entry.name, entry.factory, entry.cases[-1], make, task)]
    for component in found:
        law(component)


def named_by_none(name: str) -> list[Component]:
    if name == "pool_posterior":  # it needs a pool
        task = build_task("linear_regression", dimensions=3, examples=6, pool=4)
        return [component for component in of_task("pool", task) if component.name == name]
    if name == "exponential_weights":  # it needs members
        learner = ExponentialWeights((GradientDescent(2, 0.1), KernelSmoother()), 0.5)
        task = build_task("mixed_regression", dimensions=3, examples=6)
        return [Component("learner", name, ExponentialWeights, {}, lambda: learner, task)]
    return list(itertools.islice(cases(registry.lookup("learner", name)), 4))  # on the first tasks that it answers


@pytest.mark.parametrize("name", UNNAMED)
def test_learners_that_no_task_names_keep_them_too(name: str) -> None:
    found = named_by_none(name)
    assert found
    for component in found:
        for law in LAWS.values():
            law(component)


def test_every_learner_is_held_to_the_laws() -> None:
    named = {type(learner) for each in TASKS for learner in each.values[0].build(**each.values[1]).learners().values()}
    ours = {e.name: e.factory for e in registry.entries("learner") if e.factory.__module__.startswith("contextlab.")}
    assert sorted(name for name, factory in ours.items() if factory not in named) == list(UNNAMED)


@dataclass(frozen=True)
class Peek(Learner):
    """Knows what it should not."""

    of: str

    def __call__(self, prompt: Prompt) -> Tensor:
        if self.of == "targets":
            return prompt.targets
        if self.of == "hidden":
            return torch.zeros_like(prompt.targets) + (prompt.hidden is None)
        return getattr(prompt, self.of).sum(-1, keepdim=True).roll(-1, 1)


@pytest.mark.parametrize("of", ["targets", "hidden", "inputs", "ys"])
def test_a_learner_that_looks_ahead_is_found_out(of: str) -> None:
    assert looks_ahead(Peek(of), build_task("polynomial_series", examples=6))


class OneTooFew(Learner):
    """Leaves out the last position."""

    def __call__(self, prompt: Prompt) -> Tensor:
        return torch.zeros_like(prompt.targets)[:, :-1]


class Endless(Learner):
    """Is infinitely sure."""

    def __call__(self, prompt: Prompt) -> Tensor:
        return torch.full_like(prompt.targets, torch.inf)


class Averages(Learner):
    """Answers with the batch's mean."""

    def __call__(self, prompt: Prompt) -> Tensor:
        return prompt.inputs[:, :, :1].mean(0, keepdim=True).expand_as(prompt.targets).contiguous()


class Draws(Learner):
    """Draws from the global generator."""

    def __call__(self, prompt: Prompt) -> Tensor:
        return torch.rand_like(prompt.targets)


class Scribbles(Learner):
    """Writes into the prompt."""

    def __call__(self, prompt: Prompt) -> Tensor:
        prompt.inputs.mul_(2)
        return torch.zeros_like(prompt.targets)


@pytest.mark.parametrize(
    ("broken", "law", "reason"),
    [
        (Peek("ys"), "causality", "predictions change with another prompt after 0"),
        (OneTooFew(), "shapes", r"it answers \[3, 5, 1\], expected \[3, 6, 1\]"),
        (Endless(), "shapes", "not finite"),
        (Averages(), "batch", "row 0 is answered"),
        (Draws(), "repeated", "the same prompt is answered otherwise"),
        (Scribbles(), "repeated", "it changes the prompt's inputs"),
    ],
)
def test_a_broken_learner_is_found_out(broken: Learner, law: str, reason: str) -> None:
    task = build_task("linear_regression", dimensions=2, examples=6)
    component = Component("learner", "broken", type(broken), {}, lambda: broken, task)
    with pytest.raises(LawBroken, match=reason):
        LAWS[law](component)


@dataclass(frozen=True)
class Idle(Learner):
    """Has an option that nothing reads."""

    strength: PositiveFloat = 1.0
    shift: float = 0.0

    def __call__(self, prompt: Prompt) -> Tensor:
        return torch.zeros_like(prompt.targets) + self.shift


def test_a_learner_with_an_idle_option_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._entries["learner"], "idle", registry.Entry("learner", "idle", Idle))
    task = build_task("linear_regression", dimensions=2, examples=6)
    law = next(law for law in laws("learner") if law.name == OPTIONS)
    with pytest.raises(LawBroken, match="another value of strength changes no answer"):
        law(Component("learner", "idle", Idle, {}, Idle, task))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BestArmPosterior(5, noise=0.0), "noise: input should be greater than 0"),
        (lambda: BestArmPosterior(5, grid=0), "grid"),
        (lambda: ThompsonSampling(0), "arms"),
        (lambda: SampledFormulas(4, noise=1.5), "noise"),
        (lambda: BaumWelch(vocabulary=True), "vocabulary: expected a number, got bool True"),
        (lambda: BayesMixture(()), "a mixture needs at least one learner"),
        (lambda: ClassPosterior(torch.zeros(2, 3), torch.zeros(2).long(), torch.ones(2), 0.1, bursty=1.5), "bursty"),
        (
            lambda: BigramBackcopyLearner(5, torch.eye(4), torch.tensor([1])),
            r"shape \[4, 4\]: vocabulary 5 needs \[5, 5\]",
        ),
    ],
)
def test_options_that_cannot_be_are_refused_however_a_learner_is_made(make: Callable[[], Learner], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_sizes_that_fit_no_prompt_are_refused_when_it_is_answered() -> None:
    drawn = torch.Generator().manual_seed(0)
    chain = build_task("markov_chain").sample(2, drawn)
    with pytest.raises(InputError, match="markov_oracle is for vocabulary 3; the prompt's is"):
        MarkovOracle(3)(chain)
    thought = build_task("chain_of_thought", dimensions=3, hidden=2, layers=1, examples=10).sample(2, drawn)
    with pytest.raises(InputError, match="with shown 'examples' predicts 1 numbers; got 3"):
        ChainLearner(3, 2, shown="examples")(thought)
    with pytest.raises(InputError, match="needs examples of x, 3 layers and y"):
        ChainLearner(3, 2, layers=3)(thought)
