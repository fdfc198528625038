"""What each way to spend memory keeps: policies, forms of the weights and other models beside the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from contextlab.evaluation.compress import FULL, OWN, WEIGHTS
from contextlab.evaluation.intervals import Interval
from contextlab.report.compress import over_seeds, with_weights
from contextlab.report.kept_cells import Kept, Mean, On, kept, mean_of
from contextlab.report.naming import ALL_ALIKE, percent

ITSELF = "the model itself"


@dataclass(frozen=True)
class Point:
    """One way to spend memory, and what it keeps.

    name: as it is told. weights: the form of the weights, "" for the model's own; the name of another model.
    policy: as it was written, "" for none. bytes: of the weights and of all states. mean: the part of the model's own
    quality that it keeps, a mean over tasks.
    """

    name: str
    weights: str
    policy: str
    bytes: float
    mean: Mean

    @property
    def part(self) -> Interval:
        """The part of the model's own quality that it keeps."""
        return self.mean.quality


def way_name(weights: str, policy: str, budget: str, kind: str) -> str:
    """How a way is told: "keydiff:window=8 at 25% on rtn:bits=8". The rest as in the rows of `compress`."""
    if kind == "model":
        return policy
    if policy == FULL:
        return weights or ITSELF
    return policy + (f" at {budget}" if budget != OWN else "") + (f" on {weights}" if weights else "")


def as_policies(results: pd.DataFrame) -> pd.DataFrame:
    """The table of `compress` in which every way but the model itself is a policy without a budget, by its name."""
    found = with_weights(results)
    rows = zip(*(found[name] for name in ("weights", "model", "split", "kind")), strict=True)
    names = [way_name(*map(str, row)) for row in rows]
    plain = np.array([name == ITSELF for name in names])
    return found.assign(
        model=np.where(plain, FULL, names), split=np.where(plain, FULL, OWN), kind="policy", weights=""
    ).astype({"model": "string", "split": "string", "kind": "string"})


def tasks_at(whole: Kept, length: int) -> list[On]:
    """The tasks of a length on which the model itself is better than chance."""
    return [task for task in whole.tasks if task[1] == length]


def points(results: pd.DataFrame, length: int, sizes: Mapping[str, float] | None = None) -> list[Point]:
    """What was measured at a length and served every task there, in the order of the table.

    sizes: name -> bytes; None for those that were measured, of the task in which they are most. Ways without are left
        out, and so are all where the model itself is at chance everywhere.
    """
    whole, found = kept(as_policies(results)), []
    on = tasks_at(whole, length)
    rows = with_weights(over_seeds(results))
    rows = rows[(rows["length"] == length) & (rows["metric"] == "total_bytes") & rows["task"].isin([t for t, _ in on])]
    for (weights, policy, budget, kind), own in rows.groupby(["weights", "model", "split", "kind"], sort=False):
        name = way_name(str(weights), str(policy), str(budget), str(kind))
        key = (FULL, FULL) if name == ITSELF else (name, OWN)
        mean = mean_of(whole.cells.get(key, {}), on)
        size = float(own["value"].max()) if sizes is None else sizes.get(name)
        if mean is not None and size is not None:
            who = (str(policy), "") if kind == "model" else (str(weights), "" if policy == FULL else str(policy))
            found.append(Point(name, *who, size, mean))
    return found


def front(found: Sequence[Point]) -> list[Point]:
    """Those that no other has both fewer bytes and a larger mean than, by rising bytes."""
    kept_most, chosen = -np.inf, []
    for way in sorted(found, key=lambda way: (way.bytes, -way.part.value)):
        if way.part.value > kept_most:
            kept_most = way.part.value
            chosen.append(way)
    return chosen


def part_in_words(told: Interval) -> str:
    """99.5% ± 0.4%: a part of the model's own quality, which may be above 100%."""
    half = told.high - told.value
    return f"{told.value:.1%} " + (f"± {percent(half)}%" if half > 0 else f"({ALL_ALIKE})")


def weights_words(results: pd.DataFrame) -> list[str]:
    """A sentence for each form of the weights and length: what it keeps with the full cache, and in which bytes."""
    found, sentences = with_weights(results), []
    forms = found[(found["kind"] == WEIGHTS) & (found["model"] == FULL)]
    stored = over_seeds(found[found["metric"] == "weight_bytes"]).drop_duplicates(["weights", "kind"])
    size = {(row["weights"], row["kind"]): float(row["value"]) for _, row in stored.iterrows()}
    for length in dict.fromkeys(forms["length"]):
        for way in points(found, int(length)):
            if way.weights and not way.policy and (way.weights, WEIGHTS) in size:
                share = size[way.weights, WEIGHTS] / size["", "policy"]
                sentences.append(
                    f"{way.name} keeps {part_in_words(way.part)} of the model's quality in {share:.1%} of the bytes of "
                    f"its weights: {'; '.join(way.mean.words)}."
                )
    return sentences
