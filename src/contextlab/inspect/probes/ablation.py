"""What is lost without a part: heads, mixers and MLPs whose answers are taken away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.inspect.capturing import taking
from contextlab.inspect.causal import By, scores_with, streams_of
from contextlab.inspect.held import mean_of
from contextlab.inspect.layout import chosen, sites
from contextlab.inspect.means import metric_by_prompt
from contextlab.inspect.probe import Drawing, Probe, Row, Subject, over_control, probe_table, shown, some
from contextlab.inspect.probes.patching import head_sites, name
from contextlab.models import Model
from contextlab.prompt import HIGHER_IS_BETTER, Prompt
from contextlab.registry import register

INTACT = "intact"
KINDS = ("mean", "zero", "resample")
IN_PLACE = {"mean": "with its mean over prompts", "zero": "with zeros", "resample": "with another prompt's values"}
FEWEST = 2


@register("probe", "ablation", papers=("2211.00593",), family="causal", cases=({"prompts": 4},))
@dataclass(frozen=True)
class Ablation(Probe):
    """What is lost without a part: each head, mixer and MLP, whose answers are taken away at all places.

    In their place stand, in turn, their means over prompts at each place ("mean"), zeros ("zero"), and what they answer
    to another prompt ("resample"): zeros are far from anything the next layers have seen, so that they may harm by what
    they are and not by what is missing. Values are how much worse the task's metric is, prompt by prompt against the
    intact model, with the interval of the paired difference; the row "intact" has the metric itself. What other parts
    make up for is not lost. The control is the same in a model with fresh weights.

    A mixer without heads is taken away as a whole, and counted as head 0.

    prompts: of the task.
    metric: of those that the task tells; "" its own.
    """

    drawing: ClassVar[Drawing] = Drawing(
        "map", "head", figures=("what", "measure"), note="How much worse the metric is without a head."
    )

    prompts: PositiveInt = 64
    metric: str = ""

    def refusal(self, subject: Subject) -> str:
        return f"prompts: {self.prompts} are too few; use {FEWEST} or more" if self.prompts < FEWEST else ""

    def measure(self, subject: Subject) -> pd.DataFrame:
        prompt = subject.prompts(self.prompts)
        metric = self.metric or subject.task.metric
        fresh = _ablated(subject.untrained(), subject, prompt, metric)
        rows: list[dict[str, Any]] = []
        for (row, values), (_, control) in zip(_ablated(subject.model, subject, prompt, metric), fresh, strict=True):
            rows.append({**row, **mean_of(values), "control": control.double().mean().item()})
        return probe_table(rows)

    def words(self, rows: list[Row]) -> list[str]:
        intact = next(row for row in rows if row["what"] == INTACT)
        metric = intact["measure"]
        words = metric.replace("_", " ")
        found = f"The intact model has {words} {shown(intact)}, one with fresh weights {intact['control']:.2f}"
        ends = [intact["value"] if each is None else each for each in (intact["ci_low"], intact["ci_high"])]
        if ends[0] <= intact["control"] if metric in HIGHER_IS_BETTER else ends[1] >= intact["control"]:
            return [f"{found}: it has learned nothing that a part could be missed for."]
        said = [f"{found}."]
        for kind in KINDS:
            parts = [row for row in rows if row["what"] == kind]
            lost = [row for row in parts if over_control(row) and over_control({**row, "control": 0})]
            if not lost:
                said.append(f"No part is missed when it is replaced {IN_PLACE[kind]}.")
                continue
            heads = sorted((row for row in lost if row["head"] is not None), key=lambda row: -row["value"])
            whole = sorted((row for row in lost if row["head"] is None), key=lambda row: -row["value"])
            named = [some([f"{name(row)} ({shown(row)})" for row in each]) for each in (heads, whole) if each]
            said.append(f"Replaced {IN_PLACE[kind]}, what each part costs in {words}: {'; '.join(named)}.")
        return said


def _ablated(model: Model, subject: Subject, prompt: Prompt, metric: str) -> list[tuple[dict[str, Any], Tensor]]:
    """Rows of a table, and how much worse each prompt's metric is, [B]; of the row "intact" the metric."""

    def score(prediction: Tensor) -> Tensor:
        return metric_by_prompt(subject.task, prediction, prompt, metric)

    heads = head_sites(model)
    whole = [site for site in sites(model, named=False) if site.endswith((".mixer.output", ".mlp.output"))]
    places = chosen(model, [*heads, *(site for site in whole if site not in heads)])
    if skipped := [each for each, site in places.items() if site.routed]:
        raise InputError(f"{skipped[0]}: tokens that skip the layer are not there, so it cannot be taken away")
    with torch.no_grad():
        with taking(model, places) as taken:
            intact = score(model(prompt.inputs))
        measured: list[tuple[dict[str, Any], Tensor]] = [({"what": INTACT, "measure": metric}, intact)]
        streams = streams_of(model, prompt.inputs)
        for each, site in places.items():
            value = taken[each]
            by: tuple[By, ...] = ("heads",) if each.endswith(".heads") else ()
            for kind in KINDS:
                parts, scores = scores_with(model, site, _in_place(kind, value), prompt.inputs, score, by, streams)
                for (_, head), found in zip(parts, scores, strict=True):
                    row = {"site": each, "what": kind, "measure": f"{metric} lost"}
                    part = {"head": head or 0} if each in heads else {}
                    worse = intact - found if metric in HIGHER_IS_BETTER else found - intact
                    measured.append(({**row, **part}, worse))
    return measured


def _in_place(kind: str, value: Tensor) -> Tensor:
    """What stands in the place of values [B, T, ...]."""
    if kind == "resample":
        return value.roll(1, 0)
    return value.mean(0, keepdim=True).expand_as(value) if kind == "mean" else torch.zeros_like(value)
