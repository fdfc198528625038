"""The figure of what is kept against all bytes, those of the weights and of the states together."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from contextlab.report.compress_total import ITSELF, Point, front
from contextlab.report.drawing import COLOURS, MARKERS, byte_axis, finish
from contextlab.words import bytes_in_words

MOST_NAMED = 14
"""Lines with a name and a colour; where there are more, those without a point on the front are grey."""


def kept_against_total(found: Sequence[Point], axis: str, memory: float | None = None) -> go.Figure:
    """What ways to spend memory keep against their bytes: a line a form of the weights and policy through its budgets.

    Forms of the weights have colours, policies marks. The dotted line joins the front of the means. axis: the bytes
    are of what. memory: what there is, an upright line.
    """
    figure = go.Figure()
    best = front(found)
    figure.add_scatter(
        x=[way.bytes for way in best], y=[way.part.value for way in best], name="front of the means", mode="lines",
        line={"color": "#999999", "dash": "dot", "width": 1.5}, hoverinfo="skip",
    )  # fmt: skip
    lines: dict[tuple[str, str], list[Point]] = {}
    for way in found:
        lines.setdefault((way.weights, way.policy), []).append(way)
    forms = list(dict.fromkeys(weights for weights, _ in lines))
    policies = list(dict.fromkeys(policy for _, policy in lines))
    for (weights, policy), own in lines.items():
        own = sorted(own, key=lambda way: way.bytes)
        grey = len(lines) > MOST_NAMED and not any(way in best for way in own)
        colour = "#d0d0d0" if grey else COLOURS[(forms.index(weights) - 1) % len(COLOURS)] if weights else "#000000"
        name = f"{policy} on {weights}" if policy and weights else policy or weights or ITSELF
        figure.add_scatter(
            x=[way.bytes for way in own],
            y=[way.part.value for way in own],
            name=name,
            mode="lines+markers" if len(own) > 1 else "markers",
            showlegend=not grey,
            line={"color": colour, "width": 1 if grey else 2},
            marker={
                "symbol": MARKERS[(policies.index(policy) - 1) % len(MARKERS)] if policy else "star",
                "size": 5 if grey else 9 if policy else 13,
                "color": colour,
            },
            error_y={
                "type": "data",
                "array": [way.part.high - way.part.value for way in own],
                "arrayminus": [way.part.value - way.part.low for way in own],
                "thickness": 0 if grey else 1,
                "width": 3,
            },
            text=[f"{way.name}: {way.part.value:.1%}, {bytes_in_words(way.bytes)}" for way in own],
            hovertemplate="%{text}<extra></extra>",
        )
    sizes = [way.bytes for way in found] + ([memory] if memory else [])
    finish(figure, axis, "part of the model's quality that is kept")
    byte_axis(figure, sizes)
    if memory:
        figure.add_vline(x=memory, line={"color": "#D55E00", "dash": "dash", "width": 1.5})
    figure.update_yaxes(tickformat=".0%")
    figure.update_layout(height=460 + 12 * max(0, min(len(lines), MOST_NAMED) - 6))
    return figure
