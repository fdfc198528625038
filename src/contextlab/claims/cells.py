"""The tables that a claim's quantities are taken from, and the cells of a sum in them.

A table is a tidy one of results (`evaluation.results.COLUMNS`): of a task of the recipe, or of a measure. Its kind says
what a row's `seed` stands for: a training of a model; a turn of timings in one process; a draw of inputs on which two
things should be equal; or nothing, where all is counted and no chance is in it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from contextlab.claims.predicate import Sum
from contextlab.errors import InputError, unknown
from contextlab.report.findings import Findings

Kind = Literal["trainings", "turns", "draws", "counted"]
Ends = Literal["prompts", "hard"]
"""What ci_low and ci_high of a table of trainings are: the prompts' interval, or bounds between which a value lies."""


@dataclass(frozen=True)
class Table:
    """Rows that quantities are taken from.

    found: of a task of a run, by which what all prompts score is paired; None of a measure.
    """

    rows: pd.DataFrame
    kind: Kind
    ends: Ends = "hard"
    found: Findings | None = None

    @property
    def repeats(self) -> int | None:
        """The fewest trainings of a model, or the turns or draws; None where all is counted."""
        if self.kind == "counted":
            return None
        if self.found is not None:
            return min((mean.seeds for mean in self.found.means if mean.kind == "model"), default=0)
        return int(self.rows.groupby("model")["seed"].nunique().min()) if len(self.rows) else 0


class Part(NamedTuple):
    """A weight, and the rows of one name in one place of a table: one a training, a turn or a draw."""

    weight: float
    task: str
    name: str
    rows: pd.DataFrame


def parts_of(each: Sum, table: Table, sign: float) -> list[Part]:
    """The cells of a sum with their weights, which are times the sign; those of a slope are many.

    Raises InputError where the table has no such cells.
    """
    task, rows = str(each.task), table.rows
    metrics = list(dict.fromkeys(rows["metric"]))
    usual = table.found.metric if table.found is not None else metrics[0] if len(metrics) == 1 else None
    metric = each.metric or usual
    if metric not in metrics:
        raise InputError(f"{task}: {unknown('metric of this table', str(metric), metrics)}")
    rows = rows[rows["metric"] == metric]
    if table.found is not None:  # a measure has no splits
        wanted = [str(each.split)]
        if each.slope == "length":
            wanted = fnmatch.filter(rows["split"].unique(), str(each.split))
        rows = rows[rows["split"].isin(wanted)]
    for column, place in (("shot", each.shot), ("length", each.length)):
        if place is not None:
            rows = rows[(rows[column] == place).fillna(False)]
        elif column == "shot" and each.slope != "shot":
            rows = rows[rows["shot"].isna()]
    found = []
    for name, weight in (each.weights or {}).items():
        own = rows[rows["model"] == name]
        if not len(own):
            at = ", ".join(f"{k} {v}" for k, v in (("shot", each.shot), ("length", each.length)) if v is not None)
            raise InputError(f"{task}: nothing was measured of {name!r}{' at ' if at else ''}{at}")
        if each.slope is None:
            found.append(_one_place(Part(sign * weight, task, name, own)))
            continue
        places = list(each.at) or sorted({int(x) for x in own[each.slope].dropna()})
        for place, slope in zip(places, _slopes(places, each.log), strict=True):
            here = own[(own[each.slope] == place).fillna(False)]
            if not len(here):
                raise InputError(f"{task}: nothing was measured of {name!r} at {each.slope} {place}")
            found.append(_one_place(Part(sign * weight * slope, task, name, here)))
    return found


def _one_place(part: Part) -> Part:
    if part.rows["seed"].duplicated().any():
        raise InputError(f"{part.task}: {part.name!r} was measured in several places; say which length, or which split")
    return part


def _slopes(places: Sequence[int], log: bool) -> list[float]:
    """The weights of values at these places in the slope of their line of least squares."""
    if log and min(places, default=1) < 1:
        raise InputError("log: expected places above 0; give at")
    x = np.array([math.log2(place) if log else place for place in places], dtype=float)
    if len(x) < 2:
        raise InputError("slope: expected two or more places along which something was measured")
    return list((x - x.mean()) / np.square(x - x.mean()).sum())
