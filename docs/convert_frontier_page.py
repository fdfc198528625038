"""Renew docs/convert-frontier.md from a run: `python docs/convert_frontier_page.py runs/convert-frontier-quick`.

The run is the folder that `contextlab run convert-frontier --quick` left. Of it: the questions that were put before it
with their answers, a table and a figure a task, and what became of the weights.

Needs the extra `image` and a Chromium or Chrome.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from suite_figures import markdown

from contextlab import open_run
from contextlab.evaluation.intervals import Interval
from contextlab.experiments.opened import Run
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.report.figures import quality_against_state
from contextlab.report.findings import Findings, findings
from contextlab.report.naming import difference_in_words, interval_in_words, metric_title
from contextlab.report.starts import starts_table
from contextlab.words import bytes_in_words

FOLDER = Path(__file__).parent
PAGE = FOLDER / "convert-frontier.md"
MARKS = (
    "<!-- written by docs/convert_frontier_page.py -->",
    "<!-- end of what docs/convert_frontier_page.py wrote -->",
)
STAGES = ("teachers", "attention", "predictions")
TEACHER = "teacher"
TEXT = "text"


@dataclass(frozen=True)
class Judged:
    """What a task is judged by here: its own metric; of text bits a byte, its cross-entropy in another unit.

    metric: in the results. scale: of a value of it. title: what the scaled one is called.
    """

    found: Findings
    metric: str
    scale: float
    title: str

    @classmethod
    def of(cls, found: Findings) -> Judged:
        """The same, by the task."""
        if found.task == TEXT:
            return cls(found, "cross_entropy", 1 / math.log(2), "bits")
        return cls(found, found.metric, 1.0, found.metric)

    @property
    def rising(self) -> bool:
        """Whether more is better."""
        return self.metric in HIGHER_IS_BETTER

    def scaled(self, told: Interval) -> Interval:
        """An interval in the unit that is shown."""
        return Interval(*(self.scale * each for each in told))

    def difference(self, one: str, two: str) -> Interval:
        """One's less the other's, paired by prompts."""
        return self.scaled(self.found.difference(one, two, self.metric))

    def means(self) -> dict[str, Interval]:
        """Models and their means, the best first."""
        return {mean.label: self.scaled(mean.told) for mean in self.found.ranked(self.metric)}


@dataclass(frozen=True)
class Predicate:
    """A statement about two models on a task, put before the run.

    words: the statement. task. one, two: models. less: whether it holds where `one`'s metric less `two`'s is below
    `bound`, or above it; in the metric's own unit, shares from 0 to 1.
    """

    words: str
    task: str
    one: str
    two: str
    bound: float
    less: bool

    def answer(self, found: Judged) -> str:
        """Holds, does not hold, or not decided: by the interval of the difference, paired by prompts."""
        difference = found.difference(self.one, self.two)
        below, above = difference.high < self.bound, difference.low > self.bound
        if not (below or above):
            said = "not decided"
        else:
            said = "holds" if below == self.less else "does not hold"
        return f"{said} ({difference_in_words(difference, found.title)})"


PREDICATES = (
    Predicate("One key head answers as the teacher does: at most 5 points of recall are lost.",
              "recall", TEACHER, "one_key_head", 0.05, True),
    Predicate("Gated delta in every second layer keeps the recall: at most 5 points are lost.",
              "recall", TEACHER, "half_gated_delta_net", 0.05, True),
    Predicate("In both layers it loses more than in every second one.",
              "recall", "half_gated_delta_net", "gated_delta_net", 0.0, False),
    Predicate("Gated delta recalls more than linear attention with Hedgehog's features.",
              "recall", "gated_delta_net", "hedgehog", 0.0, False),
    Predicate("A window of 8 tokens loses more recall than any state of fixed size: more than Hedgehog does.",
              "recall", "hedgehog", "window", 0.0, False),
    Predicate("On regression every second layer as gated delta costs at most 0.1 of squared error.",
              "regression", "half_gated_delta_net", TEACHER, 0.1, True),
    Predicate("On text the window costs at most 0.1 bits a byte.",
              "text", "window", TEACHER, 0.1, True),
    Predicate("On text Mamba-2 costs at most 0.1 bits a byte.",
              "text", "mamba2", TEACHER, 0.1, True),
)  # fmt: skip


def answers(by_task: Mapping[str, Judged]) -> str:
    """The predicates with their answers, a row each."""
    rows = []
    for each in PREDICATES:
        rows.append({"task": each.task, "before the run": each.words, "after it": each.answer(by_task[each.task])})
    return markdown(rows).replace("---:", "---")


def states(task: str, results: pd.DataFrame) -> dict[str, float]:
    """Models and the bytes that a prompt of the task leaves in each."""
    rows = results[(results["task"] == task) & (results["metric"] == "state_bytes") & (results["kind"] == "model")]
    return {str(name): float(size) for name, size in rows.groupby("model")["value"].median().items()}


def table(here: Judged, results: pd.DataFrame, alone: Judged | None) -> str:
    """The models of a task, the largest state first: bytes, quality, and the difference from the teacher.

    alone: what they were after attention transfer.
    """
    state, means = states(here.found.task, results), here.means()
    before = {} if alone is None else alone.means()
    shown = []
    for name in sorted(means, key=lambda each: -state[each]):
        difference = "" if name == TEACHER else _apart(here.difference(name, TEACHER), here.title)
        shown.append(
            {
                "model": f"`{name}`",
                "state": f"{bytes_in_words(int(state[name]))} ({state[name] / state[TEACHER]:.0%})",
                metric_title(here.title): interval_in_words(means[name], here.title),
                "less the teacher's": difference,
                "after attention alone": interval_in_words(before[name], here.title) if name in before else "",
            }
        )
    return markdown(shown)


def _apart(told: Interval, metric: str) -> str:
    words = difference_in_words(told, metric).removeprefix("difference ")
    return words if told.parts else f"{words}, not told apart"


def frontier(here: Judged, results: pd.DataFrame) -> str:
    """One sentence: the models than which none with as few bytes is told to be better."""
    state, means = states(here.found.task, results), here.means()
    sign = 1.0 if here.rising else -1.0

    def better(one: str, two: str) -> bool:
        told = here.difference(one, two)
        return one != two and told.parts and sign * told.value > 0

    kept = [one for one in means if not any(state[two] <= state[one] and better(two, one) for two in means)]
    kept.sort(key=lambda name: -state[name])
    names = ", ".join(f"`{name}` ({bytes_in_words(int(state[name]))})" for name in kept)
    return f"No model with as few bytes is told to be better than: {names}."


def trained(runs: Mapping[str, Run]) -> str:
    """How many trainings there were, of how many steps."""
    records = [record for each in runs.values() for record in each.records]
    steps = sum(int(record["steps"]) for record in records)
    return f"{len(records)} trainings of {steps:,} steps"


def section(folder: str) -> str:
    """All that stands between the marks."""
    runs = {name: open_run(Path(folder) / name) for name in STAGES}
    last, alone = runs["predictions"], runs["attention"]
    by_task = {each.task: Judged.of(each) for each in findings(last.results, last.by_prompt)}
    after_attention = {each.task: Judged.of(each) for each in findings(alone.results, alone.by_prompt)}
    seeds = last.results.loc[last.results["kind"] == "model", "seed"].nunique()
    parts = [
        f"*{trained(runs)}, {seeds} seeds; 95% intervals over prompts and seeds, those of differences paired by "
        "prompts.*",
        "### Put before the run",
        answers(by_task),
    ]
    for task, here in by_task.items():
        known = {(name, "train", here.title): told for name, told in here.means().items()}
        figure = quality_against_state(last.results, task, here.title, told=known)
        figure.write_image(FOLDER / f"convert-frontier/{task}.svg", width=900, height=480)
        parts += [
            f"### {task}",
            table(here, last.results, after_attention.get(task)),
            frontier(here, last.results),
            f"![{task}: quality against bytes of state](convert-frontier/{task}.svg)",
        ]
    rows = [{key: cell for key, cell in row.items() if key != "task"} for row in starts_table(last.records)
            if row["task"] == next(iter(by_task))]  # fmt: skip
    parts += [f"### What became of the weights ({next(iter(by_task))}, first seed)",
              markdown(rows).replace("---:", "---")]  # fmt: skip
    return "\n\n".join(parts)


def main() -> None:
    """Write the page's section and its figures."""
    if len(sys.argv) != 2:
        sys.exit("give the folder of one run, for example runs/convert-frontier-quick")
    text = PAGE.read_text()
    marks = re.compile(f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", re.S)
    if not marks.search(text):
        sys.exit(f"{PAGE} has no place for the run")
    inside = section(sys.argv[1])
    PAGE.write_text(marks.sub(lambda _: f"{MARKS[0]}\n\n{inside}\n\n{MARKS[1]}", text))


if __name__ == "__main__":
    main()
