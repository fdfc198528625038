"""Which sparse features there are in what flows through a place: how well a dictionary of them tells it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.inspect.dictionaries import Dictionary, PutIn, dictionary_of, flowing, losses
from contextlab.inspect.fitting import FitSpec, fit
from contextlab.inspect.layout import chosen
from contextlab.inspect.means import ratio_of
from contextlab.inspect.probe import Drawing, Probe, Row, Subject, by, probe_table, shown
from contextlab.registry import register

L0, TOLD, RECOVERED, DEAD = "L0", "explained variance", "loss recovered", "dead units"
GROUPS = 16
"""Of test prompts; over these the interval of the loss recovered is."""
SMALL = {"units": 12, "k": 2, "tokens": 64, "steps": 3, "batch": 8, "test": 8}


@register("probe", "dictionary", papers=("2406.04093", "2407.14435"), family="dictionaries",
          cases=(SMALL, {**SMALL, "kind": "jumprelu"},
                 {**SMALL, "site": "blocks.0.mlp.input", "target": "blocks.0.mlp.output"}))  # fmt: skip
@dataclass(frozen=True)
class DictionaryProbe(Probe):
    """How well sparse features tell what flows through a place, with a dictionary that is trained on the spot.

    A sparse autoencoder, or a transcoder from one place to another, of TopK (2406.04093) or JumpReLU (2407.14435);
    `contextlab.inspect.train_dictionary` gives the dictionary itself, which sae-lens loads when it is saved. Measured
    on fresh prompts, on all their tokens:

    - L0: features that are active in a token.
    - explained variance: 1 less the squared error of what is told over the variance of what flows there.
    - loss recovered: the task's loss where the dictionary's answer is put into the place, on the way from that where
      the mean over tokens is put there (0) to the model's own (1). It is left out where the mean costs nothing.
    - dead units: the share of units that are active in no token.

    The control is the dictionary as it is drawn, of random directions, before it is trained. Absorption is not
    measured: it needs features that are known to imply one another.

    site: what is read, a pattern; "" takes the stream after the middle layer.
    target: of a transcoder, what is told.
    kind: "topk" keeps the k largest units of a token, "jumprelu" those above a threshold that is learned.
    units: of the dictionary; 0 for four times the width.
    k: units that answer for a token.
    tokens: to train on.
    steps: of training.
    batch: tokens a step.
    learning_rate: of Adam.
    test: prompts to measure on.
    """

    drawing: ClassVar[Drawing] = Drawing(
        "lines", "site", figures=("what", "measure"), note="Dotted: the dictionary before it is trained."
    )

    site: str = ""
    target: str = ""
    kind: Literal["topk", "jumprelu"] = "topk"
    units: NonNegativeInt = 0
    k: PositiveInt = 8
    tokens: PositiveInt = 32768
    steps: PositiveInt = 600
    batch: PositiveInt = 512
    learning_rate: PositiveFloat = 3e-3
    test: PositiveInt = 256

    def refusal(self, subject: Subject) -> str:
        if self.test < 2:
            return "test: expected at least 2 prompts"
        return ""

    def measure(self, subject: Subject) -> pd.DataFrame:
        model = subject.model
        sites = list(chosen(model, self.site or f"blocks.{(model.spec.depth * model.spec.loops - 1) // 2}.output"))
        length = subject.prompts(1).length
        drawn = subject.prompts(-(-self.tokens // length), draw=1)
        tested = subject.prompts(self.test)
        size = max(1, self.test // GROUPS)
        groups = [tested.rows(first, first + size) for first in range(0, self.test - size + 1, size)]
        rows: list[Row] = []
        for site in sites:
            x, y = flowing(model, drawn, site, self.target)
            units = self.units or 4 * x.shape[-1]
            spec = FitSpec(self.kind, units, min(self.k, units), self.steps, self.batch, self.learning_rate)
            flat = x.flatten(0, 1), None if y is None else y.flatten(0, 1)
            found, blank = (
                dictionary_of(fit(*flat, each, torch.Generator().manual_seed(subject.seed)), each, site, self.target)
                for each in (spec, replace(spec, steps=0))
            )
            told = flowing(model, tested, site, self.target)
            named = f"{self.kind} {'transcoder' if self.target else 'autoencoder'} of {units} units"
            mean = (told[0] if told[1] is None else told[1]).mean((0, 1))
            control = {row["measure"]: row["value"] for row in _measures(subject, blank, told, mean, groups)}
            for row in _measures(subject, found, told, mean, groups):
                rows.append({"site": site, "what": named, **row, "control": control.get(row["measure"])})
        return probe_table(rows)

    def words(self, rows: list[Row]) -> list[str]:
        sentences = []
        for (what, site), own in by(rows, "what", "site").items():
            told = {row["measure"]: row for row in own}
            loss = ""
            if RECOVERED in told:
                row = told[RECOVERED]
                loss = f", recovers {shown(row)} of the loss{_blank(row)}"
            dead = told[DEAD]["value"]
            sentences.append(
                f"A {what} on {site} tells {shown(told[TOLD])} of the variance{_blank(told[TOLD])} with "
                f"{shown(told[L0], 1)} features a token{loss}; {dead:.0%} of its units are dead."
            )
        return sentences


def _blank(row: Row) -> str:
    return "" if row["control"] is None else f" (random directions {round(row['control'], 2) + 0.0:.2f})"


@torch.no_grad()
def _measures(
    subject: Subject, dictionary: Dictionary, told: tuple[Tensor, Tensor | None], mean: Tensor, groups: list[Any]
) -> Iterator[Row]:
    """The rows of one dictionary. told: [N, T, d] at the site and the target."""
    x, wanted = told[0], told[0] if told[1] is None else told[1]
    features = dictionary.encode(x)
    active = features > 0
    yield {"measure": L0, **ratio_of(active.double().sum(-1).mean(1), torch.ones(len(x), device=x.device))}
    errors, variances = ((wanted - each).double().square().sum((1, 2)) for each in (dictionary.decode(features), mean))
    share = ratio_of(errors, variances)
    ends = {"ci_low": _less(share["ci_high"]), "ci_high": _less(share["ci_low"])}
    yield {"measure": TOLD, "value": _less(share["value"]), **ends, "n": share["n"]}
    yield {"measure": DEAD, "value": (~active.flatten(0, 1).any(0)).double().mean().item(), "n": len(x)}
    place = dictionary.target or dictionary.site
    clean = losses(subject.model, subject.task, groups)
    put = losses(subject.model, subject.task, groups, PutIn(dictionary).edits)
    ablated = losses(subject.model, subject.task, groups, {place: lambda value: _filled(value, mean)})
    lost = ablated - clean
    if lost.mean() > 2 * lost.std() / len(lost) ** 0.5 and lost.mean() > 1e-9 * clean.mean().abs():
        yield {"measure": RECOVERED, **ratio_of(ablated - put, lost), "n": sum(len(each.inputs) for each in groups)}


def _less(share: float | None) -> float | None:
    return None if share is None else 1 - share


def _filled(value: Tensor, mean: Tensor) -> Tensor:
    """The mean [d] in the place of all tokens of value [B, T, ...]."""
    return mean.to(value).expand(*value.shape[:2], -1).reshape(value.shape)
