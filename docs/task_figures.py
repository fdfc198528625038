"""Renew the tasks' pages: their tables, samples and figures: `python docs/task_figures.py [PAGE ...]`.

Of each task, with the options of its preset "easy": a prompt (seed 0) as `contextlab show task NAME --sample --preset
easy` prints it, and what its learners get on 512 prompts of the train split (seed 20000): the main metric by the number
of in-context examples where predictions differ in that, else one bar a learner, with 95% intervals over the prompts.
Nothing is trained.

Needs the extra `image` and a Chromium or Chrome.
"""

from __future__ import annotations

import math
import re
import sys
import textwrap
from pathlib import Path

import pandas as pd
import torch
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from contextlab import registry
from contextlab.evaluation import evaluate_learners
from contextlab.report.naming import metric_title
from contextlab.tasks import build_task

FOLDER = Path(__file__).parent / "tasks"
OURS = [entry for entry in registry.entries("task") if entry.factory.__module__.startswith("contextlab.")]
PAGES = {entry.family.replace(" ", "-"): entry.family for entry in OURS}
"""Each page and the family of tasks that it shows."""
MARKS = ("<!-- tasks: written by docs/task_figures.py -->", "<!-- end of tasks -->")
LINES, WIDTH = 12, 100  # of a sample that is shown


def members(page: str) -> list[registry.Entry]:
    """The registered tasks of a page."""
    return [entry for entry in OURS if entry.family == PAGES[page]]


def sample(name: str) -> str:
    """A prompt of the task's preset "easy", cut to a few lines."""
    task = build_task(name, preset="easy")
    words = task.words(task.sample(1, torch.Generator().manual_seed(0)))
    lines = [part for line in words.splitlines() for part in textwrap.wrap(line, WIDTH, drop_whitespace=False) or [""]]
    return "\n".join(line.rstrip() for line in lines[:LINES]) + ("\n..." if len(lines) > LINES else "")


def section(page: str) -> str:
    """What the page tells of its tasks."""
    lines = ["| task | what it is | by chance | best known learner | papers |", "| --- | --- | --- | --- | --- |"]
    for entry in members(page):
        task = build_task(entry.name)
        chance = task.chance().get(task.metric)
        papers = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in entry.papers)
        told = "" if chance is None else f"{metric_title(task.metric)} {chance:.3g}"
        best = next(iter(task.learners()))
        lines.append(f"| `{entry.name}` | {entry.summary} | {told} | `{best}` | {papers} |")
    for entry in members(page):
        lines += ["", f"`{entry.name}`, easy:", "", "```text", sample(entry.name), "```"]
    return "\n".join(lines)


def renewed(text: str, page: str) -> str:
    """A page's text with its tables and samples made anew."""
    start, end = map(re.escape, MARKS)
    made = section(page).replace("\\", r"\\")
    return re.sub(f"({start}\n).*?({end})", lambda found: f"{found[1]}\n{made}\n\n{found[2]}", text, flags=re.DOTALL)


def whiskers(rows: pd.DataFrame, **looks: float) -> dict[str, object]:
    """The 95% intervals of measured rows, as Plotly draws them."""
    above, below = rows["ci_high"] - rows["value"], rows["value"] - rows["ci_low"]
    return {"type": "data", "array": above.tolist(), "arrayminus": below.tolist(), **looks}


def draw(page: str) -> None:
    """Write the page's figure: what the learners get, a panel a task."""
    entries = members(page)
    columns = min(2, len(entries))
    rows = math.ceil(len(entries) / columns)
    titles = []
    figure = make_subplots(
        rows, columns, subplot_titles=[entry.name for entry in entries], vertical_spacing=0.35 / rows
    )
    for index, entry in enumerate(entries):
        task = build_task(entry.name, preset="easy")
        found = evaluate_learners(task, prompts=512, splits=("train",), task_name=entry.name)
        found = found[found["metric"] == task.metric]
        where = {"row": index // columns + 1, "col": index % columns + 1}
        curves = found[found["shot"].notna()]
        titles.append(metric_title(task.metric))
        names = list(dict.fromkeys(found["model"]))
        if curves["shot"].nunique() > 1:
            for i, name in enumerate(names):
                own = curves[curves["model"] == name].sort_values("shot")
                figure.add_scatter(
                    x=own["shot"].tolist(),
                    y=own["value"].tolist(),
                    name=name,
                    mode="lines",
                    line={"color": qualitative.D3[i % 10], "dash": ("solid", "dash", "dot")[i // 10 % 3]},
                    error_y=whiskers(own, thickness=0.6, width=0),
                    legend=f"legend{index + 1}" if index else "legend",
                    **where,
                )
            figure.update_xaxes(title="in-context examples", **where)
            top = max(task.chance().get(task.metric, 0.0), float(curves.groupby("model")["value"].median().max()))
            figure.update_yaxes(range=[0, 1.2 * top if not task.higher_is_better else 1.03], **where)
        else:
            means = found[found["shot"].isna()]
            figure.add_bar(
                x=means["value"].tolist(), y=names, orientation="h", marker_color=qualitative.D3[0], showlegend=False,
                error_x=whiskers(means, thickness=1, width=3), **where,
            )  # fmt: skip
            figure.update_yaxes(autorange="reversed", **where)
            figure.update_xaxes(title=metric_title(task.metric), rangemode="tozero", **where)
        chance = task.chance().get(task.metric)
        if chance is not None and curves["shot"].nunique() > 1:
            figure.add_hline(y=chance, line_dash="dot", line_color="#999999", row=where["row"], col=where["col"])
        if curves["shot"].nunique() > 1:
            figure.update_yaxes(title=titles[-1], **where)
            axis = figure.layout["xaxis" if index == 0 else f"xaxis{index + 1}"]
            height = figure.layout["yaxis" if index == 0 else f"yaxis{index + 1}"]
            figure.update_layout(
                {
                    f"legend{index + 1}" if index else "legend": {
                        "x": axis.domain[1],
                        "y": height.domain[1],
                        "xanchor": "right",
                        "yanchor": "top",
                        "bgcolor": "rgba(255,255,255,0.7)",
                        "font": {"size": 10},
                    }
                }
            )
    figure.update_layout(template="plotly_white", font={"size": 12}, margin={"t": 40, "l": 70, "r": 20, "b": 50})
    figure.write_image(FOLDER / f"{page}.svg", width=980, height=60 + 330 * rows)


def main() -> None:
    """Draw, and renew the pages."""
    wanted = sys.argv[1:] or list(PAGES)
    unknown = [page for page in wanted if page not in PAGES]
    if unknown:
        raise SystemExit(f"unknown page {unknown[0]!r}; known: {', '.join(PAGES)}")
    for page in wanted:
        path = FOLDER / f"{page}.md"
        path.write_text(renewed(path.read_text(), page))
        draw(page)
        print(page, flush=True)


if __name__ == "__main__":
    main()
