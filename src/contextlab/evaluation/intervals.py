"""95% intervals of means, over prompts and seeds together, by exact formulas.

A predictor's value on a prompt is its mean, plus what the seed of its training adds, plus what the prompt adds, plus
what is left. All seeds of all models answer the same prompts (the design is crossed), so the variance of a mean, of a
difference, or of any weighted sum of means, has a part from the prompts and one from each model's seeds. Each is
estimated by mean squares and has its own quantile of Student's t; their half-widths are added in quadrature.

One prompt tells nothing of how far off it is: there is no interval then (nan in tables, infinite here). Prompts that
are all alike tell nothing of the spread, and of what is bounded, such as shares, only that few can differ: `unseen`.
Fewer than `TELLS` prompts that differ from all others tell as little: the prompts that were not seen may differ by more
than those few. So their interval is at least as wide as if all were alike: a prompt that missed makes nothing surer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from contextlab.prompt import HIGHER_IS_BETTER

Z95 = 1.959964
# Two-sided 95% quantiles of Student's t for 1 to 29 degrees of freedom.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)  # fmt: skip


TELLS = 6
"""Prompts that differ from all others, from which on their spread is taken for that of all prompts. Five that all
differ to one side happen by chance in 2 / 2**5 = 6% of draws (the sign test), six in 3%."""

_INVERSE = np.array([0.0, *(1 / df for df in range(len(_T95), 0, -1))])
_QUANTILES = np.array([Z95, *_T95[::-1]])


def t95(freedom: float) -> float:
    """The two-sided 95% quantile of Student's t, for any degrees of freedom from 1 on; it is near linear in 1 / df."""
    return float(np.interp(1 / max(freedom, 1.0), _INVERSE, _QUANTILES))


class Interval(NamedTuple):
    """A value and its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def parts(self) -> bool:
        """Whether the interval of a difference excludes 0: the two are told apart."""
        return self.low > 0 or self.high < 0

    def holds(self, value: float) -> bool:
        """Whether a value lies in the interval."""
        return self.low <= value <= self.high

    @staticmethod
    def known(value: float, low: float | None, high: float | None) -> Interval:
        """That of a table's row or a record, whose ends are missing where nothing is known of them."""
        least = -math.inf if low is None or math.isnan(low) else float(low)
        most = math.inf if high is None or math.isnan(high) else float(high)
        return Interval(float(value), least, most)

    @staticmethod
    def around(value: float, half: float) -> Interval:
        """The interval of a half-width."""
        return Interval(value, value - half, value + half)


@dataclass(frozen=True)
class Sample:
    """One predictor's values on one set of prompts.

    who: the predictor. seed: of its training; None for what is not trained. prompts: which prompts they are; samples
    with the same have values of the same prompts in the same order. values: [prompts], nan where nothing is scored.
    weight: of the sample's mean in the sum. bounds: between which each value must lie; None of what has none.
    """

    who: Hashable
    seed: int | None
    prompts: Hashable
    values: np.ndarray
    weight: float
    bounds: tuple[float, float] | None = None


def weighted(
    samples: Sequence[tuple[Hashable, int | None, Hashable, np.ndarray]],
    weight: float,
    bounds: tuple[float, float] | None = None,
) -> list[Sample]:
    """The samples of a predictor's seeds, whose mean has a weight in a sum: (who, seed, prompts, values) each."""
    return [Sample(who, seed, prompts, values, weight / len(samples), bounds) for who, seed, prompts, values in samples]


def unseen(count: float) -> float:
    """The part of all prompts that may differ where so many were alike: the upper end of Wilson's interval for none."""
    return Z95**2 / (count + Z95**2)


def bounds_of(metric: str) -> tuple[float, float] | None:
    """Between which values a metric lies on each prompt: shares, and what one share exceeds another by."""
    if metric in HIGHER_IS_BETTER:
        return 0.0, 1.0
    return (-1.0, 1.0) if metric.removeprefix("excess_") in HIGHER_IS_BETTER else None


def alike_half(value: float, count: int, bounds: tuple[float, float] | None) -> float:
    """The half-width of an interval where so many prompts all have the same value; 0 of what has no bounds."""
    return 0.0 if bounds is None else max(bounds[1] - value, value - bounds[0]) * unseen(count)


def usual(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What most prompts have, and how many have another value; at least `TELLS` where no value is that of most.

    values: [prompts, ...], nan where nothing is scored. Returns two arrays [...].
    """
    known = ~np.isnan(values)
    count = known.sum(0)
    middle = np.take_along_axis(np.sort(values, 0), np.maximum(count - 1, 0)[None] // 2, 0)[0]  # nan is sorted last
    near = 1e-9 * np.maximum(1.0, np.abs(middle))
    other = count - (np.abs(values - middle) <= near).sum(0)
    return middle, np.where((2 * other < count) | (count < 2), other, np.maximum(count, TELLS))


def contrast(samples: Iterable[Sample]) -> Interval:
    """The weighted sum of the samples' means, and its interval over prompts and seeds.

    One mean is a sum of the seeds' with weights 1 / seeds; a difference has weights of both signs, and is paired where
    its samples are of the same prompts. The square of the half-width is a sum: for each set of P prompts
    t(P - 1)^2 var(weighted values) / P; and t(f)^2 times the sum, over predictors of S >= 2 seeds, of var(seeds) / S
    less what the noise of their answers explains, with Welch's degrees of freedom f. Of predictors with one seed the
    prompts' part is all that can be known. Where all prompts of a set are alike, or fewer than `TELLS` differ, that
    part is at least the most by which the sum could change, if as many differed as may (`unseen`). Several such sets
    share what may differ, as one larger set would: sets of half as many prompts each are no less sure. Of values
    without bounds it is the variance alone, and 0 means nothing.
    """
    by_prompts: dict[Hashable, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_prompts[sample.prompts].append(sample)
    value = square = 0.0
    alike: list[tuple[float, int]] = []  # of sets of prompts that are alike, and of those of which few are not:
    few: list[tuple[float, int]] = []  # the most that all their prompts could change the sum by, and how many they are
    few_square, others = 0.0, 0
    own: dict[Hashable, dict[Hashable, list[tuple[int | None, np.ndarray]]]] = {}
    for prompts, group in by_prompts.items():
        values = np.stack([each.weight * np.asarray(each.values, dtype=float) for each in group])
        values = values[:, ~np.isnan(values).any(0)]
        count = values.shape[1]
        if count < 2:
            return Interval(float(values.sum()) if count else math.nan, -math.inf, math.inf)
        total = values.sum(0)
        value += float(total.mean())
        middle, other = (float(each) for each in usual(total))
        part = t95(count - 1) ** 2 * float(total.var(ddof=1)) / count if other else 0.0
        bounds = _range(group)
        if bounds is None or other >= TELLS:
            square += part
        else:
            (few if other else alike).append((max(bounds[1] - middle, middle - bounds[0]), count))
            few_square, others = few_square + part, others + int(other)
        for sample, each in zip(group, values, strict=True):
            own.setdefault(sample.who, {}).setdefault(prompts, []).append((sample.seed, each))
    if others >= TELLS:
        square += few_square + _unseen_change(alike) ** 2
    else:
        square += max(few_square, _unseen_change([*alike, *few]) ** 2)
    parts = [part for sets in own.values() if (part := _seeds_part(list(sets.values()))) is not None]
    extra = sum(variance for variance, _ in parts)
    if extra > 0:
        square += t95(extra**2 / sum(variance**2 / freedom for variance, freedom in parts)) ** 2 * extra
    return Interval.around(value, math.sqrt(square))


def _unseen_change(sets: Sequence[tuple[float, int]]) -> float:
    """The most by which a sum may change where all prompts of some sets were alike.

    sets: by how much it would change if all prompts of the set differed, and how many they are. That the prompts of all
    sets were alike bounds the sum over sets of prompts times the part that may differ, so that it is largest where all
    that may differ is in the set whose prompts each count most; of sets that count alike it is that of one larger set.
    """
    most = max((change / count for change, count in sets), default=0.0)
    whole = sum(change for change, _ in sets)
    return whole * unseen(whole / most) if most else 0.0


def _range(samples: Sequence[Sample]) -> tuple[float, float] | None:
    """Between which values the weighted sum of samples of the same prompts lies; None where one has no bounds."""
    ends = [sorted(each.weight * end for end in each.bounds) for each in samples if each.bounds is not None]
    return (sum(low for low, _ in ends), sum(high for _, high in ends)) if len(ends) == len(samples) else None


def _seeds_part(sets: Sequence[Sequence[tuple[int | None, np.ndarray]]]) -> tuple[float, int] | None:
    """The variance that the seeds of one predictor add, and its degrees of freedom; None of one seed.

    sets: for each set of prompts the seeds and their weighted values [prompts].
    """
    means: dict[int | None, float] = defaultdict(float)
    for each in sets:
        for seed, values in each:
            means[seed] += float(values.mean())
    seeds = len(means)
    if seeds < 2:
        return None
    explained, crossed = 0.0, True
    for each in sets:
        values, count = np.stack([v for _, v in each]), len(each)
        if count > 1:  # the seeds answer the same prompts: what these add to all of them cancels
            values = (values - values.mean(0)) * math.sqrt(count / (count - 1))
        else:
            crossed = False
        explained += float(values.var(1, ddof=1).sum()) / values.shape[1]
    spread = seeds * float(np.var(list(means.values()), ddof=1))
    # Where each seed has prompts of its own, its spread holds all noise: the sum is t(S - 1)^2 var(seeds) / S again.
    kept = 1.0 if crossed else (Z95 / t95(seeds - 1)) ** 2
    return max(0.0, spread - kept * explained), seeds - 1


def share_bounds(
    value: np.ndarray, half: np.ndarray, count: np.ndarray, other: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The interval of a share, such as accuracy, within 0 and 1: Wilson's, for as many trials as tell as much.

    value: means. half: half-widths of their normal intervals, 0 where all are alike. count: prompts, at least as many
    trials as which they count. other: how many of these have another value than most (`usual`); where they are fewer
    than `TELLS`, prompts are no more trials than there are, as where all are alike. None: it is not known.
    """
    value, count = np.clip(value, 0.0, 1.0), np.maximum(count, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        trials = value * (1 - value) / (half / Z95) ** 2
    trials = np.where((half > 0) & (trials > 0), trials, count)
    if other is not None:
        trials = np.where(other < TELLS, np.minimum(trials, count), trials)
    middle = (value + Z95**2 / (2 * trials)) / (1 + Z95**2 / trials)
    width = Z95 / (1 + Z95**2 / trials) * np.sqrt(value * (1 - value) / trials + Z95**2 / (4 * trials**2))
    return np.clip(np.minimum(middle - width, value), 0, 1), np.clip(np.maximum(middle + width, value), 0, 1)
