"""Draw the README's image from a run of the demo: `python docs/figures.py [RUN]` (the newest in runs/ by default).

Needs the extra `image` and a Chromium or Chrome.
"""

from __future__ import annotations

import sys
from pathlib import Path

from plotly.subplots import make_subplots

from contextlab import open_run
from contextlab.report import by_split, curve


def main() -> None:
    """Write docs/demo.svg."""
    folders = sorted(Path("runs").glob("demo*"), key=lambda p: p.stat().st_mtime)
    run = open_run(sys.argv[1] if len(sys.argv) > 1 else folders[-1])
    models = run.results[run.results["kind"] == "model"]
    left = curve(models, "regression", "excess_squared_error")
    right = by_split(models, "recall", "accuracy")
    figure = make_subplots(
        1,
        2,
        subplot_titles=("regression: squared error above Bayes-optimal ridge", "recall: accuracy on other prompts"),
        horizontal_spacing=0.14,
    )
    for column, each in ((1, left), (2, right)):
        for trace in each.data:
            trace.showlegend = bool(trace.showlegend is not False and column == 1)
            figure.add_trace(trace, 1, column)
    figure.update_xaxes(title_text="in-context examples", row=1, col=1)
    figure.update_xaxes(title_text="accuracy", row=1, col=2)
    figure.update_yaxes(categoryorder="array", categoryarray=right.layout.yaxis.categoryarray, row=1, col=2)
    figure.update_layout(
        template="plotly_white",
        legend={"orientation": "h", "y": -0.22},
        font={"size": 13},
        margin={"t": 40, "l": 60, "r": 20},
    )
    figure.write_image("docs/demo.svg", width=1080, height=420)


if __name__ == "__main__":
    main()
