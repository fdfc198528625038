"""What draws figures: components of kind "figure", ours and those of plugins alike. Here are those of each task.

```python
@register("figure", "widths_of_intervals")
def widths(data):
    '''How wide the intervals are.

    The text under the figure.
    '''
    rows = data.rows[data.rows["metric"] == data.metric]
    return plotly.graph_objects.Figure().add_box(x=rows["model"], y=rows["ci_high"] - rows["ci_low"])
```

A figure of another page names it (`page="cost"`) and takes that page's data: `OverviewData`, `CostData` or
`CompressData` in the place of `TaskData`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from contextlab import registry
from contextlab.evaluation import Measured
from contextlab.kinds import Page
from contextlab.registry import Entry, register
from contextlab.report import figures
from contextlab.report.alike import similarity_words
from contextlab.report.digest import Digest
from contextlab.report.naming import ASIDE, facet_title, main_metric, metric_title, record_label, record_tasks
from contextlab.report.sketch import Sketch

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_BY_NAME = 2
"""Lengths of prompts that the figure of the splits shows well enough; more get a figure of their own."""


@dataclass(frozen=True)
class TaskData:
    """All that a report knows of one task: what a figure is drawn from.

    task: its name. measured: the tables of all tasks (see `evaluation.Measured`). records: one mapping a training, of
    all tasks. digest: of these tables, where it is made already.
    """

    page: ClassVar[Page] = "task"

    task: str
    measured: Measured
    records: Sequence[Mapping[str, Any]]
    digest: Digest | None = None

    @property
    def results(self) -> pd.DataFrame:
        """The tidy table of all tasks, by which names keep their colours."""
        return self.measured.results

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The rows of `results` that are of this task."""
        return self.results[self.results["task"] == self.task]

    @cached_property
    def metric(self) -> str:
        """What the task is judged by."""
        return main_metric(self.rows)

    @cached_property
    def told(self) -> figures.Told:
        """The means over whole prompts with their intervals, as tables and sentences have them."""
        here = self.known.of(self.task)
        found = [] if here is None else here.means
        return {(mean.label, mean.split, mean.metric): mean.told for mean in found}

    @cached_property
    def known(self) -> Digest:
        """What is worked out of the tables once, for all figures."""
        return self.digest or Digest(self.results, self.measured.by_prompt)

    @cached_property
    def means(self) -> pd.DataFrame:
        """The rows of this task that are numbers, with their seeds put together (see `summarise`)."""
        return self.known.means_of(self.task)

    @cached_property
    def shots(self) -> int:
        """At how many numbers of in-context examples the metric is known, on prompts as in training."""
        train = self.rows[(self.rows["metric"] == self.metric) & (self.rows["split"] == "train")]
        return int(train["shot"].dropna().nunique())


@dataclass(frozen=True)
class OverviewData:
    """What a report knows of all its tasks together: `measured`, `records`, `digest` as `TaskData` has them."""

    page: ClassVar[Page] = "overview"

    measured: Measured
    records: Sequence[Mapping[str, Any]]
    digest: Digest | None = None

    @property
    def results(self) -> pd.DataFrame:
        """The tidy table of all tasks."""
        return self.measured.results


@dataclass(frozen=True)
class CostData:
    """What `contextlab cost` measured. results: a tidy table, split "cost", a row a metric and context length."""

    page: ClassVar[Page] = "cost"

    results: pd.DataFrame


@dataclass(frozen=True)
class CompressData:
    """What `contextlab compress` measured. results: a tidy table, "model" the policy, "split" its budget."""

    page: ClassVar[Page] = "compress"

    results: pd.DataFrame


Data = TaskData | OverviewData | CostData | CompressData


@dataclass(frozen=True)
class Drawn:
    """A figure with its title, the note under it, and whether it has a switch between linear and logarithmic axes.

    made: the figure, as Plotly or a `Sketch` has it. name: that of the registered figure that drew it; filled in by
    `drawn_figures`.
    """

    title: str
    made: go.Figure | Sketch
    note: str = ""
    switch: bool = False
    name: str = ""

    @property
    def figure(self) -> go.Figure:
        """The figure as Plotly has it."""
        return self.made.plotly() if isinstance(self.made, Sketch) else self.made


def drawn_figures(data: Data) -> Iterator[Drawn | str]:
    """What the registered figures of a page make of its data, in the order in which they were registered.

    Those that have nothing to show are left out. One that fails is a sentence that says so: after a long training no
    plugin's slip may cost the report.
    """
    for entry in registry.registered("figure"):
        if entry.page != data.page:
            continue
        try:
            for drawn in _as_drawn(entry, entry.factory(data)):
                yield replace(drawn, name=entry.name)
        except Exception as error:
            said = f"The figure {entry.name!r} could not be drawn: {type(error).__name__}: {error}"
            warnings.warn(f"{data.task}: {said}" if isinstance(data, TaskData) else said, stacklevel=2)
            yield said


def _as_drawn(entry: Entry, made: Any) -> list[Drawn]:
    """A plain Plotly figure takes its title and note from the docstring's first line and the rest."""
    if made is None:
        return []
    if callable(getattr(made, "to_plotly_json", None)):
        title, _, note = entry.doc.partition("\n")
        return [Drawn(title.strip().removesuffix(".") or entry.name.replace("_", " "), made, " ".join(note.split()))]
    found = [made] if isinstance(made, Drawn) else list(made)
    if not all(isinstance(each, Drawn) for each in found):
        raise TypeError(f"expected a Plotly figure, Drawn, a list of Drawn or None, got {type(made).__name__}")
    return found


@register("figure", "examples", family="curves")
def by_examples(data: TaskData) -> Drawn | None:
    """The main metric by the number of in-context examples."""
    if data.shots <= 1:
        return None
    return Drawn(
        f"{metric_title(data.metric).capitalize()} by the number of in-context examples",
        figures.curve.sketch(data.results, data.task, data.metric, means=data.means),
        "Bands: 95% confidence intervals. Learners far above the models are hidden; click a name to show it.",
        switch=True,
    )


@register("figure", "excess", family="curves")
def excess(data: TaskData) -> Drawn | None:
    """How far each model is above the best known learner, by the number of in-context examples."""
    if data.shots <= 1:
        return None
    models = data.means[data.means["kind"] == "model"]
    return Drawn(
        "How far above the best known learner",
        figures.curve.sketch(data.results, data.task, f"excess_{data.metric}", means=models),
        "The difference on the same prompts; 0 is as good as the best known learner.",
    )


@register("figure", "regret", family="curves")
def regret(data: TaskData) -> Drawn | None:
    """Reward lost by the steps played online, for tasks of decisions."""
    rows = data.rows
    played = rows[(rows["split"] == "online") & (rows["metric"] == "regret") & rows["value"].notna()]
    if played.empty:
        return None
    note = (
        f"Played online: each one's own actions fill its context, on the same {int(played['n'].min())} problems. "
        "Expected reward lost so far against the best actions; bands are 95% intervals over problems."
    )
    return Drawn(
        "Regret by the steps played",
        figures.curve.sketch(data.results, data.task, "regret", "online", data.means),
        note,
    )


@register("figure", "facets", family="curves")
def facets(data: TaskData) -> list[Drawn]:
    """The metric by each facet of the task's predictions, on the training distribution."""
    found = data.measured.facets
    found = found[(found["task"] == data.task) & (found["split"] == "train") & found["value"].notna()]
    title = metric_title(data.metric).capitalize()
    return [
        Drawn(
            f"{title} by {facet_title(facet)}",
            figures.by_facet.sketch(data.results, found, data.task, facet, data.metric),
        )
        for facet in dict.fromkeys(found.loc[found["metric"] == data.metric, "facet"])
    ]


@register("figure", "lengths", family="shifts")
def by_length(data: TaskData) -> Drawn | None:
    """The metric by the length of the prompt."""
    if len(figures.lengths(data.results, data.task)) <= MOST_BY_NAME:
        return None
    note = "'train', and the first split of each other length. Learners but the best known are hidden."
    drawn = figures.by_length.sketch(data.results, data.task, data.metric, data.means)
    return Drawn(f"{metric_title(data.metric).capitalize()} by the length of the prompt", drawn, note)


@register("figure", "splits", family="shifts")
def by_split(data: TaskData) -> Drawn | None:
    """The metric on each split of the task."""
    if data.rows.loc[~data.rows["split"].isin(ASIDE), "split"].nunique() <= 1:
        return None
    by = f"excess_{data.metric}" if data.shots > 1 else data.metric
    note = "Each line is a change of the prompts; 'train' is the training distribution."
    return Drawn(
        "On other prompts than those of training",
        figures.by_split.sketch(data.results, data.task, by, data.told, data.means),
        note,
    )


@register("figure", "models_by_splits", family="shifts")
def models_by_splits(data: TaskData) -> Drawn | None:
    """Models by splits, as a heat map."""
    models = data.results[data.results["kind"] == "model"]
    rows = data.rows[data.rows["kind"] == "model"]
    names, splits = (rows[side].nunique() for side in ("model", "split"))
    if names <= 1 or data.rows.loc[~data.rows["split"].isin(ASIDE), "split"].nunique() <= 1:
        return None
    means = data.means[data.means["kind"] == "model"]
    sides = ("split", "model") if splits > names else ("model", "split")  # the longer one has rows
    grid = figures.heat_map.sketch(models, data.task, *sides, data.metric, means)
    return Drawn("Models by shifts", grid, f"{metric_title(data.metric).capitalize()} in each cell.")


@register("figure", "similarity", family="mechanism")
def similarity(data: TaskData) -> Drawn | None:
    """How alike the errors of models and learners are."""
    alike = data.measured.similarity[data.measured.similarity["task"] == data.task]
    if alike.empty:
        return None
    note = (
        f"Cosine of a model's errors and a learner's within a prompt, the mean over {int(alike['n'].min())} "
        "prompts: 1 where both make the same errors, 0 where one makes none or they have nothing in common. "
    ) + " ".join(similarity_words(alike[alike["split"] == "train"], data.results["run"].nunique() > 1))
    return Drawn("Which algorithm is it?", figures.similarity_map.sketch(data.measured.similarity, data.task), note)


@register("figure", "state", family="cost")
def state(data: TaskData) -> Drawn | None:
    """Quality against the bytes that one sequence leaves in memory."""
    if not (data.rows["metric"] == "state_bytes").any():
        return None
    return Drawn(
        "Quality against bytes of state",
        figures.quality_against_state.sketch(data.results, data.task, data.metric, told=data.told, means=data.means),
        "What one sequence leaves in memory after a prompt of the training length.",
    )


@register("figure", "loss", family="training")
def loss(data: TaskData) -> Drawn | None:
    """The loss of each training by its steps."""
    several = data.results["run"].nunique() > 1
    named = [{**record, "label": record_label(record, several)} for record in data.records]
    losses = figures.training_curves.sketch(data.results, named, data.task)
    if not losses.data:
        return None
    own = [record_tasks(record) for record in data.records]
    mixed = any(len(tasks) > 1 and data.task in tasks for tasks in own)
    return Drawn(
        "Training loss",
        losses,
        "Of a training on several tasks: the loss on the task whose turn it was." if mixed else "",
    )
