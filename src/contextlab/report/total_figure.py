"""The figure of what is kept against all bytes, those of the weights and of the states together."""

from __future__ import annotations

from collections.abc import Sequence

from contextlab.report.compress_total import ITSELF, Point, front
from contextlab.report.drawing import COLOURS, MARKERS, byte_axis, finish
from contextlab.report.sketch import Sketch, drawing
from contextlab.words import bytes_in_words

MOST_COLOURED = 24
"""Lines with a colour; where there are more, those without a point on the front of the means are grey."""


@drawing
def kept_against_total(found: Sequence[Point], memory: float | None = None) -> Sketch:
    """What ways to spend memory keep against their bytes: a line a form of the weights and policy through its budgets.

    Forms of the weights, and other models, have colours, policies marks; the legend tells both apart. The dotted line
    joins the front of the means. memory: what there is, an upright line.
    """
    figure = Sketch()
    best = front(found)
    figure.add_scatter(
        x=[point.bytes for point in best], y=[point.part.value for point in best], name="front of the means",
        mode="lines", line={"color": "#999999", "dash": "dot", "width": 1.5}, hoverinfo="skip",
    )  # fmt: skip
    lines: dict[tuple[str, str], list[Point]] = {}
    for point in found:
        lines.setdefault((point.weights, point.policy), []).append(point)
    forms = list(dict.fromkeys(weights for weights, _ in lines if weights))
    policies = list(dict.fromkeys(policy for _, policy in lines if policy))
    colours = {"": "#000000", **{form: COLOURS[i % len(COLOURS)] for i, form in enumerate(forms)}}
    marks = {"": "star", **{policy: MARKERS[i % len(MARKERS)] for i, policy in enumerate(policies)}}
    for (weights, policy), own in lines.items():
        grey = len(lines) > MOST_COLOURED and not any(point in best for point in own)
        colour = "#d0d0d0" if grey else colours[weights]
        _draw(figure, sorted(own, key=lambda point: point.bytes), colour, marks[policy], grey)
    for weights in ("", *forms):
        figure.add_scatter(
            x=[None], y=[None], name=weights or ITSELF, mode="markers",
            marker={"symbol": "square", "size": 11, "color": colours[weights]},
        )  # fmt: skip
    for policy in policies:
        figure.add_scatter(
            x=[None], y=[None], name=policy, mode="markers",
            marker={"symbol": marks[policy], "size": 9, "color": "#777777"},
        )  # fmt: skip
    finish(figure, "bytes in all", "quality kept")
    byte_axis(figure, [point.bytes for point in found] + ([memory] if memory else []))
    if memory:
        figure.add_vline(x=memory, line={"color": "#D55E00", "dash": "dash", "width": 1.5})
    figure.update_yaxes(tickformat="~%")
    figure.update_layout(height=500, meta={"wide": True})
    return figure


def _draw(figure: Sketch, own: Sequence[Point], colour: str, mark: str, grey: bool) -> None:
    """One line: the budgets of a policy on a form of the weights, or a single mark."""
    figure.add_scatter(
        x=[point.bytes for point in own],
        y=[point.part.value for point in own],
        mode="lines+markers" if len(own) > 1 else "markers",
        showlegend=False,
        line={"color": colour, "width": 1 if grey else 2},
        marker={"symbol": mark, "size": 5 if grey else 13 if mark == "star" else 9, "color": colour},
        error_y={
            "type": "data",
            "array": [point.part.high - point.part.value for point in own],
            "arrayminus": [point.part.value - point.part.low for point in own],
            "thickness": 0 if grey else 1,
            "width": 3,
        },
        text=[f"{point.name}: {point.part.value:.1%}, {bytes_in_words(point.bytes)}" for point in own],
        hovertemplate="%{text}<extra></extra>",
    )
