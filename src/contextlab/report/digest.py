"""What a report works out of its results once, for its tables, sentences and figures alike."""

from __future__ import annotations

from functools import cached_property

import pandas as pd

from contextlab.evaluation import summarise
from contextlab.report.examples import example_table
from contextlab.report.findings import Findings, findings


class Digest:
    """Results, and what is worked out of them when it is first asked for.

    results: a tidy table, which is not changed meanwhile. by_prompt: the values by prompt (see `evaluation.Measured`);
    None where they are not known.
    """

    def __init__(self, results: pd.DataFrame, by_prompt: pd.DataFrame | None = None) -> None:
        self.results, self.by_prompt = results, by_prompt
        self._examples: dict[str, list[dict[str, str]]] = {}

    @cached_property
    def several(self) -> bool:
        """Whether the results are of several runs, so that labels name them."""
        return bool(self.results["run"].nunique() > 1)

    @cached_property
    def means(self) -> pd.DataFrame:
        """What is a number, with the seeds put together (see `summarise`)."""
        return summarise(self.results[self.results["value"].notna()])

    @cached_property
    def findings(self) -> list[Findings]:
        """The findings of each task."""
        return findings(self.results, self.by_prompt, self.several, self.means)

    @cached_property
    def rows(self) -> dict[str, pd.DataFrame]:
        """The results of each task."""
        return {str(task): rows for task, rows in self.results.groupby("task", sort=False)}

    def of(self, task: str) -> Findings | None:
        """The findings of one task; None of one with nothing but costs."""
        return next((here for here in self.findings if here.task == task), None)

    def means_of(self, task: str) -> pd.DataFrame:
        """The means of one task."""
        return self.means[self.means["task"] == task]

    def examples(self, here: Findings) -> list[dict[str, str]]:
        """The examples that bring a task's predictors near the best known learner (see `example_table`)."""
        if here.task not in self._examples:
            self._examples[here.task] = example_table(self.rows[here.task], here.metric, self.means_of(here.task))
        return self._examples[here.task]
