"""Figures as plain data: what a page draws of them, without Plotly's check of every property.

Plotly checks what a figure is given, its template of 7 KB included: 30 ms a figure, and 0.3 s for the first. What our
own figures are given is known, so they are written as what a browser reads, by methods named and used as Plotly's.
`Sketch.plotly` is the same figure with all of it checked; a test makes it of each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from pkgutil import get_data
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, cast

if TYPE_CHECKING:
    import plotly.graph_objects as go

P = ParamSpec("P")


class Sketch:
    """A figure as JSON has it: `data`, its traces, and `layout`.

    Its methods are those of Plotly's `Figure` of the same names. They take arrays and columns of tables, too, and leave
    out what is None. Only whole names are taken: line={"dash": "dot"}, not line_dash="dot".
    """

    def __init__(self) -> None:
        self.data: list[dict[str, Any]] = []
        self.layout: dict[str, Any] = {}

    def add_scatter(self, **trace: Any) -> Sketch:
        return self._add("scatter", trace)

    def add_heatmap(self, **trace: Any) -> Sketch:
        return self._add("heatmap", trace)

    def update_traces(self, **changes: Any) -> Sketch:
        for trace in self.data:
            _merge(trace, changes)
        return self

    def update_layout(self, changes: Mapping[str, Any] | None = None, **more: Any) -> Sketch:
        _merge(self.layout, {**(changes or {}), **more})
        return self

    def update_xaxes(self, **changes: Any) -> Sketch:
        return self.update_layout(xaxis=changes)

    def update_yaxes(self, **changes: Any) -> Sketch:
        return self.update_layout(yaxis=changes)

    def add_annotation(self, **annotation: Any) -> Sketch:
        self.layout.setdefault("annotations", []).append(_plain(annotation))
        return self

    def add_hline(self, y: float, line: Mapping[str, Any], annotation_text: str) -> Sketch:
        """A line across the figure, and what it is at its right end."""
        self._add_line({"x0": 0, "x1": 1, "xref": "x domain", "y0": y, "y1": y, "yref": "y", "line": line})
        return self.add_annotation(
            x=1, xref="x domain", xanchor="right", y=y, yref="y", yanchor="bottom", text=annotation_text,
            showarrow=False,
        )  # fmt: skip

    def add_vline(self, x: float, line: Mapping[str, Any]) -> Sketch:
        return self._add_line({"x0": x, "x1": x, "xref": "x", "y0": 0, "y1": 1, "yref": "y domain", "line": line})

    def plotly(self) -> go.Figure:
        """The same as a Plotly figure. Raises ValueError for what Plotly does not know."""
        from plotly.graph_objects import Figure

        return Figure(data=self.data, layout=self.layout)

    def _add(self, kind: str, trace: Mapping[str, Any]) -> Sketch:
        self.data.append(_plain({"type": kind, **trace}))
        return self

    def _add_line(self, shape: Mapping[str, Any]) -> Sketch:
        self.layout.setdefault("shapes", []).append(_plain({"type": "line", **shape}))
        return self


class Drawing(Protocol[P]):
    """A function that draws a Plotly figure; its `sketch` draws the same as plain data."""

    sketch: Callable[P, Sketch]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> go.Figure: ...


def drawing(sketch: Callable[P, Sketch]) -> Drawing[P]:
    """A function that draws a sketch as one that draws a Plotly figure: notebooks take these, and pages `.sketch`."""

    @wraps(sketch)
    def figure(*args: P.args, **kwargs: P.kwargs) -> go.Figure:
        return sketch(*args, **kwargs).plotly()

    found = cast(Drawing[P], figure)
    found.sketch = sketch
    return found


@lru_cache
def template(name: str) -> dict[str, Any]:
    """One of Plotly's templates, such as "plotly_white", as Plotly's package has it."""
    found = get_data("plotly", f"package_data/templates/{name}.json")
    if found is None:
        raise FileNotFoundError(f"plotly has no template {name!r}")
    return cast(dict[str, Any], json.loads(found))


def rounded(value: Any, digits: int) -> Any:
    """JSON with so many significant digits of each number; null in the place of what is no number."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(each, digits) for key, each in value.items()}
    return [rounded(each, digits) for each in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """What JSON can hold, of its own: a copy without what is None in a mapping."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items() if each is not None}
    if hasattr(value, "tolist"):  # arrays, columns of tables and their single values
        value = value.tolist()
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _merge(into: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Take changes over, within what is nested, too."""
    for key, value in changes.items():
        if isinstance(value, Mapping):
            _merge(into.setdefault(key, {}), value)
        elif value is not None:
            into[key] = _plain(value)
