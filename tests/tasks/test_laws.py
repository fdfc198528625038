"""The laws that every registered task is held to, in each of its option cases.

The law "small sizes" is put to each option by itself in test_bad_input.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import contextlab.tasks  # noqa: F401  (registers every task)
from contextlab import build_task, registry
from contextlab.learners import Ridge
from contextlab.prompt import Prompt
from contextlab.tasks.recall import AssociativeRecall
from contextlab.tasks.regression import LinearRegression
from contextlab.testing import Component, LawBroken, laws, parametrize_with_laws

LAWS = {law.name: law for law in laws("task")}


@parametrize_with_laws("task", leave_out=("small sizes",))
def test_laws(law: Callable[[], None]) -> None:
    law()


@pytest.mark.parametrize("entry", registry.entries("task"), ids=lambda entry: entry.name)
def test_every_task_has_an_easy_and_a_hard_preset(entry: registry.Entry) -> None:
    assert {"easy", "hard"} <= set(entry.factory.presets)


# Tasks that break one law each, and must be caught. They are no registered ones, so they do not check their options.


@dataclass(frozen=True)
class Regression(LinearRegression):
    dimensions: int = 2
    examples: int = 6

    def __post_init__(self) -> None: ...


@dataclass(frozen=True)
class Recall(AssociativeRecall):
    def __post_init__(self) -> None: ...


class Wider(Regression):
    """Says another size of inputs than it draws."""

    @property
    def input_size(self) -> int:
        return 99


class Fixed(Regression):
    """Draws from a seed of its own."""

    def sample(self, batch: int, generator: torch.Generator, device: Any = "cpu") -> Prompt:
        return super().sample(batch, torch.Generator().manual_seed(0), device)


class Unseeded(Regression):
    """Draws from the global generator."""

    def sample(self, batch: int, generator: torch.Generator, device: Any = "cpu") -> Prompt:
        return super().sample(batch, torch.Generator().manual_seed(int(torch.randint(2**31, ()))), device)


class Hopeless(Regression):
    """Names a learner first that has learned nothing."""

    def learners(self) -> dict[str, Any]:
        return {"zero": lambda prompt: torch.full_like(prompt.targets, 9.0)}


class WorstFirst(Regression):
    """Names a learner first that others are better than."""

    def learners(self) -> dict[str, Any]:
        return {"nine": lambda prompt: torch.full_like(prompt.targets, 9.0), "ridge": Ridge(0.1)}


class Boasts(Regression):
    """Says a chance of 0."""

    def chance(self) -> dict[str, float]:
        return {"squared_error": 0.0}


class ShowsAnswers(Recall):
    """Shows each answer where it asks for it."""

    def sample(self, batch: int, generator: torch.Generator, device: Any = "cpu") -> Prompt:
        prompt = super().sample(batch, generator, device)
        prompt.targets = prompt.inputs
        return prompt


class RowByRow(Recall):
    """Its loss is the mean over prompts of each one's mean, and some prompts have one scored position less."""

    def sample(self, batch: int, generator: torch.Generator, device: Any = "cpu") -> Prompt:
        prompt = super().sample(batch, generator, device)
        prompt.scored[::2] &= prompt.scored[::2].cumsum(1) > 1
        return prompt

    def loss(self, prediction: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        each = self.errors(prediction, prompt)["cross_entropy"] * prompt.scored
        return (each.sum(1) / prompt.scored.sum(1)).mean()


class SplitsAlike(Regression):
    """Has a split that says another noise and draws the same."""

    def splits(self) -> dict[str, Any]:
        return {"train": self, "long": Regression()}


class CorruptsNothing(Recall):
    """Its corrupted prompts are the clean ones."""

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        return prompt


class CorruptsInPlace(Recall):
    """It writes into the clean prompt."""

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        found = super().corrupt(prompt, generator)
        prompt.inputs[:] = found.inputs
        return found


class CorruptsTheAnswer(Recall):
    """It says other answers, and the context is as it was."""

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        return replace(super().corrupt(prompt, generator), inputs=prompt.inputs)


class AsksAnew(Recall):
    """It asks other questions."""

    def corrupt(self, prompt: Prompt, generator: torch.Generator) -> Prompt:
        return self.sample(prompt.batch, generator)


@pytest.mark.parametrize(
    ("broken", "law", "reason"),
    [
        (Wider, "prompts", "inputs are 5 wide, input_size is 99"),
        (Fixed, "seed", "another seed draws the same inputs"),
        (Unseeded, "seed", "the same seed draws other inputs"),
        (Fixed, "next batch", "the next batch has the same prompts"),
        (Hopeless, "best learner", "squared_error is .*, chance"),
        (WorstFirst, "best first", "ridge is better than nine, by .* of squared_error"),
        (SplitsAlike, "splits", "split 'long' draws the prompts of 'train'"),
        (Boasts, "chance", "squared_error of guesses is .*, chance says 0"),
        (ShowsAnswers, "hidden answers", "100% of the answers stand 0 tokens before"),
        (CorruptsNothing, "corrupted", "in 64 of 64 rows the question has no other answer"),
        (CorruptsInPlace, "corrupted", "the prompt has changed"),
        (CorruptsTheAnswer, "corrupted", "its best learner answers as to the clean prompt"),
        (AsksAnew, "corrupted", "in .* of 64 rows the question has no other answer"),
        (RowByRow, "objective", "cut into 4 parts the loss is off by .* of the whole batch's"),
    ],
)
def test_a_broken_task_is_found_out(broken: type, law: str, reason: str) -> None:
    with pytest.raises(LawBroken, match=reason):
        LAWS[law](Component("task", broken.__name__, broken))


def test_a_broken_preset_and_a_broken_size_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry.Entry("task", "wider", Wider)
    monkeypatch.setitem(registry._entries["task"], "wider", entry)
    for law, reason in (("presets", "input_size is 99"), ("small sizes", "dimensions=0|it is not refused")):
        with pytest.raises(LawBroken, match=reason):
            LAWS[law](Component("task", "wider", Wider))


def test_no_oracle_is_the_best_known() -> None:
    for entry in registry.entries("task"):
        for options in entry.cases:
            assert "oracle" not in next(iter(build_task(entry.name, **options).learners()))
