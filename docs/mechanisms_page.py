"""Renew docs/mechanisms.md from a run of the recipe `mechanisms`: `python docs/mechanisms_page.py RUN`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from contextlab import open_run
from contextlab.evaluation import summarise
from contextlab.evaluation.intervals import Interval, t95
from contextlab.inspect.probe import by, records
from contextlab.report.naming import interval_in_words
from contextlab.words import listed

PAGE = Path(__file__).parent / "mechanisms.md"
Rows = Sequence[Mapping[str, Any]]


def whole(rows: Rows) -> Rows:
    """Those that are of no layer."""
    return [row for row in rows if row["layer"] is None]


def last_layer(rows: Rows) -> Rows:
    """Those of the last layer there is."""
    most = max((row["layer"] for row in rows if row["layer"] is not None), default=None)
    return [row for row in rows if row["layer"] == most]


def last_place(rows: Rows) -> Rows:
    """Those of the last token there is."""
    most = max((row["place"] for row in rows if row["place"] is not None), default=None)
    return [row for row in rows if row["place"] == most]


def every(rows: Rows) -> Rows:
    """All."""
    return rows


@dataclass(frozen=True)
class Measure:
    """One number of a model: the largest value among rows of a probe.

    head: of its column. what: a pattern. among: which rows. digits: that are shown.
    """

    head: str
    probe: str
    what: str
    measure: str
    among: Callable[[Rows], Rows] = every
    digits: int = 2


TABLES: Mapping[str, Sequence[Measure]] = {
    "What is looked at": (
        Measure("after the same symbol, a head", "heads", "induction", "share"),
        Measure("token before, a head", "heads", "previous", "share"),
        Measure("after the same symbol, the model", "influence", "induction", "share", whole),
        Measure("tokens back, the model", "influence", "mean", "tokens back", whole, 1),
    ),
    "Where the answer comes from": (
        Measure("one head, put back", "patching", "heads|mixers", "share of the effect"),
        Measure("lost without the best mixer", "ablation", "mean", ".* lost"),
        Measure("states that do not grow", "state_vector", "states that do not grow", "share carried"),
        Measure("states that grow", "state_vector", "states that grow", "share carried"),
        Measure("read off the stream", "linear", ".* in the stream", "r2|accuracy"),
        Measure("read off a state", "linear", ".* in the state", "r2|accuracy"),
    ),
    "What is kept": (
        Measure("part of the rank that is used", "state_use", ".*", "share of the largest rank", last_place),
        Measure("half of a write, tokens", "survival", "state", "half-life", digits=1),
        Measure("similarity to gradient descent", "algorithm", "gradient_descent", "similarity", last_layer),
        Measure("its steps", "algorithm", "gradient_descent", "steps", last_layer, 0),
    ),
}


def value(rows: Rows, wanted: Measure) -> tuple[Interval, float | None] | None:
    """A model's number with an interval over its seeds, and its control; None where it was not measured."""
    own = [
        row
        for row in rows
        if row["probe"].split(":")[0] == wanted.probe
        and re.fullmatch(wanted.what, row["what"] or "")
        and re.fullmatch(wanted.measure, row["measure"])
    ]
    found, controls = [], []
    for part in by(list(own), "seed").values():
        if among := wanted.among(part):
            top = max(among, key=lambda row: row["value"])
            found.append(top["value"])
            controls.append(np.nan if top["control"] is None else top["control"])
    if not found:
        return None
    mean, control = float(np.mean(found)), float(np.mean(controls))
    half = t95(len(found) - 1) * float(np.std(found, ddof=1)) / len(found) ** 0.5 if len(found) > 1 else np.inf
    return Interval.around(mean, half), None if np.isnan(control) else control


def highest(values: Mapping[str, Interval]) -> str:
    """Who has the highest values, told apart by their intervals from all others; "" where none are."""
    if len(values) < 2:
        return ""
    order = sorted(values, key=lambda name: -values[name].value)
    group = [name for name in order if values[name].high >= values[order[0]].low]
    rest = [name for name in order if name not in group]
    if not rest or max(values[name].high for name in rest) >= min(values[name].low for name in group):
        return ""
    return f"{listed(group)} {'have' if len(group) > 1 else 'has'} more than all others"


def section(task: str, rows: Rows, quality: Mapping[str, str], metric: str) -> str:
    """The tables of one task, and what they part."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [f"## {task}", ""]
    for title, measures in TABLES.items():
        found = {m.head: {model: value([r for r in rows if r["model"] == model], m) for model in models}
                 for m in measures}  # fmt: skip
        told = [m for m in measures if any(found[m.head].values())]
        if not told:
            continue
        heads = ["model", *([metric] if title == next(iter(TABLES)) else []), *(m.head for m in told)]
        lines += [f"*{title}*", "", f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
        for model in models:
            cells = [_cell(found[m.head][model], m.digits) for m in told]
            start = [model, quality[model]] if title == next(iter(TABLES)) else [model]
            lines.append(f"| {' | '.join([*start, *cells])} |")
        lines.append("")
        for m in told:
            known = {model: each[0] for model, each in found[m.head].items() if each is not None}
            if said := highest({name: each for name, each in known.items() if np.isfinite(each.high)}):
                lines.append(f"- {m.head}: {said}.")
        lines.append("")
    return "\n".join(lines)


def _cell(found: tuple[Interval, float | None] | None, digits: int) -> str:
    if found is None:
        return ""
    told, control = found
    half = f" ± {told.high - told.value:.{digits}f}" if np.isfinite(told.high) else ""
    return f"{told.value:.{digits}f}{half}" + (f" ({control:.{digits}f})" if control is not None else "")


def renew(run: str) -> None:
    """Write the run's tables between the marks of the page."""
    opened = open_run(run)
    rows, parts = records(opened.inspected), []
    means = records(summarise(opened.results[opened.results["shot"].isna() & opened.results["value"].notna()]))
    for task, own in by(rows, "task").items():
        here = [row for row in means if row["task"] == task and row["split"] == "train" and row["kind"] == "model"]
        metric = here[0]["metric"]
        quality = {
            row["model"]: interval_in_words(Interval.known(row["value"], row["ci_low"], row["ci_high"]), metric)
            for row in here
            if row["metric"] == metric
        }
        parts.append(section(task, own, quality, metric.replace("_", " ")))
    text = PAGE.read_text()
    start, end = "<!-- tables: written by docs/mechanisms_page.py -->\n", "<!-- end of tables -->\n"
    head, _, rest = text.partition(start)
    PAGE.write_text(head + start + "\n" + "\n".join(parts) + "\n" + end + rest.partition(end)[2])


if __name__ == "__main__":
    renew(sys.argv[1])
