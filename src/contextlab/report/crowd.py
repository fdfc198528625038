"""Figures of many models: coloured by family, each name at its mark, and where marks lie on one spot told in a list.

Colours run out after eight models, and a legend of sixty names tells nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import pandas as pd

from contextlab.report.drawing import byte_axis, finish, value_axis
from contextlab.report.families import family_looks
from contextlab.report.naming import bytes_in_words, metric_title, value_in_words
from contextlab.report.sketch import Sketch, drawing

SIZE = (1000, 480)
"""Pixels of the figure for which names are placed; where it is drawn narrower they are left out."""
NEAR = 11
"""Pixels between marks that lie on one spot."""
CROWD = 3
"""Marks on one spot that are told in the list."""
AT_MARK = "at a mark"
"""What annotations are called that need the figure's whole width."""
INVISIBLE = "rgba(255,255,255,0)"
"""Plotly 6.0 knows no #rrggbbaa."""
LETTER, LINE, REACH = 6.3, 13, (9, 14, 22, 32, 46, 62)
"""Pixels of a letter and a line of a name, and how far from its mark a name may stand."""


def by_family(figure: Sketch, look: Mapping[str, Mapping[str, Any]]) -> Sketch:
    """The figure, where its models have families with a legend of these; the names are told by hovering.

    look: of each trace's name, as `drawing.styles` gives it.
    """
    names = [trace.get("name") for trace in figure.data]
    family = {name: look[name]["family"] for name in names if name is not None and "family" in look.get(name, ())}
    for name, trace in zip(names, figure.data, strict=True):
        if name in family:
            trace |= {"showlegend": False, "legendgroup": family[name]}
    for each, (colour, marker) in family_looks(family).items():
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name=each, legendgroup=each,
            marker={"color": colour, "symbol": marker, "size": 10},
        )  # fmt: skip
    return figure


@dataclass(frozen=True)
class Spot:
    """A mark: what it is called, its bytes and value, and where it lies on the figure in pixels."""

    name: str
    bytes: float
    value: float
    x: float
    y: float


@drawing
def many_against_state(rows: pd.DataFrame, family: Mapping[str, str], metric: str) -> Sketch:
    """A metric against bytes of state, a mark a model. rows: with label, value, ci_low, ci_high and bytes."""
    figure = Sketch()
    for each, (colour, marker) in family_looks(family).items():
        own = rows[rows["label"].map(family) == each]
        if own.empty:
            continue
        figure.add_scatter(
            x=own["bytes"].tolist(), y=own["value"].tolist(), name=each, mode="markers",
            marker={"color": colour, "symbol": marker, "size": 9, "line": {"color": "#fff", "width": 0.7}},
            error_y={
                "type": "data", "array": (own["ci_high"] - own["value"]).tolist(),
                "arrayminus": (own["value"] - own["ci_low"]).tolist(), "thickness": 1, "width": 0,
            },
            text=[f"{label}, {bytes_in_words(size)}" for label, size in zip(own["label"], own["bytes"], strict=True)],
            hovertemplate="%{text}: %{y}",
        )  # fmt: skip
    finish(figure, "bytes of state at the end of a prompt", metric_title(metric))
    byte_axis(figure, rows["bytes"])
    value_axis(figure, metric, rows["value"], axis="y")
    low, high = math.log10(rows["bytes"].min()), math.log10(rows["bytes"].max())
    pad = 0.05 * max(high - low, 1)
    figure.update_xaxes(range=[low - pad, high + 2 * pad])
    bottom, top = figure.layout["yaxis"].get("range") or (rows["value"].min(), rows["value"].max())
    width, height = SIZE
    spots = [
        Spot(
            str(row["label"]), float(row["bytes"]), float(row["value"]),
            (math.log10(row["bytes"]) - low + pad) / (high - low + 3 * pad) * (width - 80),
            (row["value"] - bottom) / max(top - bottom, 1e-12) * height,
        )
        for _, row in rows.iterrows()
    ]  # fmt: skip
    colours = {each.name: family_looks(family)[family[each.name]][0] for each in spots}
    told = list(_name(figure, spots, colours, metric))
    figure.update_layout(
        height=height + 130 + 17 * len(told),
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.01, "x": 0},
        margin={"l": 60, "r": 14, "t": 40, "b": 75 + 17 * len(told)},
        meta={"wide": True},
    )
    if told:
        figure.add_annotation(
            text="<br>".join(told), name=AT_MARK, xref="paper", yref="paper", x=0, y=0, yshift=-52, xanchor="left",
            yanchor="top", align="left", showarrow=False, font={"size": 11.5},
        )  # fmt: skip
    return figure


def _name(figure: Sketch, spots: Sequence[Spot], colours: Mapping[str, str], metric: str) -> Iterator[str]:
    """Write names at marks, or a number there; yields the lines of the list of what the numbers stand for."""
    taken = [(each.x - 6, each.y - 6, each.x + 6, each.y + 6) for each in spots]
    waiting: list[list[Spot]] = []
    for group in sorted(_groups(spots), key=len):
        if len(group) >= CROWD or not all(_place(figure, each, each.name, colours[each.name], taken) for each in group):
            waiting.append(group)
    for number, group in enumerate(sorted(waiting, key=lambda each: -each[0].value), start=1):
        middle = group[len(group) // 2]
        _place(figure, middle, f"<b>{number}</b>", "#222222", taken, letters=2)
        sizes = [bytes_in_words(extreme(each.bytes for each in group)) for extreme in (min, max)]
        values = [value_in_words(extreme(each.value for each in group), metric) for extreme in (min, max)]
        where = f"{' to '.join(dict.fromkeys(values))}, {' to '.join(dict.fromkeys(sizes))}"
        names = ", ".join(sorted(each.name for each in group))
        first, *rest = wrap(f"{number}  {where}: {names}", 150, break_long_words=False, break_on_hyphens=False)
        yield first.replace(str(number), f"<b>{number}</b>", 1)
        yield from (f"     {line}" for line in rest)


def _groups(spots: Sequence[Spot]) -> list[list[Spot]]:
    """The marks by the spot on which they lie: each is near another of its group."""
    groups: list[list[Spot]] = []
    for spot in sorted(spots, key=lambda each: (each.x, each.y)):
        near = [g for g in groups if any(math.hypot(spot.x - e.x, spot.y - e.y) < NEAR for e in g)]
        groups = [g for g in groups if g not in near] + [[*(each for g in near for each in g), spot]]
    return groups


def _place(
    figure: Sketch,
    spot: Spot,
    text: str,
    colour: str,
    taken: list[tuple[float, float, float, float]],
    letters: int | None = None,
) -> bool:
    """Write a text beside a mark where nothing else is, the nearest place first; False where there is none."""
    width = LETTER * (len(text) if letters is None else letters)
    for reach in REACH:
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.7), (0.8, -0.7), (-0.8, 0.7), (-0.8, -0.7)):
            x, y = spot.x + dx * reach, spot.y + dy * reach
            left = x if dx > 0 else x - width if dx < 0 else x - width / 2
            box = (left, y - LINE / 2, left + width, y + LINE / 2)
            if box[0] < 0 or box[2] > SIZE[0] - 80 or box[1] < -4 or box[3] > SIZE[1] + 14:
                continue
            if any(box[0] < t[2] and box[2] > t[0] and box[1] < t[3] and box[3] > t[1] for t in taken):
                continue
            taken.append(box)
            figure.add_annotation(
                x=math.log10(spot.bytes), y=spot.value, text=text, name=AT_MARK, ax=dx * reach, ay=-dy * reach,
                showarrow=True, arrowhead=0, arrowwidth=0.6, arrowcolor="#999999" if reach > REACH[1] else INVISIBLE,
                xanchor="left" if dx > 0 else "right" if dx < 0 else "center", yanchor="middle", borderpad=0,
                font={"size": 11, "color": colour},
            )  # fmt: skip
            return True
    return False
