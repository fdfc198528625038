"""After which layer the answer is there: the logit lens and the tuned lens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.inspect.means import mean_of, metric_by_prompt, ratio_of
from contextlab.inspect.probe import Drawing, Probe, Row, Subject, by, in_percent, probe_table, shown
from contextlab.inspect.streams import TunedLens, answers_from, batches, read_streams
from contextlab.models import Model
from contextlab.prompt import Prompt, Task
from contextlab.registry import register

LOGIT, TUNED = "logit lens", "tuned lens"
SHARE = "share of the answer"
THERE = 0.9
"""The share of the model's own answer from which on it is there."""


@register("probe", "lens", papers=("2303.08112",), family="reading", cases=({"prompts": 32, "fit": 32},))
@dataclass(frozen=True)
class Lens(Probe):
    """After which layer the answer is there: what the model would answer if it ended there.

    The logit lens puts the model's own final norm and read-out to the stream after each layer. The tuned lens first
    takes that stream through an affine map onto the last layer's, fitted here by least squares on prompts of its own
    (2303.08112, which descends on the divergence of the answers): where it finds more, the answer is there, but not
    yet written the way the read-out reads it. Both are measured on fresh prompts by the task's metric, and as a share
    of the way from chance to the model's own answer. Chance is `Task.chance`, else what a constant answer gets. The
    control is the same in a model with fresh weights, whose tuned lens is fitted to it.

    prompts: to measure on.
    fit: to fit the tuned lens to.
    """

    drawing: ClassVar[Drawing] = Drawing(
        "lines", "site", note="What the model would answer if it ended after this layer; dotted: fresh weights."
    )

    prompts: PositiveInt = 512
    fit: PositiveInt = 1024

    def measure(self, subject: Subject) -> pd.DataFrame:
        taught, asked = subject.prompts(self.fit, 1), subject.prompts(self.prompts)
        task, metric = subject.task, subject.task.metric
        found, own, chance = _lenses(subject.model, task, taught, asked)
        fresh, _, _ = _lenses(subject.untrained(), task, taught, asked)
        better = (own - chance) * (1 if task.higher_is_better else -1)
        learned = mean_of(better)["ci_low"]
        rows = []
        for (what, site), values in found.items():
            control = fresh[what, site]
            at = {"site": site, "what": what}
            rows.append({**at, "measure": metric, **mean_of(values, metric), "control": mean_of(control)["value"]})
            if learned is not None and learned > 0:
                share = ratio_of(values - chance, own - chance)
                none = ratio_of(control - chance, own - chance)["value"]
                rows.append({**at, "measure": SHARE, **share, "control": none})
        return probe_table(rows)

    def words(self, rows: list[Row]) -> list[str]:
        shares = [row for row in rows if row["measure"] == SHARE]
        if not shares:
            return ["The model answers no better than chance, so that no layer holds the answer."]
        sentences, first = [], {}
        for what, own in by(shares, "what").items():
            layers = [row for row in own if row["layer"] is not None]
            last = max(row["layer"] for row in layers)
            first[what] = next((row for row in layers if row["value"] >= THERE), layers[-1])
            at = first[what]
            before = [row for row in layers if row["layer"] < at["layer"]]
            told = f"{100 * at['value']:.0f}% of the way from chance to the model's own answer, fresh weights " + (
                f"{100 * at['control']:.0f}%"
            )
            told += f"; a layer before it {shown(in_percent(before[-1]), 0)}%" if before else ""
            sentences.append(f"The answer is there after layer {at['layer']} of 0 to {last} ({what}: {told}).")
        if TUNED in first and LOGIT in first and first[TUNED]["layer"] < first[LOGIT]["layer"]:
            layer = first[TUNED]["layer"]
            logit = next(row for row in shares if row["what"] == LOGIT and row["layer"] == layer)
            sentences.append(
                f"There it is not yet written as the read-out reads it: the logit lens finds "
                f"{shown(in_percent(logit), 0)}% after layer {layer}."
            )
        return sentences


def _lenses(
    model: Model, task: Task, taught: Prompt, asked: Prompt
) -> tuple[dict[tuple[str, str], Tensor], Tensor, Tensor]:
    """(lens, site) -> the metric of each prompt; of the model's own answers; and that of chance, [prompts] each."""
    with torch.no_grad():
        tuned = TunedLens(model, taught)
        found: dict[tuple[str, str], list[Tensor]] = {}
        own, constant = [], []
        for prompt in batches(asked):
            streams, answers = read_streams(model, prompt)
            own.append(metric_by_prompt(task, answers, prompt))
            constant.append(metric_by_prompt(task, torch.zeros_like(answers), prompt))
            for what in (LOGIT, TUNED):
                for site, stream in streams.items():
                    said = answers_from(model, prompt, stream if what == LOGIT else tuned(site, stream))
                    found.setdefault((what, site), []).append(metric_by_prompt(task, said, prompt))
    whole = torch.cat(own)
    chance = task.chance().get(task.metric)
    nothing = torch.cat(constant) if chance is None else torch.full_like(whole, chance)
    return {key: torch.cat(parts) for key, parts in found.items()}, whole, nothing
