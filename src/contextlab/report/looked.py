"""What probes found inside trained models: figures, tables and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plotly.colors import make_colorscale, sequential

from contextlab.files import write_atomic
from contextlab.inspect.looking import Looked, over_seeds
from contextlab.inspect.probe import Probe, Row, by, parse_probe, records, shown
from contextlab.report.drawing import COLOURS, DASHES, MARKERS, faint, finish
from contextlab.report.page import page_pieces, template
from contextlab.report.page_data import PageData
from contextlab.report.sections import Drawn
from contextlab.report.sketch import Sketch

MOST_ROWS, MOST_TABLES = 400, 100
"""Of a table on a page, and of tables; the parquet file beside it has all."""
CELLS = ("site", "head", "place", "at", "what", "measure")


@dataclass(frozen=True)
class Section:
    """What one probe found on one task: sentences, and figures."""

    title: str
    words: list[str]
    drawn: list[Drawn]


def write_looked_page(found: Looked, path: str | Path, title: str, maps: str = "") -> Path:
    """Write what probes found as one HTML file that needs nothing else: of each probe its words, then its figures.

    maps: HTML that stands before the tables.
    """
    data, rows = PageData(), records(over_seeds(found.table))
    sections, tables = looked_sections(rows), looked_tables(rows)
    page = template("looked.html.j2").render(
        title=title, maps=maps, left_out=found.reasons, most=MOST_ROWS,
        tables=tables if len(tables) <= MOST_TABLES else {},
        sections=[(f"s{n}", each.title, each.words, data.hold(each.drawn)) for n, each in enumerate(sections)],
        pieces=page_pieces(data),
    )  # fmt: skip
    write_atomic(Path(path), page)
    return Path(path)


def looked_sections(everything: Sequence[Row]) -> list[Section]:
    """A section for each task and probe; its figures have a line for each model, or a map.

    everything: rows of `over_seeds`.
    """
    several = {key: len({row[key] for row in everything}) > 1 for key in ("run", "task")}
    runs = several["run"]
    everything = [{**row, "model": f"{row['model']} ({row['run']})" if runs else row["model"]} for row in everything]
    models = list(dict.fromkeys(row["model"] for row in everything))
    found = []
    for (task, text), rows in by(everything, "task", "probe").items():
        probe, words = parse_probe(text), []
        for model, own in by(rows, "model").items():
            said = probe.words(own)
            words += [f"{model}: {sentence}" for sentence in said] if len(models) > 1 else said
        title = f"{task}: {text}" if several["task"] else text
        found.append(Section(title, words, _drawn(probe, rows, models)))
    return found


def _drawn(probe: Probe, rows: Sequence[Row], models: Sequence[str]) -> list[Drawn]:
    found: list[Drawn] = []
    drawing = probe.drawing
    own = [row for row in rows if not drawing.measures or row["measure"] in drawing.measures]
    for key, part in by(own, *drawing.figures).items() if drawing.figures else [((), own)]:
        values = key if isinstance(key, tuple) else (key,)
        title = ", ".join(str(each) for each in values if each is not None)
        if drawing.form == "lines":
            found.append(Drawn(title or drawing.x, _lines(probe, part, models), "" if found else drawing.note))
            continue
        for model, alone in by(part, "model").items():
            named = ", ".join(filter(None, (title, model if len(models) > 1 else "")))
            found.append(Drawn(named or drawing.x, _map(probe, alone), "" if found else drawing.note))
    return found


def _at(row: Row, column: str) -> Any:
    """What a row has in a column, or in two: 1.2 in "layer.head"."""
    if "." not in column:
        return row[column]
    return ".".join(str(row[part]) for part in column.split(".") if row[part] is not None)


def looked_tables(everything: Sequence[Row]) -> dict[str, list[dict[str, str]]]:
    """Title of a probe, task and model -> rows, every cell text. everything: rows of `over_seeds`."""
    tables: dict[str, list[dict[str, str]]] = {}
    for (run, task, text, model), rows in by(everything, "run", "task", "probe", "model").items():
        columns = [name for name in CELLS if any(row[name] is not None for row in rows)]
        title = ", ".join(filter(None, (text, model, task, run)))
        tables[title] = [
            {
                **{name: "" if row[name] is None else str(row[name]) for name in columns},
                "value": shown(row, 3),
                **({"control": f"{row['control']:.3f}"} if row["control"] is not None else {}),
            }
            for row in rows
        ]
    return tables


def _lines(probe: Probe, rows: Sequence[Row], models: Sequence[str]) -> Sketch:
    """The value along a column, with its interval; a model with one place is a mark."""
    figure, x = Sketch(), probe.drawing.x
    for model, line in by(rows, "model").items():
        number = models.index(model)
        colour = COLOURS[number % len(COLOURS)]
        at = [_at(row, x) for row in line]
        known = [row for row in line if row["ci_low"] is not None]
        numeric = all(isinstance(each, int | float) for each in at)
        if numeric and len(known) > 1:
            places = [_at(row, x) for row in known]
            ends = [row["ci_high"] for row in known] + [row["ci_low"] for row in known][::-1]
            figure.add_scatter(
                x=places + places[::-1], y=ends, fill="toself", fillcolor=faint(colour), mode="lines",
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
    """The value by two columns, as colour: between the bounds, or from 0, to both sides where there are any below."""
    x, y = probe.drawing.x, probe.drawing.y
    cells = {(_at(row, y), _at(row, x)): row for row in rows}
    columns, lines = (_in_order([at for row in rows if (at := _at(row, name)) is not None]) for name in (x, y))
    values = [row["value"] for row in rows]
    low, high = probe.drawing.bounds or (min(values), max(values))
    signed, most = min(values) < -0.05, max(abs(low), abs(high)) or 1.0
    named = "" if y == "site" else f"{y.split('.')[-1]} "
    figure = Sketch().add_heatmap(
        x=[str(each) for each in columns], y=[f"{named}{each}" for each in lines],
        z=[[cells[line, at]["value"] if (line, at) in cells else None for at in columns] for line in lines],
        customdata=[[shown(cells[line, at], 3) if (line, at) in cells else "" for at in columns] for line in lines],
        hovertemplate="%{y}, " + x + " %{x}: %{customdata}<extra></extra>",
        zmin=-most if signed else 0, zmax=most, xgap=1, ygap=1,
        colorscale=make_colorscale(["#b2182b", "#f7f7f7", "#2166ac"] if signed else sequential.Blues),
        colorbar={"thickness": 12, "outlinewidth": 0},
    )  # fmt: skip
    finish(figure, "" if x == "what" else x, "")
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    return figure.update_layout(height=min(900, max(200, 90 + 26 * len(lines))))


def _in_order(values: Sequence[Any]) -> list[Any]:
    """Each once: numbers rising, names as they come."""
    once = list(dict.fromkeys(values))
    return once if any(isinstance(each, str) for each in once) else sorted(once)
