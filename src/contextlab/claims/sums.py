"""What sums of a table's cells come to, with their intervals, by the table's kind (`cells`).

trainings   a mean, with Student's t over seeds. Where prompts add an error of their own (of single shots) it is added
            in quadrature, at the most that it can be; hard ends (of steps) move the interval.
turns       the median of what comes out turn by turn, with the ends that order statistics give (the sign test's),
            which a turn that was disturbed does not move.
draws       the median, from the least to the greatest of all draws.
counted     no chance is in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from contextlab.claims.cells import Part, Table, parts_of
from contextlab.claims.predicate import Quantity, Sum
from contextlab.errors import InputError
from contextlab.evaluation.intervals import Interval, Sample, contrast
from contextlab.report.findings import Term


def value_of(quantity: Quantity, tables: Mapping[str, Table]) -> tuple[Interval, str]:
    """A quantity with its interval, and what must be told with it.

    Raises InputError where a table has no such cells, or where sums cannot be put together.
    """
    sums = quantity.sums()
    signed = [(1.0, sums[""]), *((-1.0, sums[key]) for key in ("less",) if key in sums)]
    divisor = [(1.0, sums[key]) for key in ("over",) if key in sums]
    if all(_whole(each, tables[str(each.task)]) for each in sums.values()):
        return _ratio(_terms(signed, tables), _terms(divisor, tables), lambda terms: _paired(terms, tables)), ""
    top, bottom = _parts(signed, tables), _parts(divisor, tables)
    kinds = {task: tables[task].kind for task, _ in (*top, *bottom) if tables[task].kind != "counted"}
    if {"turns", "draws"} & set(kinds.values()):
        if len(kinds) > 1:
            raise InputError(f"{quantity.said}: turns and draws are put together within one measure only")
        values = _by_seed(top, bottom, tables)
        return (middle_of(values) if "turns" in kinds.values() else _all_of(values)), ""
    return _ratio(top, bottom, lambda parts: _over_seeds(parts, tables)), _censored((*top, *bottom), tables)


def _whole(each: Sum, table: Table) -> bool:
    """Whether a sum is of what a task's prompts score in all, whose values are known prompt by prompt."""
    return table.found is not None and each.shot is None and each.length is None and each.slope is None


def _terms(signed: Sequence[tuple[float, Sum]], tables: Mapping[str, Table]) -> list[tuple[str, Term]]:
    """(task, term) of sums of what prompts score in all. Raises InputError where something was not measured."""
    terms = []
    for sign, each in signed:
        found = tables[str(each.task)].found
        assert found is not None
        metric, split = each.metric or found.metric, str(each.split)
        known = {mean.label for mean in found.means if (mean.split, mean.metric) == (split, metric)}
        for who, weight in (each.weights or {}).items():
            if who not in known:
                raise InputError(f"{each.task}: no {metric} was measured of {who!r} on {split}")
            terms.append((str(each.task), Term(sign * weight, who, split, metric)))
    return terms


def _parts(signed: Sequence[tuple[float, Sum]], tables: Mapping[str, Table]) -> list[tuple[str, Part]]:
    """(task, part) of any sums."""
    return [(p.task, p) for sign, each in signed for p in parts_of(each, tables[str(each.task)], sign)]


def _paired(terms: Sequence[tuple[str, Term]], tables: Mapping[str, Table]) -> Interval:
    """Of each task its own interval; tasks are independent."""
    by_task: dict[str, list[Term]] = {}
    for task, term in terms:
        by_task.setdefault(task, []).append(term)
    found = [tables[task].found for task in by_task]
    return _independent(
        [each.combine(of) for each, of in zip(found, by_task.values(), strict=True) if each is not None]
    )


def _independent(found: Sequence[Interval]) -> Interval:
    """The sum of independent values; their half-widths are added in quadrature."""
    value = sum(each.value for each in found)
    low = math.hypot(*(each.value - each.low for each in found))
    return Interval(value, value - low, value + math.hypot(*(each.high - each.value for each in found)))


def _ratio(top: list[Any], bottom: list[Any], of: Callable[[list[Any]], Interval]) -> Interval:
    """The top, or top / bottom with Fieller's interval: all r for which that of top - r bottom holds 0.

    Without ends where the bottom is not told apart from 0.
    """
    above = of(top)
    if not bottom:
        return above
    below = of(bottom)
    if not below.parts:
        return Interval(above.value / below.value if below.value else math.nan, -math.inf, math.inf)
    if below.high < 0:
        top, bottom = [_scaled(each, -1.0) for each in top], [_scaled(each, -1.0) for each in bottom]
        above, below = of(top), of(bottom)
    value = above.value / below.value
    if above.low == above.high and below.low == below.high:  # both are counted
        return Interval(value, value, value)

    def left(r: float) -> Interval:
        return of([*top, *(_scaled(each, -r) for each in bottom)]) if r else above

    return Interval(value, _root(value, -1, lambda r: left(r).low > 0), _root(value, 1, lambda r: left(r).high < 0))


def _scaled(pair: Any, factor: float) -> Any:
    task, term = pair
    return task, term._replace(weight=factor * term.weight)


def _root(value: float, sign: int, beyond: Callable[[float], bool]) -> float:
    """Where, from a value on to the one side, `beyond` begins to hold; infinite where it never does."""
    step = max(abs(value), 1e-12)
    for doubling in range(60):
        end = value + sign * step * 2.0**doubling / 64
        if beyond(end):
            break
    else:
        return sign * math.inf
    near, far = value, end
    for _ in range(60):
        middle = (near + far) / 2
        near, far = (near, middle) if beyond(middle) else (middle, far)
    return far


def _by_seed(
    top: Sequence[tuple[str, Part]], bottom: Sequence[tuple[str, Part]], tables: Mapping[str, Table]
) -> list[float]:
    """What comes out turn by turn, or draw by draw; nan of one in which something was not measured."""

    def of(parts: Iterable[tuple[str, Part]], seed: int) -> float:
        total = 0.0
        for task, part in parts:
            rows = part.rows if tables[task].kind == "counted" else part.rows[part.rows["seed"] == seed]
            total += part.weight * (float(rows["value"].iloc[0]) if len(rows) else math.nan)
        return total

    seeds = {int(s) for task, part in (*top, *bottom) if tables[task].kind != "counted" for s in part.rows["seed"]}
    return [of(top, seed) / (of(bottom, seed) if bottom else 1.0) for seed in sorted(seeds)]


def _all_of(values: Sequence[float]) -> Interval:
    """From the least to the greatest: what is asked is asked of every draw."""
    if not values or any(map(math.isnan, values)):
        return Interval(math.nan, math.nan, math.nan)
    return Interval(median(values), min(values), max(values))


def middle_of(values: Sequence[float]) -> Interval:
    """The median and the 95% interval that order statistics give it: without ends of fewer than six values."""
    ordered, n = sorted(values), len(values)
    if any(map(math.isnan, ordered)):
        return Interval(math.nan, math.nan, math.nan)
    below, out = 0.0, 0  # how many of the least, and of the greatest, lie outside
    while out < n // 2 and 2 * (below := below + math.comb(n, out) / 2.0**n) <= 0.05:
        out += 1
    if not out:
        return Interval(median(ordered), -math.inf, math.inf)
    return Interval(median(ordered), ordered[out - 1], ordered[n - out])


def _over_seeds(parts: Sequence[tuple[str, Part]], tables: Mapping[str, Table]) -> Interval:
    """Sums within each training first, as its cells go together; then over trainings, models being independent."""
    ends: dict[str, list[Sample]] = {"value": [], "low": [], "high": []}
    fixed, prompts = dict.fromkeys(ends, 0.0), 0.0
    groups: dict[tuple[str, str], list[Part]] = {}
    for task, part in parts:
        groups.setdefault((task, part.name), []).append(part)
    for key, group in groups.items():
        table = tables[key[0]]
        totals = {end: _totals(group, end, table.ends == "hard") for end in ends}
        if table.ends == "prompts":
            prompts += sum(abs(part.weight) * _half(part.rows) for part in group)
        trained = table.kind == "trainings" and (group[0].rows["kind"] == "model").any()
        for end, values in totals.items():
            if not trained or np.isinf(values).any():  # a learner, what is counted, or an end that is not known
                fixed[end] += float(values.mean())
            else:
                ends[end].append(Sample(key, None, key, values, 1.0))
    found = {end: contrast(samples) if samples else Interval(0.0, 0.0, 0.0) for end, samples in ends.items()}
    value = found["value"].value + fixed["value"]
    low = found["low"].value - math.hypot(found["low"].value - found["low"].low, prompts) + fixed["low"]
    high = found["high"].value + math.hypot(found["high"].high - found["high"].value, prompts) + fixed["high"]
    return Interval(value, min(low, value), max(high, value))


def _totals(group: Sequence[Part], end: str, hard: bool) -> np.ndarray:
    """The weighted sum of each training of one model, or an end of it. [trainings]"""
    total: pd.Series | None = None
    for part in group:
        column = "value"
        if hard and end != "value":
            column = "ci_low" if (end == "low") == (part.weight > 0) else "ci_high"
        values = part.rows.set_index("seed")[column].astype(float) * part.weight
        total = values if total is None else total + values
    assert total is not None
    return total.to_numpy()


def _half(rows: pd.DataFrame) -> float:
    """The prompts' half-width of the mean over trainings, at the most that it can be."""
    half = float(((rows["ci_high"] - rows["ci_low"]) / 2).astype(float).mean())
    return math.inf if math.isnan(half) else half


def _censored(parts: Iterable[tuple[str, Part]], tables: Mapping[str, Table]) -> str:
    """Which values are only known not to be below something, in words."""
    told = {}
    for task, part in parts:
        if tables[task].ends == "hard":
            ends = part.rows["ci_high"].astype(float)
            if lost := int(np.isinf(ends).sum()):
                told[part.name] = f"{part.name}: not reached by {lost} of {len(ends)} trainings, at least the last step"
    return "; ".join(told.values())
