"""How much of the full cache's quality a policy keeps on each task, with what is needed to compare two policies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from contextlab.evaluation.compress import FULL
from contextlab.evaluation.intervals import Interval, contrast, weighted
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.report.compress import main_metric, over_seeds, short
from contextlab.report.naming import interval_in_words

Key = tuple[str, str]
"""A policy as it was written, and its budget."""
On = tuple[str, int]
"""A task as it was written, and the tokens of its prompts."""


class Cell(NamedTuple):
    """What a policy keeps on one task.

    quality: the part of the full cache's quality above chance, with its interval. bytes: the part of its bytes. words:
    the quality itself. moves: of each seed how much its prompts move the part that is kept, (seed, prompts, [prompts]);
    empty in tables of older versions. bounds: of what one prompt can move it by; None where it has none.
    """

    quality: Interval
    bytes: float
    words: str
    moves: list[tuple[int, str, np.ndarray]]
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Mean:
    """The same over several tasks: means, and the words of each."""

    quality: Interval
    bytes: float
    words: list[str]
    cells: list[Cell]


@dataclass
class Kept:
    """What policies keep.

    at_chance: on which tasks the full cache itself is at chance, a line each: no policy is ranked there. over: what the
    intervals are over.
    """

    cells: dict[Key, dict[On, Cell]] = field(default_factory=dict)
    at_chance: list[str] = field(default_factory=list)
    over: str = ""

    @property
    def tasks(self) -> list[On]:
        """The tasks on which policies are ranked."""
        return list(self.cells.get((FULL, FULL), {}))


def kept(results: pd.DataFrame) -> Kept:
    """(policy, budget) -> task and length -> what it keeps; what some seed's model could not serve is left out.

    Kept is (q - chance) / (full - chance), of errors (chance - q) / (chance - full); of text in cross-entropy. Where
    chance is not known (tables of older versions) it is 0 for shares, and for errors the full cache's by the policy's.
    """
    policies = results[results["kind"] == "policy"]
    counts = policies.groupby(["task", "length", "model", "split"], sort=False)["seed"].nunique()
    over = over_seeds(policies)
    by_seed = dict(iter(policies.groupby(["task", "length", "metric"], sort=False)))
    found = Kept(over=_over(policies))
    for task, length in over[["task", "length"]].drop_duplicates().itertuples(index=False):
        rows = over[(over["task"] == task) & (over["length"] == length)]
        shown, metric = main_metric(str(task), rows), _metric(str(task), rows)
        told = {(row["model"], row["split"], row["metric"]): _told(row) for _, row in rows.iterrows()}
        full, chance = told[FULL, FULL, metric], _chance(rows, metric)
        if (
            line := _at_chance(str(task), int(length), by_seed[task, length, metric], full, chance, metric)
        ) is not None:
            found.at_chance.append(line)
            continue
        values = _values(by_seed[task, length, metric])
        size = {(model, split): each.value for (model, split, m), each in told.items() if m == "state_bytes"}
        for (name, budget, each), own in told.items():
            if each != metric or counts[task, length, name, budget] < counts[task, length, FULL, FULL]:
                continue
            theirs = values.get((FULL, FULL))
            quality, moves, most = _part(own, full, chance, metric, values.get((name, budget)), theirs)
            mine, whole = told[name, budget, shown], told[FULL, FULL, shown]
            words = (
                f"{task} at {length} tokens {short(shown)} {interval_in_words(mine, shown)} "
                f"(full {interval_in_words(whole, shown)})"
            )
            cell = Cell(quality, float(size[name, budget] / size[FULL, FULL]), words, moves, most)
            found.cells.setdefault((str(name), str(budget)), {})[str(task), int(length)] = cell
    return found


def mean_of(cells: Mapping[On, Cell], tasks: Sequence[On]) -> Mean | None:
    """The mean over tasks; None where one of them was not served."""
    if not tasks or any(task not in cells for task in tasks):
        return None
    each = [cells[task] for task in tasks]
    value = sum(cell.quality.value for cell in each) / len(each)
    half = _half([(cell, None) for cell in each])
    size = sum(cell.bytes for cell in each) / len(each)
    return Mean(Interval.around(value, half), size, [cell.words for cell in each], each)


def difference(one: Mean, two: Mean) -> Interval:
    """What one keeps less what the other keeps, on the same prompts."""
    return Interval.around(one.quality.value - two.quality.value, _half(list(zip(one.cells, two.cells, strict=True))))


def _half(pairs: Sequence[tuple[Cell, Cell | None]]) -> float:
    """The half-width of a mean over tasks, of one or of the difference of two."""
    if all(cell.moves and (other is None or other.moves) for cell, other in pairs):
        samples = []
        for at, (cell, other) in enumerate(pairs):
            less = {} if other is None else {seed: moves for seed, _, moves in other.moves}
            seeds = [("model", seed, (at, where), moves - less.get(seed, 0.0)) for seed, where, moves in cell.moves]
            samples += weighted(seeds, 1 / len(pairs), cell.bounds)
        return contrast(samples).high - contrast(samples).value
    each = [cell.quality for pair in pairs for cell in pair if cell is not None]
    return math.hypot(*((told.high - told.low) / 2 for told in each)) / len(pairs)


def _over(policies: pd.DataFrame) -> str:
    seeds = policies["seed"].nunique()
    count = int(policies.loc[policies["metric"] == "kl", "n"].min()) if (policies["metric"] == "kl").any() else 0
    prompts = f"{count} prompt{'s' * (count != 1)}" if count else "the prompts"
    return f"{prompts} of each of {seeds} seeds" if seeds > 1 else f"{prompts} alone (one seed)"


def _metric(task: str, rows: pd.DataFrame) -> str:
    """The metric in which what is kept is counted: of text, whose perplexity is told, the cross-entropy."""
    known = rows.loc[rows["chance"].notna(), "metric"] if "chance" in rows else rows["metric"].head(0)
    metric = main_metric(task, rows)
    return "cross_entropy" if metric == "perplexity" and "cross_entropy" in set(known) else metric


def _chance(rows: pd.DataFrame, metric: str) -> float:
    own = rows[rows["metric"] == metric]
    return float(own["chance"].iloc[0]) if "chance" in own else math.nan


def _told(row: Any) -> Interval:
    return Interval.known(row["value"], row["ci_low"], row["ci_high"])


def _at_chance(task: str, length: int, rows: pd.DataFrame, full: Interval, chance: float, metric: str) -> str | None:
    """A line where the full cache is not seen to be better than chance, by the prompts of these very seeds."""
    if math.isnan(chance):
        return None
    own = rows[(rows["model"] == FULL) & (rows["split"] == FULL)]
    half = float((own["ci_high"] - own["ci_low"]).mean()) / 2 / math.sqrt(len(own))
    better = full.value - half > chance if metric in HIGHER_IS_BETTER else full.value + half < chance
    if better:
        return None
    tokenizer = own["tokenizer"].iloc[0] if "tokenizer" in own else None
    unread = "" if tokenizer is None or pd.isna(tokenizer) else f", and is {tokenizer} its own tokenizer"
    level = f"{chance:.1%}" if metric in HIGHER_IS_BETTER else f"{chance:.3g}"
    return (
        f"{task} at {length} tokens: the full cache itself is not seen to be better than chance ({short(metric)} "
        f"{interval_in_words(full, metric)}, chance {level}), so policies are not ranked there: is the model trained "
        f"for this{unread}?"
    )


def _values(rows: pd.DataFrame) -> dict[Key, list[tuple[int, str, np.ndarray]]]:
    """(policy, budget) -> the values by prompt of each seed."""
    found: dict[Key, list[tuple[int, str, np.ndarray]]] = {}
    if "values" in rows:
        named = (rows[name].tolist() for name in ("model", "split", "seed", "prompts", "values"))
        for model, split, seed, prompts, values in zip(*named, strict=True):
            if isinstance(values, np.ndarray | list):
                each = (int(seed), str(prompts), np.asarray(values, dtype=float))
                found.setdefault((str(model), str(split)), []).append(each)
    return found


def _part(
    own: Interval,
    full: Interval,
    chance: float,
    metric: str,
    values: list[tuple[int, str, np.ndarray]] | None,
    whole: list[tuple[int, str, np.ndarray]] | None,
) -> tuple[Interval, list[tuple[int, str, np.ndarray]], tuple[float, float] | None]:
    """The part that is kept, how much each prompt moves it (the delta method), and by how much it may at most."""
    rising = metric in HIGHER_IS_BETTER
    if own is full:
        return Interval(1.0, 1.0, 1.0), [], None
    half, half_full = ((told.high - told.low) / 2 for told in (own, full))
    if math.isnan(chance) and not rising:  # the full cache's error by the policy's
        part = full.value / own.value if own.value else 1.0
        width = math.hypot(half_full, part * half) / own.value if own.value else 0.0
        return Interval.around(part, width), [], None
    sign, chance = (1.0, 0.0 if math.isnan(chance) else chance) if rising else (-1.0, chance)
    scale = sign * (full.value - chance)
    part = sign * (own.value - chance) / scale if scale else 1.0
    width = math.hypot(half, part * half_full) / scale if scale else 0.0
    theirs = {seed: each for seed, _, each in whole or []}
    moves = [
        (seed, where, sign * ((each - chance) - part * (theirs[seed] - chance)) / scale)
        for seed, where, each in values or []
        if scale and seed in theirs and len(theirs[seed]) == len(each)
    ]
    if moves and len(moves) == len(values or []):
        most = max(1.0, part) / scale
        bounds = (-most, most) if rising else None
        width = contrast(weighted([("model", *each) for each in moves], 1.0, bounds)).high
        return Interval.around(part, width), moves, bounds
    return Interval.around(part, width), [], None
