"""What can be read off what a model holds, by a linear map: ridge regression and classes, beside controls."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from contextlab.errors import InputError, unknown
from contextlab.evaluation.evaluate import _evaluating
from contextlab.evaluation.intervals import Z95, share_bounds
from contextlab.inspect.capturing import capture
from contextlab.inspect.layout import STATE, chosen
from contextlab.models import Model, build_model
from contextlab.models.routing import RoutedState
from contextlab.prompt import Prompt, Task, last_scored
from contextlab.spec import describe
from contextlab.state import KVState, State

COLUMNS = ("site", "place", "measure", "value", "ci_low", "ci_high", "shuffled", "untrained", "n")
STRENGTHS = tuple(10.0**power for power in range(-6, 5))
"""Of ridge regression on features of unit variance, for each prompt; the best on held-out prompts is taken."""
BATCH = 256
TARGET = "target"


@torch.no_grad()
def linear_probe(
    model: Model,
    task: Task,
    what: str = TARGET,
    sites: str | Iterable[str] = "blocks.*.output",
    *,
    place: int | None = -1,
    prompts: int = 1024,
    test: int = 512,
    untrained: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """How well a linear map reads something off what a model holds after one token, beside two controls.

    model: of ours. task: whose prompts it reads.
    what: a name in the task's `Prompt.hidden`, such as "weights" of regressions, or "target", what is to be predicted
        at the place. Numbers are read by ridge regression, classes by least squares on their indicators; the strength
        is that which does best on a fifth of the prompts.
    sites: places that hold tensors [B, T, ...], or states whose size does not depend on the text; all of one is read.
    place: of the token, from the beginning, or from the end where it is below 0; None: of each prompt its last one
        whose prediction counts.
    prompts: to fit on. test: fresh ones to measure on. seed: of both.
    untrained: whether to read the same off a model of the same form with fresh weights.

    Returns a row a site: `measure`, "r2" (the share of the variance over prompts that is told) or "accuracy"; its value
    with a 95% interval over the test prompts; `shuffled`, the same where the map was fitted to what belongs to other
    prompts; `untrained`. What is read off is there, not necessarily used.

    The model is read as one that is not in training.

    Raises InputError where the model does not read such prompts, the task does not know `what`, the place is beyond the
    prompt, or a site grows with the text.
    """
    if not isinstance(model, Model):
        raise InputError(f"linear_probe: expected a Model, got {type(model).__name__}")
    if not hasattr(task, "read_in"):
        raise InputError(f"linear_probe: expected a task (contextlab.build_task makes one), got {describe(task)}")
    theirs, ours = (task.read_in, task.input_size), (model.spec.read_in, model.spec.input_size)
    if theirs != ours:
        raise InputError(
            f"the task's tokens are {_tokens(*theirs)}, and the model reads {_tokens(*ours)}; take its own task"
        )
    for name, given in (("place", place), ("prompts", prompts), ("test", test), ("seed", seed)):
        if not isinstance(given, int) and (given, name) != (None, "place"):
            raise InputError(f"{name}: expected a whole number, got {describe(given)}")
    if prompts < 10 or test < 2:
        raise InputError(f"prompts: expected at least 10 to fit on and 2 to test on, got {prompts} and {test}")
    generator = torch.Generator().manual_seed(seed)
    drawn = task.sample(prompts + test, generator)
    at = places_at(drawn, place)
    wanted = wanted_at(drawn, what, place, at)
    with _evaluating(model):
        held = features_at(model, drawn, sites, at)
    fresh = features_at(fresh_model(model, seed + 1), drawn, sites, at) if untrained else None
    order = torch.randperm(prompts, generator=generator)
    rows = []
    for site, features in held.items():
        value, low, high = _measured(features, wanted, wanted[:prompts])
        told: dict[str, Any] = {
            "site": site,
            "place": None if place is None else place % drawn.length,
            "value": value,
            "ci_low": low,
            "ci_high": high,
        }
        told["measure"] = "r2" if wanted.is_floating_point() else "accuracy"
        told["shuffled"] = _measured(features, wanted, wanted[:prompts][order])[0]
        told["untrained"] = math.nan if fresh is None else _measured(fresh[site], wanted, wanted[:prompts])[0]
        rows.append({**told, "n": test})
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"place": "Int64"})


def fresh_model(model: Model, seed: int) -> Model:
    """A model of the same form with weights that are drawn, in evaluation mode, on the same device and as precise.

    Of a construction, whose weights are written down, too: it must not find in its control what was written.
    """
    first = next(model.parameters())
    spec = model.spec.model_copy(update={"construction": None})
    return build_model(spec, seed=seed).to(first.device, first.dtype).eval()


def readable(prompt: Prompt, what: str) -> bool:
    """Whether a linear map can be fitted to what the prompts hide by this name: numbers, or one class a prompt."""
    found = (prompt.hidden or {})[what]
    return found.is_floating_point() or found[0].numel() == 1


def _tokens(read_in: str, size: int | None) -> str:
    return f"of {size} kinds" if read_in == "token" else f"vectors of {size} numbers"


def places_at(prompt: Prompt, place: int | None) -> Tensor:
    """Of each prompt the token that is meant, [N] int64."""
    if place is None:
        at = last_scored(prompt)
        if bool((at < 0).any()):
            raise InputError("place: in some prompts no prediction counts; say which place is meant")
        return at
    if not -prompt.length <= place < prompt.length:
        raise InputError(f"place: expected one from {-prompt.length} to {prompt.length - 1}, got {place}")
    return torch.full((prompt.batch,), place % prompt.length, device=prompt.scored.device)


def wanted_at(prompt: Prompt, what: str, place: int | None, at: Tensor) -> Tensor:
    """What is to be read off: values [N, k] in float64, or classes [N] int64."""
    known = {TARGET: prompt.targets, **(prompt.hidden or {})}
    if what not in known:
        raise InputError(f"what: {unknown('thing that this task hides', what, known)}")
    rows = torch.arange(prompt.batch, device=at.device)
    if what == TARGET and not bool(prompt.scored[rows, at].all()):
        scored = prompt.scored.all(0).nonzero()[:, 0].tolist()
        those = f"; those that are in every prompt are {', '.join(map(str, scored[-5:]))}" if scored else ""
        raise InputError(
            f"place: what is predicted at {place} does not count in every prompt{those}; None takes each prompt's last"
        )
    found = known[what][rows, at] if what == TARGET else known[what]
    if found.is_floating_point():
        return found.flatten(1).double() if found.ndim > 1 else found[:, None].double()
    if found.ndim > 1 and found.flatten(1).shape[1] > 1:
        raise InputError(f"what: {what!r} is {list(found.shape)} whole numbers; expected one class for each prompt")
    return found.flatten().long()


def features_at(model: Model, prompt: Prompt, sites: str | Iterable[str], at: Tensor) -> dict[str, Tensor]:
    """Site -> what it holds after each prompt's token, [N, features] float64. at: [N]."""
    named = chosen(model, sites)
    streams = [name for name, site in named.items() if site.point != STATE]
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    dtype = next(model.parameters()).dtype
    whole = not all(getattr(layer.mixer, "causal", True) for layer in model.blocks)  # they see the text whole
    for first in range(0, prompt.batch, BATCH):
        places = at[first : first + BATCH]
        rows = torch.arange(len(places), device=places.device)
        inputs = prompt.inputs[first : first + BATCH]
        inputs = inputs if whole else inputs[:, : int(places.max()) + 1]
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        if streams:
            with capture(model, streams) as taken:
                model(inputs)
            for name in streams:
                value = taken[name]
                if not isinstance(value, Tensor) or value.ndim < 3 or value.shape[1] != inputs.shape[1]:
                    raise InputError(f"{name}: holds nothing for each token; leave it out")
                found[name].append(value[rows, places].flatten(1).double())
        states = [name for name in named if name not in streams]
        if states:
            for name, value in _of_states(model, states, inputs, places).items():
                found[name].append(value)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _of_states(model: Model, states: list[str], inputs: Tensor, places: Tensor) -> dict[str, Tensor]:
    """What states hold after each row's token, [B, features]; what follows it is padding."""
    mask = torch.arange(inputs.shape[1], device=places.device) <= places[:, None]
    with capture(model, states) as taken:
        model.read(inputs, mask=None if bool(mask.all()) else mask)
    return {name: _of_state(name, taken[name]) for name in taken}


def _of_state(name: str, state: State) -> Tensor:
    """All numbers of a state, [N, features]."""
    if isinstance(state, KVState | RoutedState):
        raise InputError(f"{name}: grows with the text, so that no map reads all of it; probe blocks.*.output")
    floats = [tensor.reshape(len(tensor), -1).double() for tensor in state.tensors() if tensor.is_floating_point()]
    if not floats:
        raise InputError(f"{name}: a {type(state).__name__} holds no numbers")
    return torch.cat(floats, 1)


def fitted(features: Tensor, taught: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a linear map, fitted to the first prompts, tells of the others: values, or a score of each class, [Q, k].

    features: [N, F] float64. taught: of the first prompts, numbers [n, k] or classes [n] int64. Returns the classes,
    too, [k]; None of numbers. The strength of the ridge is the one that does best on a fifth of the prompts.
    """
    count = len(taught)
    labels = None if taught.is_floating_point() else taught.unique()
    goal = taught if labels is None else (taught[:, None] == labels).double()
    mean, spread = features[:count].mean(0), features[:count].std(0)
    x = torch.where(spread > 1e-12, (features - mean) / spread.clamp_min(1e-12), 0.0)
    held = max(2, count // 5)
    scale, offset = goal[: count - held].std(0).clamp_min(1e-12), goal[: count - held].mean(0)
    answers = _ridge(x[: count - held], goal[: count - held] - offset, x[count - held : count])
    errors = ((answers + offset - goal[count - held :]) / scale).square().mean((1, 2))
    strength = STRENGTHS[int(errors.argmin())]
    offset = goal.mean(0)
    return _ridge(x[:count], goal - offset, x[count:], (strength,))[0] + offset, labels


def _measured(features: Tensor, wanted: Tensor, taught: Tensor) -> tuple[float, float, float]:
    """R^2 or the accuracy on what follows the prompts that were taught, with its interval."""
    said, labels = fitted(features, taught)
    truth = wanted[len(taught) :]
    if labels is not None:
        right = (labels[said.argmax(-1)] == truth).double()
        half = Z95 * right.std().item() / math.sqrt(len(right))
        ends = share_bounds(*(np.array([each]) for each in (right.mean().item(), half, len(right))))
        return right.mean().item(), float(ends[0][0]), float(ends[1][0])
    return _told_variance((said - truth).square().sum(-1), (truth - truth.mean(0)).square().sum(-1))


def _ridge(x: Tensor, y: Tensor, queries: Tensor, strengths: tuple[float, ...] = STRENGTHS) -> Tensor:
    """Ridge regression's answers [strengths, Q, k] for y [N, k] on x [N, F], whichever of N and F is smaller."""
    by_prompts = x.shape[0] < x.shape[1]
    gram = x @ x.mT if by_prompts else x.mT @ x
    values, vectors = torch.linalg.eigh(gram)
    left, right = (
        (queries @ x.mT @ vectors, vectors.mT @ y) if by_prompts else (queries @ vectors, vectors.mT @ (x.mT @ y))
    )
    scales = torch.stack([1 / (values.clamp_min(0) + strength * len(x)) for strength in strengths])
    return torch.einsum("qf,sf,fk->sqk", left, scales, right)


def _told_variance(errors: Tensor, variances: Tensor) -> tuple[float, float, float]:
    """1 - sum of errors / sum of variances, with the interval of a ratio of means over prompts. errors: [N]."""
    share = (errors.sum() / variances.sum()).item()
    spread = (errors - share * variances).std().item() / (math.sqrt(len(errors)) * variances.mean().item())
    return 1 - share, 1 - share - Z95 * spread, 1 - share + Z95 * spread
