"""What a report's words are drawn from: means with their intervals, and which differences part two of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from contextlab.evaluation import summarise
from contextlab.evaluation.intervals import Interval, bounds_of, contrast, weighted
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.report.naming import ASIDE, label, main_metric

Sampled = tuple[Hashable, int | None, Hashable, np.ndarray]
"""A predictor's values by prompt, as `intervals.weighted` takes them."""


class Mean(NamedTuple):
    """A mean over all that is scored, seeds put together.

    told: its interval, over prompts and seeds where there are several. over_prompts: that of these very trainings.
    """

    label: str
    kind: str
    split: str
    metric: str
    told: Interval
    seeds: int
    length: int
    over_prompts: Interval

    @property
    def value(self) -> float:
        """The mean."""
        return self.told.value


class Term(NamedTuple):
    """A mean and its weight in a sum."""

    weight: float
    label: str
    split: str
    metric: str


@dataclass
class Findings:
    """The means of one task.

    metric: what the task is judged by. means: in the order of the results. samples: (label, split, metric) -> values
    by prompt of each seed; empty in runs of older versions. chance: split -> what a predictor gets that has learned
    nothing, where the task knows that.
    """

    task: str
    metric: str
    means: list[Mean] = field(default_factory=list)
    samples: dict[tuple[str, str, str], list[Sampled]] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)

    @property
    def rising(self) -> bool:
        """Whether the metric is better when larger: a share."""
        return self.metric in HIGHER_IS_BETTER

    def of(self, metric: str, split: str | None = "train", kind: str | None = None) -> list[Mean]:
        """The means of a metric, on one split or all, of models or learners or both."""
        return [
            each
            for each in self.means
            if each.metric == metric and split in (None, each.split) and kind in (None, each.kind)
        ]

    def ranked(self, metric: str, split: str = "train", kind: str | None = "model") -> list[Mean]:
        """The same, the best first."""
        sign = -1 if metric in HIGHER_IS_BETTER else 1
        return sorted(self.of(metric, split, kind), key=lambda mean: sign * mean.value)

    def combine(self, terms: Iterable[Term]) -> Interval:
        """A weighted sum of means, paired by prompts where their values are known, else as if they were independent."""
        terms = list(terms)
        found = [self.samples.get(term[1:]) for term in terms]
        if all(found):
            samples = (
                weighted(each or [], term.weight, bounds_of(term.metric))
                for term, each in zip(terms, found, strict=True)
            )
            return contrast([sample for group in samples for sample in group])
        means = {(mean.label, mean.split, mean.metric): mean.told for mean in self.means}
        known = [(term.weight, means[term[1:]]) for term in terms]
        half = math.hypot(*(weight * (told.high - told.low) / 2 for weight, told in known))
        return Interval.around(sum(weight * told.value for weight, told in known), half)

    def difference(self, one: str, two: str, metric: str | None = None, split: str = "train") -> Interval:
        """One's metric less the other's, on the same prompts: without values by prompt through the best learner's."""
        metric = metric or self.metric
        excess, sign = f"excess_{metric}", -1.0 if metric in HIGHER_IS_BETTER else 1.0
        sampled = all((name, split, metric) in self.samples for name in (one, two))
        named = {mean.label for mean in self.of(excess, split)}
        if not sampled and {one, two} <= named:
            return self.combine([Term(sign, one, split, excess), Term(-sign, two, split, excess)])
        return self.combine([Term(1.0, one, split, metric), Term(-1.0, two, split, metric)])

    def peers(self, leader: str, others: Iterable[str], metric: str | None = None, split: str = "train") -> list[str]:
        """Those of the others that are not told apart from the leader."""
        return [name for name in others if not self.difference(name, leader, metric, split).parts]

    def at_chance(self, mean: Mean) -> bool:
        """Whether these trainings are not seen to be better than a predictor that has learned nothing."""
        chance = self.chance.get(mean.split)
        if chance is None or mean.metric != self.metric:
            return False
        return mean.over_prompts.low <= chance if self.rising else mean.over_prompts.high >= chance


def findings(
    results: pd.DataFrame,
    by_prompt: pd.DataFrame | None = None,
    several: bool | None = None,
    means: pd.DataFrame | None = None,
) -> list[Findings]:
    """The findings of each task, in the order of the results.

    results: a tidy table. by_prompt: the values by prompt (see `evaluation.Measured`); None where they are not known:
    differences then have wider intervals. several: whether labels name the run; None where the results are of several.
    means: the results that are numbers with their seeds put together (see `summarise`), where these are known.
    """
    if several is None:
        several = results["run"].nunique() > 1
    found: dict[str, Findings] = {}
    for task, rows in results.groupby("task", sort=False):
        if not rows["split"].isin(ASIDE).all():
            found[str(task)] = Findings(str(task), main_metric(rows))
    if by_prompt is not None and len(by_prompt):
        for row, name in zip(_rows(by_prompt), label(by_prompt, several), strict=True):
            if row.task not in found:
                continue
            here = found[row.task]
            seed = int(row.seed) if row.kind == "model" else None
            sample = (name, seed, (row.split, row.prompts), row.values)
            here.samples.setdefault((str(name), str(row.split), str(row.metric)), []).append(sample)
            if row.metric == here.metric and not math.isnan(row.chance):
                here.chance.setdefault(str(row.split), float(row.chance))
    chosen = results[results["shot"].isna() & results["value"].notna()]
    overall = summarise(chosen) if means is None else means[means["shot"].isna()]
    halves: Iterable[float] = itertools.repeat(math.nan, len(overall))  # of one seed each is not asked for
    if (overall["seeds"] > 1).any():
        halves = summarise(chosen.assign(value=(chosen["ci_high"] - chosen["ci_low"]) / 2))["value"]
    for row, name, half in zip(_rows(overall), label(overall, several), halves, strict=True):
        if row.task not in found:
            continue
        here = found[str(row.task)]
        length = 0 if pd.isna(row.length) else int(row.length)
        told = Interval.known(row.value, row.ci_low, row.ci_high)
        over = told if row.seeds == 1 else Interval.around(told.value, math.inf if math.isnan(half) else float(half))
        key = (str(name), str(row.split), str(row.metric))
        if row.seeds > 1 and key in here.samples:
            told = _over_both(here.samples[key], told.value, str(row.metric))
            these = [(who, None, prompts, values) for who, _, prompts, values in here.samples[key]]
            over = _over_both(these, told.value, str(row.metric))
        here.means.append(Mean(*key[:1], str(row.kind), *key[1:], told, int(row.seeds), length, over))
    return list(found.values())


def _rows(frame: pd.DataFrame) -> Iterator[Any]:
    """The rows as tuples with named fields, of no known types."""
    yield from frame.itertuples(index=False)


def _over_both(samples: Sequence[Sampled], value: float, metric: str) -> Interval:
    """The interval of a mean over prompts and seeds; that of a share within 0 and 1."""
    told = contrast(weighted(samples, 1.0, bounds_of(metric)))
    low, high = value - (told.value - told.low), value + (told.high - told.value)
    if metric in HIGHER_IS_BETTER and math.isfinite(high):
        return Interval(value, max(low, 0.0), min(high, 1.0))
    return Interval(value, low, high)


def without_number(results: pd.DataFrame, task: str, metric: str, several: bool) -> dict[str, tuple[int, int]]:
    """Models whose mean on prompts as in training is no number, as an answer was none: label -> (seeds, of so many).

    several: whether labels name the run.
    """
    rows = results[(results["task"] == task) & (results["metric"] == metric) & (results["split"] == "train")]
    rows = rows[(rows["kind"] == "model") & rows["shot"].isna() & (rows["n"] > 0)]
    lost = rows.assign(label=label(rows, several), lost=rows["value"].isna()).groupby("label", sort=False)["lost"]
    return {str(name): (int(each.sum()), len(each)) for name, each in lost if each.any()}
