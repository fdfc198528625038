"""The bases of tasks: layouts, labels, what is hidden, presets, and the words of a prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

import contextlab.tasks  # noqa: F401  (registers every task)
from contextlab import TaskSpec, build_task
from contextlab.errors import InputError
from contextlab.prompt import Learner
from contextlab.tasks.base import Drawn, LabelTask, lay_out


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Signs(LabelTask):
    """The sign of x's first number; not registered."""

    def __post_init__(self) -> None:
        """Nothing to check."""

    def draw(self, batch, generator, device):
        xs = torch.randn(batch, self.examples, self.dimensions, generator=generator, device=device)
        return Drawn(xs, xs[..., :1].sign(), hidden={"first": xs[:, 0, :1]})

    def learners(self) -> dict[str, Learner]:
        return {}


@pytest.mark.parametrize("layout", ["paired", "interleaved"])
def test_layouts_show_every_answer_after_it_was_asked_for(layout: str) -> None:
    xs, ys = torch.randn(2, 5, 3), torch.randn(2, 5, 2)
    prompt = lay_out(Drawn(xs, ys), layout)
    at = prompt.at.tolist()
    assert prompt.inputs.shape == ((2, 5, 8) if layout == "paired" else (2, 10, 5))
    assert torch.equal(prompt.targets[:, at], ys)
    assert prompt.scored.sum(1).tolist() == [5, 5]
    assert torch.equal(prompt.shot[0, at], torch.arange(5))
    for i, t in enumerate(at):
        shown = prompt.inputs[0, : t + 1].flatten().tolist()
        assert all(value in shown for value in xs[0, i].tolist())
        assert not any(value in shown for value in ys[0, i].tolist())
        assert all(value in shown for y in ys[0, :i].tolist() for value in y)


def test_labels_are_scored_by_the_sign_and_the_logit() -> None:
    task = Signs(dimensions=2, examples=4)
    prompt = task.sample(3, generator())
    sure = 100 * prompt.targets
    assert task.errors(sure, prompt)["accuracy"].min() == 1
    assert task.errors(-sure, prompt)["accuracy"].max() == 0
    nothing = torch.zeros_like(sure)
    assert task.errors(nothing, prompt)["accuracy"].eq(0.5).all()
    assert task.loss(nothing, prompt).item() == pytest.approx(math.log(2))
    assert task.loss(sure, prompt) < 1e-6


def test_what_is_hidden_travels_with_the_prompt() -> None:
    prompt = Signs(dimensions=2, examples=4).sample(3, generator())
    assert torch.equal(prompt.rows(1, 3).hidden["first"], prompt.hidden["first"][1:3])
    assert prompt.to(torch.float64).hidden["first"].dtype == torch.float64


def test_presets_are_options_that_can_be_changed_again() -> None:
    assert build_task("linear_regression", preset="easy").dimensions == 5
    assert TaskSpec(name="linear_regression", preset="easy", options={"examples": 3}).build().examples == 3
    with pytest.raises(InputError, match="unknown preset of task 'linear_regression' 'esay'; did you mean 'easy'"):
        build_task("linear_regression", preset="esay")
