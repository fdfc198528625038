"""How good a model is on prompts kept for decisions: of the training's kind, neither trained on nor reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.models.answer import answer
from contextlab.prompt import Prompt, Task
from contextlab.spec import Spec
from contextlab.training.distributed import seeded

Z95 = 1.959964


class ValidationSpec(Spec):
    """The prompts of a validation, drawn from a stream of their own, whatever the seeds of training and evaluation.

    prompts: of each task. batch: answered at once. seed: of the prompts.
    """

    prompts: PositiveInt = 1024
    batch: PositiveInt = 256
    seed: NonNegativeInt = 0


class Score(NamedTuple):
    """The task's metric: its mean over prompts, the ends of its 95% interval over prompts, how many those are.

    One prompt has no interval: the ends are nan.
    """

    value: float
    ci_low: float
    ci_high: float
    n: int


def validate(
    model: Any,
    task: Task,
    spec: ValidationSpec,
    *,
    metric: str | None = None,
    device: torch.device | str = "cpu",
    apart: Callable[[Prompt], Prompt] | None = None,
    stream: str = "validation",
) -> Score:
    """Measure a model by one metric of the task; whether it was training is as before afterwards.

    model: a `Model` on `device`. metric: None takes the task's own.
    apart: leaves out of a batch the prompts that it was trained on.
    stream: of the prompts, in a word; each has prompts of its own.

    Raises InputError for a metric that the task does not have, and where no prompt is left.
    """
    wanted = metric or task.metric
    return validate_all(model, task, spec, [wanted], device=device, apart=apart, stream=stream)[wanted]


def validate_all(
    model: Any,
    task: Task,
    spec: ValidationSpec,
    metrics: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    apart: Callable[[Prompt], Prompt] | None = None,
    stream: str = "validation",
) -> dict[str, Score]:
    """The same by several metrics, from one reading of the prompts: metric -> its score."""
    found = values_of(model, task, spec, metrics, device=device, apart=apart, stream=stream)
    return {metric: score_of(values) for metric, values in found.items()}


def values_of(
    model: Any,
    task: Task,
    spec: ValidationSpec,
    metrics: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    apart: Callable[[Prompt], Prompt] | None = None,
    stream: str = "validation",
) -> dict[str, Tensor]:
    """What `validate_all` tells the means of: metric -> each prompt's value, [prompts] float64."""
    generator = seeded(stream, spec.seed, device=device)
    means: dict[str, list[Tensor]] = {metric: [] for metric in metrics}
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, spec.prompts, spec.batch):
                prompt = task.sample(min(spec.batch, spec.prompts - start), generator, device)
                if apart is not None and not (prompt := apart(prompt)).batch:
                    continue
                errors = task.errors(answer(model, prompt), prompt)
                count = prompt.scored.sum(1)
                for metric, found in means.items():
                    if metric not in errors:
                        raise InputError(f"metric {metric!r}: the task measures {', '.join(errors)}")
                    each = torch.where(prompt.scored, errors[metric].double(), 0.0).sum(1) / count
                    found.append(each[count > 0].cpu())  # what the model answers with nan stays: it is no good answer
    finally:
        model.train(before)
    if not all(means.values()):
        raise InputError("validation: the model was trained on all of the prompts")
    return {metric: torch.cat(found) for metric, found in means.items()}


def score_of(values: Tensor) -> Score:
    """Of the prompts' values [prompts]."""
    mean, n = values.mean().item(), len(values)
    half = Z95 * (values.var().item() / n) ** 0.5 if n > 1 else math.nan
    return Score(mean, mean - half, mean + half, n)
