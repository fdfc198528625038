"""What probes found inside trained models: figures, tables and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from plotly.colors import make_colorscale, sequential

from contextlab.inspect.looking import Looked, over_seeds
from contextlab.inspect.probe import Probe, Row, by, parse_probe, records, shown
from contextlab.report.drawing import COLOURS, DASHES, MARKERS, _faint, finish
from contextlab.report.page import render
from contextlab.report.sections import Drawn
from contextlab.report.sketch import Sketch

MOST_ROWS = 400
"""Of a table on a page; the parquet file beside it has all."""
CELLS = {"site": "site", "head": "head", "place": "place", "at": "at", "what": "what", "measure": "measure"}


def write_looked_page(found: Looked, path: str | Path, title: str, **more: Any) -> Path:
    """Write what probes found as one HTML file that needs nothing else: in words first, then figures and tables.

    more: what else the template shows.
    """
    drawn = looked_figures(found.table)
    return render(
        "looked.html.j2", path, drawn, title=title, words=found.words, left_out=found.left_out,
        tables=looked_tables(found.table), most=MOST_ROWS, **{"maps": "", **more},
    )  # fmt: skip


def looked_tables(table: pd.DataFrame) -> dict[str, list[dict[str, str]]]:
    """Title of a probe, task and model -> rows, every cell text, seeds put together."""
    tables: dict[str, list[dict[str, str]]] = {}
    for (run, task, text, model), rows in by(records(over_seeds(table)), "run", "task", "probe", "model").items():
        columns = [name for name in CELLS if any(row[name] is not None for row in rows)]
        title = ", ".join(filter(None, (text, model, task, run)))
        tables[title] = [
            {
                **{CELLS[name]: "" if row[name] is None else str(row[name]) for name in columns},
                "value": shown(row, 3),
                **({"control": f"{row['control']:.3f}"} if row["control"] is not None else {}),
            }
            for row in rows
        ]
    return tables


def looked_figures(table: pd.DataFrame) -> list[Drawn]:
    """The figures of each probe and task: lines with one line a model, or a map for each model."""
    drawn: list[Drawn] = []
    everything = records(over_seeds(table)) if len(table) else []
    runs = len({row["run"] for row in everything}) > 1
    models = list(dict.fromkeys(_name(row, runs) for row in everything))
    tasks = len({row["task"] for row in everything}) > 1
    for (task, text), own in by(everything, "task", "probe").items():
        probe = parse_probe(text)
        wanted = probe.drawing.measures
        own = [row for row in own if not wanted or row["measure"] in wanted]
        for key, rows in by(own, *probe.drawing.figures).items():
            values = key if isinstance(key, tuple) else (key,)
            named = ", ".join(str(each) for each in values if each)
            title = ": ".join(filter(None, (f"{text} on {task}" if tasks else text, named)))
            if probe.drawing.form == "lines":
                drawn.append(Drawn(title, _lines(probe, rows, models, runs), probe.drawing.note))
                continue
            for model, part in by([{**row, "model": _name(row, runs)} for row in rows], "model").items():
                whose = f"{title}, {model}" if len(models) > 1 else title
                drawn.append(Drawn(whose, _map(probe, part), probe.drawing.note))
    return drawn


def _name(row: Row, runs: bool) -> str:
    return f"{row['model']} ({row['run']})" if runs else str(row["model"])


def _lines(probe: Probe, rows: Sequence[Row], models: Sequence[str], runs: bool) -> Sketch:
    """The value along a column, with its interval; a model with one place is a mark."""
    figure, x = Sketch(), probe.drawing.x
    for model, line in by([{**row, "model": _name(row, runs)} for row in rows], "model").items():
        number = models.index(model)
        colour = COLOURS[number % len(COLOURS)]
        at = [row[x] for row in line]
        known = [row for row in line if row["ci_low"] is not None]
        numeric = all(isinstance(each, int | float) for each in at)
        if numeric and len(known) > 1:
            places = [row[x] for row in known]
            ends = [row["ci_high"] for row in known] + [row["ci_low"] for row in known][::-1]
            figure.add_scatter(
                x=places + places[::-1], y=ends, fill="toself", fillcolor=_faint(colour), mode="lines",
                line={"width": 0}, hoverinfo="skip", showlegend=False, legendgroup=model,
            )  # fmt: skip
        bars = {} if numeric else {"error_y": _bars(line)}
        figure.add_scatter(
            x=at, y=[row["value"] for row in line], name=model, legendgroup=model, mode="lines+markers", **bars,
            line={"color": colour, "dash": DASHES[number // len(COLOURS) % len(DASHES)], "width": 2},
            marker={"symbol": MARKERS[number % len(MARKERS)], "size": 8},
            text=[shown(row, 3) for row in line], hovertemplate="%{x}: %{text}<extra>" + model + "</extra>",
        )  # fmt: skip
        controls = [row["control"] for row in line]
        if all(each is not None for each in controls):
            figure.add_scatter(
                x=at, y=controls, name=f"{model}, control", legendgroup=model, mode="lines", showlegend=False,
                line={"color": colour, "dash": "dot", "width": 1}, hovertemplate="control %{y:.3f}<extra></extra>",
            )  # fmt: skip
    return finish(figure, x, str(rows[0]["measure"]))


def _bars(line: Sequence[Row]) -> dict[str, Any]:
    ends = [(row["ci_high"], row["ci_low"], row["value"]) for row in line]
    return {
        "type": "data", "symmetric": False,
        "array": [0 if high is None else high - value for high, _, value in ends],
        "arrayminus": [0 if low is None else value - low for _, low, value in ends],
    }  # fmt: skip


def _map(probe: Probe, rows: Sequence[Row]) -> Sketch:
    """The value by two columns, as colour; from 0 to 1 where it lies there, else even to both sides of 0."""
    x, y = probe.drawing.x, probe.drawing.y
    columns, lines = (_in_order([row[name] for row in rows if row[name] is not None]) for name in (x, y))
    cells = {(row[y], row[x]): row for row in rows}
    values = [row["value"] for row in rows]
    signed = min(values) < -0.05
    most = max(1.0, *(abs(each) for each in values)) if max(map(abs, values)) > 0.2 else max(map(abs, values)) or 1.0
    scale = sequential.Blues if not signed else ["#b2182b", "#f7f7f7", "#2166ac"]
    figure = Sketch().add_heatmap(
        x=[str(each) for each in columns], y=[f"{y} {each}" if y != "site" else str(each) for each in lines],
        z=[[cells[line, at]["value"] if (line, at) in cells else None for at in columns] for line in lines],
        customdata=[[shown(cells[line, at], 3) if (line, at) in cells else "" for at in columns] for line in lines],
        hovertemplate="%{y}, " + x + " %{x}: %{customdata}<extra></extra>",
        zmin=-most if signed else 0, zmax=most, colorscale=make_colorscale(scale), xgap=1, ygap=1,
        colorbar={"thickness": 12, "outlinewidth": 0},
    )  # fmt: skip
    finish(figure, x, "")
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    return figure.update_layout(height=max(180, 60 + 34 * len(lines)))


def _in_order(values: Sequence[Any]) -> list[Any]:
    """Each once: numbers rising, names as they come."""
    once = list(dict.fromkeys(values))
    return once if any(isinstance(each, str) for each in once) else sorted(once)
