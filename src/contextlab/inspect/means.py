"""Means over prompts with 95% intervals, as rows of a probe's table have them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from contextlab.errors import InputError, unknown
from contextlab.evaluation.intervals import share_bounds, t95, usual
from contextlab.prompt import HIGHER_IS_BETTER, Prompt, Task

Measured = dict[str, float | int | None]


def metric_by_prompt(task: Task, prediction: Tensor, prompt: Prompt, metric: str | None = None) -> Tensor:
    """The task's metric of each prompt, [B] float64: the mean over its predictions that count; nan where none does.

    Raises InputError of one that the task does not tell.
    """
    errors, wanted = task.errors(prediction, prompt), task.metric if metric is None else metric
    if wanted not in errors:
        raise InputError(f"metric: {unknown('metric', wanted, errors)}")
    return torch.where(prompt.scored, errors[wanted].double(), 0.0).sum(1) / prompt.scored.sum(1)


def mean_of(values: Tensor, metric: str = "") -> Measured:
    """A mean over prompts with Student's interval; of shares, such as accuracy, Wilson's. values: [prompts]."""
    known = values[~values.isnan()].double()
    n, value = len(known), known.mean().item()
    if n < 2:
        return {"value": value, "ci_low": None, "ci_high": None, "n": n}
    half = t95(n - 1) * known.std().item() / math.sqrt(n)
    low, high = value - half, value + half
    if metric in HIGHER_IS_BETTER:
        _, other = usual(known.cpu().numpy())
        ends = share_bounds(np.array([value]), np.array([half]), np.array([n]), np.asarray(other)[None])
        low, high = (float(end[0]) for end in ends)
    return {"value": value, "ci_low": low, "ci_high": high, "n": n}


def ratio_of(parts: Tensor, wholes: Tensor) -> Measured:
    """The sum of parts over the sum of wholes, with the interval of a ratio of means over prompts. Both: [prompts]."""
    known = ~(parts.isnan() | wholes.isnan())
    parts, wholes = parts[known].double(), wholes[known].double()
    n, value = len(parts), (parts.sum() / wholes.sum()).item()
    if n < 2:
        return {"value": value, "ci_low": None, "ci_high": None, "n": n}
    half = t95(n - 1) * (parts - value * wholes).std().item() / (math.sqrt(n) * abs(wholes.mean().item()))
    return {"value": value, "ci_low": value - half, "ci_high": value + half, "n": n}
