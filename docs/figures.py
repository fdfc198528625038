"""Draw images from runs: `python docs/figures.py [RUN]`, the newest demo in runs/ by default.

A run of the demo gives docs/demo.svg, one of mixers-on-recall docs/recall.svg and what docs/recall.md says of it.

Needs the extra `image` and a Chromium or Chrome.
"""

from __future__ import annotations

import sys
from pathlib import Path

import recall_page
from plotly.subplots import make_subplots

from contextlab import open_run
from contextlab.evaluation import Measured
from contextlab.report import by_split, curve
from contextlab.report.sections import TaskData


def main() -> None:
    """Draw the run's image."""
    folders = sorted(Path("runs").glob("demo*"), key=lambda p: p.stat().st_mtime)
    run = open_run(sys.argv[1] if len(sys.argv) > 1 else folders[-1])
    models = run.results[run.results["kind"] == "model"]
    if "regression" not in set(models["task"]):
        try:
            recall_page.write(run)
        except ValueError as error:
            sys.exit(f"docs/recall.md: {error}")
        return
    left = curve(models, "regression", "excess_squared_error")
    recall = TaskData("recall", Measured(run.results, by_prompt=run.by_prompt), run.records)
    right = by_split(models, "recall", "accuracy", recall.told)
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
    figure.update_xaxes(title_text="accuracy", tickformat=".1%", row=1, col=2)
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
