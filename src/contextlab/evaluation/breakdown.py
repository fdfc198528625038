"""Errors by what a prompt knows of each prediction: its place, the examples seen, the distance of the fact."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from contextlab.errors import InputError, unknown
from contextlab.evaluation.evaluate import _evaluating, _kept_prompts, predict
from contextlab.evaluation.intervals import Z95, share_bounds, usual
from contextlab.evaluation.spec import EvaluateSpec
from contextlab.prompt import HIGHER_IS_BETTER, Learner, Predictor, Prompt, Task

COLUMNS = ("model", "kind", "by", "low", "high", "metric", "value", "ci_low", "ci_high", "n")


def breakdown(
    predictors: Mapping[str, Predictor] | Predictor,
    task: Task,
    by: str = "position",
    *,
    bins: int = 12,
    prompts: int = 1024,
    batch: int = 256,
    seed: int = EvaluateSpec().seed,
    device: torch.device | str = "cpu",
) -> pd.DataFrame:
    """Mean errors of predictors, grouped by a facet of the predictions (see `Task.facets`).

    predictors: models and learners by name, or one alone; all answer the same prompts.
    by: the facet, for example "position", "shot", or "distance" in recall.
    bins: most groups; a facet of more values is cut into groups of about equal ratio.
    prompts, batch, seed, device: of the prompts that are drawn.

    Returns one row a predictor, metric and group: the group's lowest and highest value (both counted), the mean, a 95%
    interval over prompts (a prompt's predictions are not independent; missing where one prompt has all of the group's),
    and n, the predictions in the group.
    Raises InputError for a facet that the task does not know.
    """
    named = predictors if isinstance(predictors, Mapping) else {"model": predictors}
    drawn = _kept_prompts(task, EvaluateSpec(prompts=prompts, batch=batch, seed=seed), 0, device)
    known = task.facets(drawn[0])
    if by not in known:
        raise InputError(unknown(f"facet of {type(task).__name__}", by, known))
    facets = [task.facets(prompt)[by] for prompt in drawn]
    edges = _edges(torch.cat([_scored(facet, prompt) for facet, prompt in zip(facets, drawn, strict=True)]), bins)
    rows = []
    for name, predictor in named.items():
        groups = _Groups(edges)
        with _evaluating(predictor):
            for facet, prompt in zip(facets, drawn, strict=True):
                groups.add(facet, task.errors(predict(predictor, prompt), prompt), prompt)
        kind = "learner" if isinstance(predictor, Learner) else "model"
        rows += [{"model": name, "kind": kind, "by": by, **row} for row in groups.rows()]
    return pd.DataFrame(rows, columns=list(COLUMNS))


class FacetTally:
    """Errors of one predictor on one task, grouped by all facets of the task that tell more than `shot` does.

    Groups are cut from the values in the first batch, so that predictors with the same prompts get the same groups;
    later values beyond them join the outermost ones.

    bins: most groups of a facet.
    """

    def __init__(self, bins: int = 12) -> None:
        self.bins = bins
        self.groups: dict[str, _Groups] | None = None

    def add(self, task: Task, prompt: Prompt, errors: Mapping[str, Tensor]) -> None:
        """Add a batch. errors: metric -> [B, T]."""
        facets = {name: facet for name, facet in task.facets(prompt).items() if name != "shot"}
        if self.groups is None:
            cut = {name: _scored(facet, prompt) for name, facet in facets.items()}
            shot = prompt.shot[prompt.scored]
            self.groups = {name: _Groups(_edges(each, self.bins)) for name, each in cut.items() if _tells(each, shot)}
        for name, groups in self.groups.items():
            groups.add(facets[name], errors, prompt)

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row a facet, metric and group: facet, low, high, metric, value, ci_low, ci_high, n."""
        for name, groups in (self.groups or {}).items():
            for row in groups.rows():
                yield {"facet": name, **row}


class _Groups:
    """Sums of errors over the groups of one facet, prompt by prompt. edges: the lowest value of each group, sorted."""

    def __init__(self, edges: Tensor) -> None:
        self.edges = edges
        self.counts: list[Tensor] = []
        self.sums: dict[str, list[Tensor]] = {}
        self.low = edges.double().cpu()
        self.high = self.low.clone()

    def add(self, facet: Tensor, errors: Mapping[str, Tensor], prompt: Prompt) -> None:
        """facet: broadcasts to [B, T]. errors: metric -> [B, T]."""
        values = _scored(facet, prompt)
        facet = facet.expand_as(prompt.scored)
        group = (torch.bucketize(facet.contiguous(), self.edges, right=True) - 1).clamp_min(0)
        inside, count = group[prompt.scored].cpu(), len(self.edges)
        self.low.scatter_reduce_(0, inside, values.double().cpu(), "amin")
        self.high.scatter_reduce_(0, inside, values.double().cpu(), "amax")
        self.counts.append(_sums(prompt.scored.double(), group, prompt, count))
        for metric, error in errors.items():
            self.sums.setdefault(metric, []).append(_sums(error.double(), group, prompt, count))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Means and intervals of a ratio of sums over prompts, for each metric and group."""
        count = torch.cat(self.counts)
        prompts, n = len(count), count.sum(0)
        for metric, parts in self.sums.items():
            total = torch.cat(parts)
            mean = total.sum(0) / n
            residual = (total - mean * count).square().sum(0) * prompts / max(prompts - 1, 1)
            half, trials = Z95 * residual.sqrt() / n, (count > 0).sum(0)
            low, high = mean - half, mean + half
            if metric in HIGHER_IS_BETTER:
                other = usual((total / count).numpy())[1]  # nan where a prompt has nothing in a group
                low, high = map(torch.from_numpy, share_bounds(mean.numpy(), half.numpy(), trials.numpy(), other))
            low, high = (torch.where(trials > 1, end, math.nan) for end in (low, high))
            for i in range(len(n)):
                yield {
                    "low": self.low[i].item(),
                    "high": self.high[i].item(),
                    "metric": metric,
                    "value": mean[i].item(),
                    "ci_low": low[i].item(),
                    "ci_high": high[i].item(),
                    "n": int(n[i]),
                }


def _scored(facet: Tensor, prompt: Prompt) -> Tensor:
    """The facet of the predictions that count, flat."""
    return facet.expand_as(prompt.scored)[prompt.scored]


def _tells(facet: Tensor, shot: Tensor) -> bool:
    """Whether a facet has several values and is not the number of examples under another name. Both flat."""
    values = facet.unique()
    if len(values) < 2:
        return False
    _, number = torch.unique(facet, return_inverse=True)
    pairs = (shot * len(values) + number).unique()
    return not len(pairs) == len(values) == len(shot.unique())


def _edges(values: Tensor, bins: int) -> Tensor:
    """The lowest value of each group: every value that occurs, or at most `bins` at about equal ratios."""
    found = values.unique()
    if len(found) <= bins:
        return found
    low, high = found[0].item(), found[-1].item()
    ratios = torch.logspace(0, math.log10(high - low + 2), bins + 1, dtype=torch.float64)[:-1] - 1 + low
    edges = (ratios.round() if not values.is_floating_point() else ratios).to(values.dtype).unique()
    # A group without a prediction tells nothing: each edge moves up to a value that occurs.
    return found[torch.searchsorted(found, edges)].unique()


def _sums(x: Tensor, group: Tensor, prompt: Prompt, count: int) -> Tensor:
    """Of each prompt and group the sum of x [B, T] over scored predictions: [B, count]."""
    found = torch.zeros(prompt.batch, count, dtype=x.dtype, device=x.device)
    return found.scatter_add_(1, group, torch.where(prompt.scored, x, 0.0)).cpu()
