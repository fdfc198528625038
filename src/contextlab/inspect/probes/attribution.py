"""Which tokens of the prompt the answer rests on, and how well gradients tell it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.evaluation.intervals import Z95
from contextlab.inspect.attributing import METHODS, Curves, Method, ask, attributions
from contextlab.inspect.looks import looks, places_of, ratio_of_means, shares
from contextlab.inspect.maps import VALUES
from contextlab.inspect.probe import Drawing, Probe, Row, Subject, by, over_control, probe_table, shown
from contextlab.inspect.probes.influence import ON, UNCHANGED
from contextlab.prompt import Prompt, last_scored
from contextlab.registry import register

SITE = "embedded"
TRUTH: Method = "left_out"
SHARE, NUMBER, RANKS, STRAIGHT, OUT, INTO, GAP = (
    "share", "tokens", "rank correlation", "correlation", "deletion", "insertion", "missing",
)  # fmt: skip


@register("probe", "attribution", papers=("1703.01365", "1806.07421", "1312.6034"), family="maps",
          cases=({"prompts": 2, "steps": 4, "points": 4},))  # fmt: skip
@dataclass(frozen=True)
class Attribution(Probe):
    """Which tokens of the prompt the answer rests on, and how well gradients tell it.

    Asked is the answer at each prompt's last place whose prediction counts. What is true is what it loses where one
    token alone is left out, its vector replaced by the mean vector of the prompts ("left_out"): shares of that, in
    absolute values, have the names of the probe `heads`, and `tokens` is the number of equal shares that would be as
    spread out. The control is the same with fresh weights.

    Beside it stand two estimates: "gradient", the slope times what the vector differs from the mean one, and
    "integrated", integrated gradients from the mean vectors (1703.01365). Of each are told its correlations with the
    truth over the tokens of a prompt, and the areas under the curves of the answer's score while tokens are taken out,
    the most important first (deletion: the lower the better), or put into a prompt of mean vectors (insertion: the
    higher the better; 1806.07421): shares of what the whole prompt adds, which may lie outside 0 and 1. Their control
    is a random order. Ranks count tokens that add nothing as much as those that do, the plain correlation mostly the
    latter. Leaving out one token shows nothing where another says the same. Integrated gradients sum to what the prompt
    adds; "missing" is by how much of it they do not, as too few steps cause, above all in layers that normalise keys.

    prompts: over which all are means.
    steps: of the integral.
    points: of the curves.
    """

    drawing: ClassVar[Drawing] = Drawing(
        "lines", "what", figures=("measure",), note="left_out: what is lost where a token is left out, the truth."
    )

    prompts: PositiveInt = 32
    steps: PositiveInt = 32
    points: PositiveInt = 16

    def refusal(self, subject: Subject) -> str:
        return "the model answers once for a whole text" if subject.model.spec.pool is not None else ""

    def measure(self, subject: Subject) -> pd.DataFrame:
        prompt = subject.prompts(self.prompts)
        places = asked_in(prompt)
        # Where no layer looks ahead, what stands behind the answer is no part of the question.
        at = torch.arange(prompt.length, device=places.device)
        causal = all(getattr(part, "causal", True) for part in subject.model.modules())
        may = (at <= places[:, None]) if causal else torch.ones_like(prompt.scored)
        asked, untrained = ask(subject.model, prompt.inputs, places), subject.untrained()
        found: dict[str, Tensor] = {each: attributions(subject.model, asked, each, self.steps) for each in METHODS}
        fresh = attributions(untrained, ask(untrained, prompt.inputs, places), TRUTH)
        beside = {each["what"]: each["value"] for each in self._roles(prompt, places, fresh)}
        rows = [{**row, "control": beside.get(row["what"])} for row in self._roles(prompt, places, found[TRUTH])]
        draws = torch.rand(may.shape, generator=subject.generator(1), device=may.device)
        curves = Curves(asked, may, self.points)
        rows += self._curves(curves, {**found, "random": draws})
        added = curves.all - curves.none
        gap = (found["integrated"].double() * may).sum(-1) - added
        off, half, _ = ratio_of_means(gap.abs()[:, None], added.abs()[:, None])
        ends = {"ci_low": off[0] - half[0], "ci_high": off[0] + half[0]}
        rows.append({"what": "integrated", "measure": GAP, "value": off[0], **ends})
        for measure, rank in ((RANKS, True), (STRAIGHT, False)):
            chance = _mean(correlation(draws, found[TRUTH], may, rank))["value"]
            for each in METHODS[:-1]:
                over = _mean(correlation(found[each], found[TRUTH], may, rank))
                rows.append({"what": each, "measure": measure, **over, "control": chance})
        return probe_table({"site": SITE, "n": self.prompts, **row} for row in rows)

    def _roles(self, prompt: Prompt, places: Tensor, lost: Tensor) -> list[dict[str, Any]]:
        """Shares of what is lost by what the token is to the one that asks, and over how many tokens it is spread."""
        share = shares(lost)
        rows = []
        own = torch.arange(len(places), device=places.device)
        roles = {what: where[own, places][:, None] for what, where in places_of(prompt.inputs).items()}
        for what, over in looks(share[:, None, None], roles).items():
            values = {name: each[0] for name, each in zip(VALUES, over, strict=True)}
            rows.append({"what": what, "measure": SHARE, **values})
        spread = torch.special.entr(share).sum(-1).exp()
        return [*rows, {"what": "number", "measure": NUMBER, **_mean(spread)}]

    def _curves(self, curves: Curves, orders: dict[str, Tensor]) -> list[dict[str, Any]]:
        """The areas of all orders but the last, which is the control; none where prompts add nothing to answers."""
        whole = (curves.all - curves.none)[:, None]
        if whole.mean() <= 0:
            return []
        rows, chance = [], dict[str, float]()
        for each, order in reversed(orders.items()):
            for measure, area in zip((OUT, INTO), curves.areas(order), strict=True):
                value, half, _ = ratio_of_means(area[:, None], whole)
                ends = {"ci_low": value[0] - half[0], "ci_high": value[0] + half[0]}
                if each == "random":
                    chance[measure] = value[0]
                else:
                    row = {"what": each, "measure": measure, "value": value[0], **ends, "control": chance[measure]}
                    rows.append(row)
        return rows[::-1]

    def words(self, rows: list[Row]) -> list[str]:
        measured = by(rows, "measure")
        roles = [row for row in measured[SHARE] if row["control"] is not None]
        number = measured[NUMBER][0]
        sentences = [
            f"The answer rests on {shown(number, 1)} tokens' worth of the prompt, control {number['control']:.1f}."
        ]
        if roles:
            top = max(roles, key=lambda row: row["value"] - row["control"])
            sentences.append(
                f"What training has made it rest on most is {ON[top['what']]}: {shown(top)} of what is lost token by "
                f"token, control {top['control']:.2f}."
                if over_control(top)
                else UNCHANGED
            )
        told = [f"{TELLS[row['what']]} {shown(row)}" for row in measured[STRAIGHT]]
        gap = measured[GAP][0]
        missing = f"; the latter miss {shown(gap)} of their sum, so take more steps" if gap["value"] > 0.05 else ""
        sentences.append(f"Correlation with what leaving a token out costs: {' and '.join(told)}{missing}.")
        return sentences


TELLS = {"gradient": "gradients", "integrated": "integrated gradients"}


def asked_in(prompt: Prompt) -> Tensor:
    """The last place of each prompt whose prediction counts, else its last one, [B]."""
    found = last_scored(prompt)
    return torch.where(found < 0, prompt.length - 1, found)


def correlation(a: Tensor, b: Tensor, may: Tensor, rank: bool = False) -> Tensor:
    """Of two values over the tokens that may be, [B]; of their ranks: Spearman's. nan where one is the same for all."""
    weight = may.double()
    a, b = (_ranks(each, may) if rank else each.double() for each in (a, b))
    count = weight.sum(-1, keepdim=True)
    a, b = ((each - (each * weight).sum(-1, keepdim=True) / count) * weight for each in (a, b))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def _ranks(values: Tensor, may: Tensor) -> Tensor:
    """Ranks among the tokens that may be, those of equal ones their mean."""
    below = (values[:, :, None] > values[:, None]) + 0.5 * (values[:, :, None] == values[:, None])
    return (below.double() * may[:, None]).sum(-1)


def _mean(values: Tensor) -> dict[str, float]:
    """The mean over prompts that tell one, with its interval; 0 where none does."""
    told = values[values.isfinite()].double()
    if not len(told):
        return {"value": 0.0}
    value = told.mean().item()
    if len(told) < 2:
        return {"value": value}
    half = Z95 * told.std().item() / len(told) ** 0.5
    return {"value": value, "ci_low": value - half, "ci_high": value + half}
