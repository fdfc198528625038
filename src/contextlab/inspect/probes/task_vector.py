"""Whether one vector of the stream is the task: what contexts add at the query's place, put into other prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.evaluation.comparisons import _answers
from contextlab.inspect.capturing import capture, patch
from contextlab.inspect.edits import only
from contextlab.inspect.means import ratio_of
from contextlab.inspect.probe import (
    Drawing,
    Probe,
    Row,
    Subject,
    by,
    in_percent,
    largest,
    over_control,
    probe_table,
    shown,
)
from contextlab.models import Model
from contextlab.prompt import Prompt
from contextlab.registry import register
from contextlab.tasks.base import Drawn, lay_out

OTHER, NONE = "into another context", "into no context"
CARRIED = "share carried"


@register("probe", "task_vector", papers=("2310.15213", "2310.15916"), family="vectors",
          cases=({"contexts": 8, "queries": 2},))  # fmt: skip
@dataclass(frozen=True)
class TaskVector(Probe):
    """How much of what a context says one vector of the stream carries, layer by layer (task and function vectors).

    A context's vector is the stream at the query's place after a layer, a mean over queries that are asked after the
    context; of tasks whose functions come from a pool also over the contexts of the same function. It is added to the
    stream in other prompts, with other queries, less the like mean there: after another function's context, and where
    the query is all there is (zero-shot). `share carried` is the part of what two contexts change in the answer that
    their vectors bring along: the answers with one less those with the other, projected on the difference of the
    answers after these contexts themselves; 1 where the vector is all that the model takes from its context. The
    control are vectors of other functions.

    A mean over queries can tell what is the same for all of them: where the stream holds the answer itself (late
    layers of a regression), it tells nothing. What is read from the context by attention or from a state beside the
    query is not in the vector either; `state_vector` measures that.

    contexts: functions.
    queries: to make vectors of, and as many others to test them with.
    """

    drawing: ClassVar[Drawing] = Drawing(
        "lines", "layer", figures=("what",), note="After which layer the vector is taken and put in; dotted: others'."
    )

    contexts: PositiveInt = 96
    queries: PositiveInt = 6

    def refusal(self, subject: Subject) -> str:
        prompt, task = subject.prompts(2), subject.task
        if prompt.xs is None or prompt.ys is None or getattr(task, "layout", None) is None:
            return "the task has no (x, y) examples, so that its queries belong to their contexts"
        if subject.model.spec.reads_whole:
            return "the model reads prompts whole"
        if prompt.xs.shape[1] < 2:
            return "the prompts have one example, which is asked: there is no context"
        return "" if self.contexts >= 5 else f"contexts: expected at least 5, got {self.contexts}"

    @torch.no_grad()
    def measure(self, subject: Subject) -> pd.DataFrame:
        model, task = subject.model, subject.task
        drawn = subject.prompts(self.contexts)
        extra = subject.prompts(2 * self.queries, 1)
        assert extra.xs is not None
        asked = extra.xs[:, -1]  # one of each of as many prompts
        taught, tested = asked[: self.queries], asked[self.queries :]
        vectors, _ = _read(model, _asking(drawn, taught, task, True))
        nothing, _ = _read(model, _asking(drawn.rows(0, 1), taught, task, False))
        vectors = {site: _by_function(drawn, each.mean(1)) for site, each in vectors.items()}
        answers = _answers(task, _read(model, _asking(drawn, tested, task, True))[1], drawn)
        count = self.contexts
        shift = [torch.arange(i, count + i, device=answers.device) % count for i in range(5)]
        apart = (answers[shift[1]] - answers[shift[2]]).flatten(1)
        square = apart.square().sum(1)
        if not bool(square.any()):
            return probe_table([{"site": site, "what": OTHER, "measure": CARRIED, "value": 0.0} for site in vectors])
        rows = []
        for what, context in ((OTHER, True), (NONE, False)):
            prompts = _asking(drawn, tested, task, context)
            for site, each in vectors.items():
                own = each if context else nothing[site].mean(1)
                said = [
                    _answers(task, _read(model, prompts, {site: each[other] - own})[1], drawn).flatten(1)
                    for other in shift[1:]
                ]
                found, control = (
                    ratio_of(((said[i] - said[i + 1]) * apart).sum(1), square) for i in (0, 2)
                )  # fmt: skip
                rows.append({"site": site, "what": what, "measure": CARRIED, **found, "control": control["value"]})
        return probe_table(rows)

    def words(self, rows: list[Row]) -> list[str]:
        sentences = []
        for what, own in by(rows, "what").items():
            best = largest(own)
            told = f"{shown(in_percent(best), 0)}%" + (
                "" if best["control"] is None else f", control {round(100 * best['control'])}%"
            )
            sentences.append(
                f"A vector put {what} carries most after layer {best['layer']}: {told} of what a context changes in "
                "the answer."
                if over_control(best) and best["value"] > 0
                else f"No vector put {what} carries what a context says; the most is {told}, after layer "
                f"{best['layer']}."
            )
        return sentences


@dataclass
class _Asked:
    """Prompts that ask every query after every context: [contexts * queries] rows."""

    prompt: Prompt
    place: int
    queries: int


def _asking(drawn: Prompt, queries: Tensor, task: Any, context: bool) -> _Asked:
    """Each query [Q, d] as the last example after each context, or alone, its output hidden."""
    xs, ys = drawn.xs, drawn.ys
    assert xs is not None
    assert ys is not None
    count = len(queries)
    x, y = (each.repeat_interleave(count, 0) for each in (xs, ys))
    x, y = (each.clone() if context else each[:, -1:].clone() for each in (x, y))
    x[:, -1] = queries.to(x).repeat(len(xs), 1)
    y[:, -1] = 0
    laid = lay_out(Drawn(x, y), task.layout)
    places = laid.at
    assert places is not None
    return _Asked(laid, int(places[-1]), count)


def _read(model: Model, asked: _Asked, added: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """The stream after each layer at the query's place, by site, [C, Q, D], and the answers there, [C, Q, k].

    added: site -> what is added to the stream there, [C, D] or [1, D].
    """
    inputs = asked.prompt.inputs[:, : asked.place + 1].to(next(model.parameters()).dtype)
    edits = {}
    for site, value in (added or {}).items():
        rows = value.expand(len(inputs) // asked.queries, -1).repeat_interleave(asked.queries, 0)[:, None]
        edits[site] = only(_adding(rows), places=[asked.place])
    with patch(model, edits), capture(model, "blocks.*.output") as taken:
        said = model(inputs)[:, asked.place]
    streams = {site: value[:, asked.place].unflatten(0, (-1, asked.queries)) for site, value in taken.items()}
    return streams, said.unflatten(0, (-1, asked.queries))


def _adding(rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda stream: stream + rows


def _by_function(drawn: Prompt, vectors: Tensor) -> Tensor:
    """Vectors [C, D], means over the contexts of the same function, where several are of one."""
    for hidden in (drawn.hidden or {}).values():
        known, number = hidden.flatten(1).unique(dim=0, return_inverse=True)
        if 2 * len(known) <= len(vectors):
            sums = vectors.new_zeros(len(known), vectors.shape[1]).index_add_(0, number, vectors)
            return (sums / number.bincount(minlength=len(known))[:, None])[number]
    return vectors
