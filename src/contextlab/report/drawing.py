"""What figures share: how each model looks, its rows in the results, lines with their bands, and the layout.

Colours are Okabe and Ito's, which colour-blind people tell apart; dashes and markers differ too, and one model looks
the same in every figure of a report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from contextlab.evaluation import summarise
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.report.families import MARKERS as MARKERS
from contextlab.report.families import families, family_looks
from contextlab.report.naming import bytes_in_words, label
from contextlab.report.sketch import Sketch

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5539", "#000000")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
LEARNER_COLOURS = ("#444444", "#777777", "#999999", "#555555", "#AAAAAA", "#666666", "#888888", "#BBBBBB")


def styles(results: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Label of a model -> colour, dash, marker; by order of appearance, the same for all figures of these results.

    Of many models colour and marker are those of its family, which is told, too.
    """
    found = {}
    names = _labels(results[results["kind"] == "model"])
    family = families(names)
    for i, name in enumerate(names):
        found[name] = {
            "colour": COLOURS[i % len(COLOURS)],
            "dash": DASHES[(i // len(COLOURS)) % len(DASHES)],
            "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
        }
        if name in family:
            colour, marker = family_looks(family)[family[name]]
            found[name] |= {"colour": colour, "marker": marker, "family": family[name]}
    for i, name in enumerate(_labels(results[results["kind"] == "learner"])):
        found.setdefault(
            name,
            {
                "colour": LEARNER_COLOURS[i % len(LEARNER_COLOURS)],
                "dash": DASHES[1 + i % (len(DASHES) - 1)],
                "marker": MARKERS[-1 - i % len(MARKERS)],
            },
        )
    return found


def lines_of(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Label, kind and rows of each line: learners first, so that models are drawn over them."""
    for kind in ("learner", "model"):
        for name, line in rows[rows["kind"] == kind].groupby("label", sort=False):
            yield str(name), kind, line


def draw_line(
    figure: Sketch,
    line: pd.DataFrame,
    places: list[int],
    name: str,
    kind: str,
    style: Mapping[str, Any],
    *,
    hidden: bool = False,
    told: Sequence[str] | None = None,
) -> None:
    """One predictor's values at `places`, with the band of their intervals. told: what hovering says of each place."""
    visible: bool | str = "legendonly" if hidden and kind == "learner" else True
    if len(places) > 1:
        figure.add_scatter(
            x=places + places[::-1],
            y=line["ci_high"].tolist() + line["ci_low"].tolist()[::-1],
            fill="toself",
            fillcolor=faint(style["colour"]),
            mode="lines",
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
            visible=visible,
        )
    figure.add_scatter(
        x=places,
        y=line["value"].tolist(),
        name=name,
        legendgroup=name,
        mode="lines+markers" if kind == "model" else "lines",
        line={"color": style["colour"], "dash": style["dash"], "width": 2.5 if kind == "model" else 1.5},
        marker={"symbol": style["marker"], "size": 7},
        visible=visible,
        text=None if told is None else list(told),
        hovertemplate=None if told is None else "%{text}: %{y}",
    )


def span(low: float, high: float) -> str:
    """The values of a group: 3, or 4-7."""
    return f"{low:g}" if low == high else f"{low:g}\u2013{high:g}"


def rows_of(
    results: pd.DataFrame,
    task: str,
    metric: str,
    split: str | None,
    several: bool | None = None,
    means: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """The rows of a task and metric, seeds put together, with the label that names the model in figures.

    means: the results that are numbers with their seeds put together (see `summarise`), where these are known.
    """
    rows = results if means is None else means
    chosen = (rows["task"] == task) & (rows["metric"] == metric)
    rows = rows[chosen if split is None else chosen & (rows["split"] == split)]
    found = rows if means is not None else summarise(rows[rows["value"].notna()])
    return found.assign(label=label(found, results["run"].nunique() > 1 if several is None else several))


def _labels(results: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(label(results[["run", "model"]].drop_duplicates())))


def best_learner(rows: pd.DataFrame) -> str | None:
    """The first learner: evaluation writes the best known one first."""
    learners = rows[rows["kind"] == "learner"]
    return None if learners.empty else str(learners["label"].iloc[0])


def is_far(rows: pd.DataFrame, line: pd.DataFrame) -> bool:
    """Whether a learner's curve would squeeze the models': it is then drawn only when its name is clicked."""
    models = rows[rows["kind"] == "model"]
    if models.empty:
        return False
    return bool(line["value"].max() > 3 * models["value"].max())


def faint(colour: str) -> str:
    """A colour of #rrggbb, nearly clear: that of a line's band."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def finish(figure: Sketch, x: str, y: str) -> Sketch:
    """What all figures share: margins, fonts, the legend's place, the titles of the axes."""
    figure.update_layout(
        template="plotly_white",
        height=420,
        margin={"l": 10, "r": 14, "t": 14, "b": 10},
        font={"size": 13, "family": "system-ui, sans-serif"},
        legend={"orientation": "h", "yanchor": "top", "y": -0.2, "x": 0},
        hovermode="closest",
    )
    figure.update_xaxes(title={"text": x, "standoff": 8}, automargin=True, zeroline=False)
    figure.update_yaxes(title={"text": y, "standoff": 8}, automargin=True, zeroline=False)
    return figure


def byte_axis(figure: Sketch, sizes: Iterable[float], axis: str = "x") -> None:
    """A logarithmic axis of bytes, with ticks at powers of two in KiB, MiB ..., and at 3/2 of them where few are."""
    known = [float(size) for size in sizes if size > 0]
    if not known:
        return
    low, high = math.log2(min(known)), math.log2(max(known))
    step = max(1, math.ceil((high - low) / 7))
    ticks = [2.0**power for power in range(math.floor(low), math.ceil(high) + 1, step)]
    if high - low < 2:
        ticks = [part * tick for tick in ticks for part in (1, 1.5)]
    shown = {"type": "log", "tickvals": ticks, "ticktext": [bytes_in_words(tick) for tick in ticks]}
    figure.update_layout({f"{axis}axis": shown})


def value_axis(figure: Sketch, metric: str, values: pd.Series, axis: str) -> None:
    """An axis of a metric. Shares end at 100%, and begin at 0 or as near below the least as leaves a tenth to see."""
    if metric not in HIGHER_IS_BETTER or values.empty:
        return
    least = float(values.min())
    low = 0.0 if least < 0.5 else min(0.9, math.floor(10 * least - 0.5) / 10)
    margin = 0.03 * (1 - low)
    shown = {"range": [low - margin, 1 + margin], "tickformat": ".0%", "autorange": False}
    figure.update_layout({f"{axis}axis": shown})
