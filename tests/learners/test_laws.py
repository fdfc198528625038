"""The laws that every learner is held to, on every task that names it, in each of the task's option cases."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import contextlab.tasks  # noqa: F401  (registers every task)
from contextlab import build_task, registry
from contextlab.prompt import Learner, Prompt
from contextlab.testing import Component, LawBroken, laws
from contextlab.testing.learners import cases, looks_ahead, of_task

TASKS = [
    pytest.param(entry, options, id=f"{entry.name}-{number}")
    for entry in registry.entries("task")
    for number, options in enumerate(entry.cases)
]
LAWS = {law.name: law for law in laws("learner")}
UNNAMED = ("kernel_ridge", "omp", "pool_posterior", "preconditioned_gd")
"""Learners that no task's registered case names."""


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("entry", "options"), TASKS)
def test_learners_keep_the_laws(entry: registry.Entry, options: dict, law: str) -> None:
    for component in of_task(entry.name, entry.build(**options)):
        LAWS[law](component)


@pytest.mark.parametrize("name", UNNAMED)
def test_learners_that_no_task_names_keep_them_too(name: str) -> None:
    if name == "pool_posterior":  # it needs a pool
        task = build_task("linear_regression", dimensions=3, examples=6, pool=4)
        found = [component for component in of_task("pool", task) if component.name == name]
    else:
        found = list(cases(registry.lookup("learner", name)))
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
