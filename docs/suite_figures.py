"""Renew docs/suites.md and its figures from runs of the suites: `python docs/suite_figures.py RUN [RUN ...]`.

Each run is a folder that `contextlab run SUITE --quick` left. Of each: the table of tasks by models, the figure, and
the learning rates that were chosen.

Needs the extra `image` and a Chromium or Chrome.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contextlab import open_run
from contextlab.report import summary_table
from contextlab.report.figures import styles
from contextlab.report.findings import Findings, findings
from contextlab.report.naming import interval_in_words, metric_title
from contextlab.report.suite import suite_figure, suite_table
from contextlab.report.sweep import compared_at, setting_in_words

FOLDER = Path(__file__).parent
PAGE = FOLDER / "suites.md"
RATE = "train.learning_rate"


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows as a table."""
    lines = [" | ".join(rows[0]), " | ".join("---" if i == 0 else "---:" for i in range(len(rows[0])))]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def chosen_rates(records: Sequence[Mapping[str, Any]]) -> str:
    """Which rate was chosen for each task and model, with its window, and where in training it was; "" of none."""
    swept = [record for record in records if record.get("sweep")]
    if not swept:
        return ""
    rows: dict[str, dict[str, str]] = {}
    models = list(dict.fromkeys(record["model"] for record in swept))
    for record in swept:
        window = dict.fromkeys(f"{end:g}" for end in record["sweep"]["windows"].get(RATE) or ())
        told = setting_in_words(record["setting"][RATE]) + (f" ({' to '.join(window)})" if len(window) > 1 else "")
        rows.setdefault(record["task"], {"learning rate": record["task"]} | dict.fromkeys(models, ""))
        rows[record["task"]][record["model"]] = told
    tried = sorted({each["setting"][RATE] for record in swept for each in record["sweep"]["curve"]})
    at = dict.fromkeys(compared_at(record["sweep"]) for record in swept)
    told = (
        f"Learning rates that were chosen, of {', '.join(f'{rate:g}' for rate in tried)}, by what all seeds showed at "
        f"{' or '.join(at)}; in brackets the window, where more than one rate is within 95% of the best."
    )
    return f"{textwrap.fill(told, 120)}\n\n{markdown(list(rows.values()))}"


def other_prompts(here: Findings) -> str:
    """What models and learners get on prompts unlike those of training, as a table; "" where there are none."""
    means = [mean for mean in here.of(here.metric, split=None) if mean.split not in ("train", "cost")]
    splits = list(dict.fromkeys(mean.split for mean in means))
    rows: dict[str, dict[str, str]] = {}
    for mean in means:
        name = f"{mean.label} (learner)" if mean.kind == "learner" else mean.label
        rows.setdefault(name, {metric_title(here.metric): name} | dict.fromkeys(splits, ""))
        rows[name][mean.split] = interval_in_words(mean.told, here.metric)
    return markdown(list(rows.values())) if rows else ""


def section(folder: str) -> tuple[str, str]:
    """Name of the suite and what goes between its marks."""
    run = open_run(folder)
    name = run.record["name"].removesuffix("-quick")
    table = suite_table(run.results, run.by_prompt)
    figure = suite_figure(run.results, styles(run.results), run.by_prompt)
    parts = [markdown(table)] if table else []
    if not table:  # one or two tasks: the tables that the run prints, less the time of a machine that did more
        for task, rows in summary_table(run.results, run.records, run.by_prompt).items():
            shown = [{key: cell for key, cell in row.items() if key != "training"} for row in rows]
            parts.append(f"*{task}*\n\n{markdown(shown)}")
            parts += [other_prompts(here) for here in findings(run.results, run.by_prompt) if here.task == task]
    elif figure is not None:
        figure.write_image(FOLDER / f"suites/{name}.svg", width=900, height=170 + 42 * (len(table) - 1))
        parts.append(f"![{name}: tasks by models](suites/{name}.svg)")
    parts.append(chosen_rates(run.records))
    return name, "\n\n".join(part for part in parts if part)


def main() -> None:
    """Write the sections of the given runs; the others stay."""
    if len(sys.argv) < 2:
        sys.exit("give the folders of one or more runs, for example runs/mad-quick")
    (FOLDER / "suites").mkdir(exist_ok=True)
    text = PAGE.read_text()
    for folder in sys.argv[1:]:
        name, body = section(folder)
        marks = re.compile(rf"(<!-- {name}: written by docs/suite_figures.py -->).*?(<!-- end of {name} -->)", re.S)
        if not marks.search(text):
            sys.exit(f"{PAGE} has no place for {name!r}")
        text = marks.sub(lambda found, body=body: f"{found[1]}\n\n{body}\n\n{found[2]}", text)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
