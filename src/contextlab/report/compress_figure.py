"""The figure of what `compress` measured: quality against bytes of state."""

from __future__ import annotations

import math

import pandas as pd

from contextlab.evaluation.compress import FULL, WEIGHTS
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.report.compress import knows_what_follows, main_metric, over_seeds
from contextlab.report.drawing import COLOURS, DASHES, MARKERS, byte_axis, finish
from contextlab.report.kept import WHOLE
from contextlab.report.naming import metric_title
from contextlab.report.sketch import Sketch, drawing

MOST_COLOURED = 11
"""Policies that stand out in a figure; where there are more, the others are grey."""


@drawing
def quality_against_bytes(results: pd.DataFrame, task: str, length: int) -> Sketch:
    """A task's quality against the bytes of state of one sequence, a line a policy through its budgets.

    Forms of the weights are left out (`kept_against_total` has them). The full cache and the models compared are
    single marks. The dotted line joins what nothing else beats in both. Of many policies a few have colours: at each
    budget the best two that hold less, and the best of the rest.
    """
    results = over_seeds(results)
    results = results[results["kind"] != WEIGHTS]
    rows = results[(results["task"] == task) & (results["length"] == length)]
    metric = main_metric(task, rows)
    wide = rows[rows["metric"] == metric].set_index(["model", "split", "kind"])
    sizes = rows[rows["metric"] == "state_bytes"].set_index(["model", "split", "kind"])["value"]
    wide = wide.assign(bytes=sizes).reset_index()
    figure = Sketch()
    front = _front(wide, metric)
    figure.add_scatter(
        x=front["bytes"].tolist(), y=front["value"].tolist(), name="best for its bytes", mode="lines",
        line={"color": "#999999", "dash": "dot", "width": 1.5}, hoverinfo="skip",
    )  # fmt: skip
    names = list(dict.fromkeys(wide.loc[(wide["model"] != FULL) & (wide["kind"] == "policy"), "model"]))
    if len(names) > MOST_COLOURED + 2:
        names = _outstanding(wide[wide["kind"] == "policy"], metric)
    names += list(dict.fromkeys(wide.loc[wide["kind"] == "model", "model"]))
    order = {name: i for i, name in enumerate([*names, FULL])}  # grey ones lie below the others
    groups = sorted(wide.groupby("model", sort=False), key=lambda group: order.get(str(group[0]), -1))
    for name, own in groups:
        i = names.index(name) if name in names else 0
        own = own.sort_values("bytes")
        compared, plain = bool((own["kind"] == "model").all()), name == FULL
        grey = not plain and name not in names
        colour = "#000000" if plain else "#d0d0d0" if grey else COLOURS[i % len(COLOURS)]
        figure.add_scatter(
            x=own["bytes"].tolist(),
            y=own["value"].tolist(),
            name="full cache" if plain else str(name) + (" (its own state)" if compared else ""),
            mode="lines+markers" if len(own) > 1 else "markers",
            line={"color": colour, "dash": DASHES[i // len(COLOURS) % len(DASHES)], "width": 1 if grey else 2},
            showlegend=not grey,
            marker={
                "symbol": "star"
                if plain
                else MARKERS[(i + i // len(COLOURS)) % len(MARKERS)] + ("-open" if compared else ""),
                "size": 13 if plain or compared else 5 if grey else 9,
                "color": colour,
            },
            error_y={
                "type": "data",
                "array": (own["ci_high"] - own["value"]).tolist(),
                "arrayminus": (own["value"] - own["ci_low"]).tolist(),
                "thickness": 0 if grey else 1,
                "width": 3,
            },
            text=["" if plain or compared else str(split) for split in own["split"]],
            hovertemplate="%{text}  %{y:.4g}, %{x:,.0f} bytes",
        )
    figure = finish(figure, "bytes of state of one sequence", metric_title(metric))
    byte_axis(figure, wide["bytes"])
    figure.update_layout(height=460)
    if metric == "perplexity":
        figure.update_yaxes(type="log", nticks=6)
    if (wide["kind"] == "policy").any() and metric not in HIGHER_IS_BETTER:  # a bad policy shall not hide the others
        told = wide[wide["model"].isin([*names, FULL])]
        low, high = float(told["ci_low"].min()) / 1.05, float(told["ci_high"].max()) * 1.2
        figure.update_yaxes(range=[math.log10(low), math.log10(high)] if metric == "perplexity" else [low, high])
    return figure


def _outstanding(rows: pd.DataFrame, metric: str) -> list[str]:
    """Of many policies those with colours: at each budget the best two that hold less, and the best of the rest."""
    rows = rows.assign(good=rows["value"] * (1 if metric in HIGHER_IS_BETTER else -1))
    whole = float(rows.loc[rows["model"] == FULL, "bytes"].iloc[0])
    rows = rows[rows["model"] != FULL].sort_values("good", ascending=False, kind="stable")
    names = rows["model"].astype(str)
    chosen = [name for name in dict.fromkeys(names) if knows_what_follows(name)]
    less = rows[(rows["bytes"] < WHOLE * whole) & ~names.isin(chosen)]
    for _, own in less.groupby("split", sort=False):
        chosen += [str(name) for name in own["model"].head(2)]
    chosen += list(rows.groupby("model")["good"].mean().sort_values(ascending=False).index.astype(str))
    return list(dict.fromkeys(chosen))[:MOST_COLOURED]


def _front(wide: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows that no other beats in bytes and quality, by rising bytes."""
    sign = 1 if metric in HIGHER_IS_BETTER else -1
    kept, best = [], -math.inf
    for index, row in wide.sort_values(["bytes", "value"], ascending=[True, sign < 0]).iterrows():
        if sign * row["value"] > best:
            best = sign * row["value"]
            kept.append(index)
    return wide.loc[kept]
