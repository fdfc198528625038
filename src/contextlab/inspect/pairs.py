"""Clean and corrupted prompts in pairs, and how much of the clean answer is in a prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.inspect.means import ratio_of
from contextlab.inspect.probe import Subject
from contextlab.models import Model
from contextlab.prompt import HIGHER_IS_BETTER, Prompt, asked_at, wide

LEAST = 2
"""Pairs, from which on there is an interval."""


@dataclass(frozen=True)
class Pairs:
    """Prompts that ask the same in two contexts, which give two answers (`Task.corrupt`).

    at: [B] int64, the place that asks, in each prompt its own. choice: whether an answer is one of several; else it is
    numbers.
    """

    clean: Prompt
    corrupted: Prompt
    at: Tensor
    choice: bool

    def score(self, prediction: Tensor) -> Tensor:
        """How much of the clean answer is in predictions [B, T, k], [B]; in float32 at least.

        Of choices the logit of the clean answer less that of the corrupted one (of labels -1 and 1 the logit of the
        clean one). Of numbers how far the prediction is on the way from the corrupted target, 0, to the clean one, 1,
        along the line between them: each prompt weighted by the square of the distance, so that two targets that are
        near each other do not count as much as two that are far apart.
        """
        rows = torch.arange(len(self.at), device=self.at.device)
        given = wide(prediction)[rows, self.at]
        clean, corrupted = (each.targets[rows, self.at] for each in (self.clean, self.corrupted))
        if not self.choice:
            way = (clean - corrupted).to(given)
            return ((given - corrupted) * way).sum(-1) / way.square().sum(-1).mean()
        if not clean.is_floating_point():
            return (given.gather(1, clean[:, None]) - given.gather(1, corrupted[:, None]))[:, 0]
        if clean.shape[-1] == 1:
            return (given * clean)[:, 0]
        return (given * (clean - corrupted)).sum(-1)


def pairs_of(subject: Subject, count: int, draw: int = 0) -> Pairs:
    """Pairs of the subject's task, in the model's precision, without those that the task finds no other answer for.

    draw: another one draws other pairs, 2 apart. Raises InputError where the task tells no corrupted prompts, or finds
    fewer than two.
    """
    task = subject.task
    drawn = task.sample(count, subject.generator(draw), subject.device)
    corrupted = task.corrupt(drawn, subject.generator(draw + 1))
    at = asked_at(drawn, corrupted)
    kept = (at >= 0).nonzero()[:, 0]
    if len(kept) < LEAST:
        raise InputError(f"{len(kept)} of {count} prompts have a context that gives another answer; take more prompts")
    clean, corrupted = (each.take(kept).to(subject.dtype) for each in (drawn, corrupted))
    choice = task.read_in == "token" or task.metric in HIGHER_IS_BETTER
    return Pairs(clean, corrupted, at[kept], choice)


def pairs_refusal(subject: Subject) -> str:
    """Why the subject's task has no pairs; "" where it has."""
    try:
        pairs_of(subject, 8)
    except InputError as error:
        return str(error).removeprefix("corrupt: ")
    return ""


def share_of(part: Tensor, whole: Tensor) -> dict[str, Any]:
    """The mean of parts [B] over the mean of wholes [B], with the interval of a ratio of means, as columns."""
    if not whole.double().mean():
        raise InputError("the model answers clean and corrupted prompts alike; there is nothing to be brought back")
    return dict(ratio_of(part, whole))


def margin_of(pairs: Pairs, model: Model) -> Tensor:
    """How much more of the clean answer the clean prompts have than the corrupted ones, [B]."""
    with torch.no_grad():
        high, low = (pairs.score(model(each.inputs)) for each in (pairs.clean, pairs.corrupted))
    return high - low
