"""Axes of figures."""

from __future__ import annotations

import plotly.graph_objects as go
import pytest

from contextlab.report.drawing import byte_axis

MIB = 1 << 20


@pytest.mark.parametrize(
    ("sizes", "told"),
    [((34 * MIB, 60 * MIB), ["48 MiB"]), ((MIB, 8 * MIB), ["1 MiB", "2 MiB", "4 MiB", "8 MiB"])],
)
def test_a_byte_axis_tells_a_size_within_its_range(sizes, told):
    figure = go.Figure()
    byte_axis(figure, sizes)
    axis = figure.layout.xaxis
    within = [text for tick, text in zip(axis.tickvals, axis.ticktext, strict=True) if sizes[0] <= tick <= sizes[1]]
    assert within == told
