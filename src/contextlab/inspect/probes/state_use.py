"""How much of a state is used: its effective rank over time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.evaluation.intervals import t95
from contextlab.inspect.held import Part, mean_of, no_states, parts, spread_places, state_sites, states_over
from contextlab.inspect.probe import Drawing, Probe, Row, Subject, beside, by, probe_table, shown
from contextlab.models import Model
from contextlab.registry import register
from contextlab.words import listed

RANK, SHARE, TOP, SPREAD, OF_HEAD = (
    "effective rank", "share of the largest rank", "energy of the largest", "participation ratio",
    "effective rank of a head",
)  # fmt: skip
GROUPS = 16
"""Of prompts, each left out once (jackknife)."""


@register("probe", "state_use", family="state", cases=({"prompts": 4, "places": 2},))
@dataclass(frozen=True)
class StateUse(Probe):
    """How much of each layer's state is used, as the text goes on.

    A matrix with singular values s_i has the effective rank exp(-sum_i p_i log p_i), p_i = s_i / sum_j s_j (Roy and
    Vetterli, EUSIPCO 2007): n where n of them are alike and the rest 0. It is told of each head's matrix in the
    states of linear attention, delta rules and state-space layers, and of the keys and of the values that softmax
    attention holds (a matrix with a row a token); beside it its share of the largest rank that the matrix could have,
    and the share of the squares of all singular values that the `top` largest have. Values are means over heads and
    prompts; each head's rank after the last token stands apart.

    Of states that are vectors (rg_lru, lstm) it is the participation ratio over prompts, (sum_i l_i)^2 / sum_i l_i^2
    of the eigenvalues l_i of the covariance: n where the vector varies alike in n directions. Both sums are estimated
    without the bias that few prompts give them (exact where the numbers are Gaussian).

    A short convolution's last inputs, an unfinished segment's tokens and counts are not measured, and neither are
    summaries beside keys and values. The control is the same in a model with fresh weights.

    prompts: over which values are means.
    places: of the text, evenly; the last one is there.
    top: singular values.
    """

    drawing: ClassVar[Drawing] = Drawing(
        "lines", "place", figures=("site", "what", "measure"), measures=(RANK, SHARE, TOP, SPREAD),
        note="After each token (place). Dotted: fresh weights.",
    )  # fmt: skip

    prompts: PositiveInt = 64
    places: PositiveInt = 6
    top: PositiveInt = 1

    def refusal(self, subject: Subject) -> str:
        if self.prompts < 4:
            return f"prompts: expected at least 4, got {self.prompts}"
        return no_states(subject)

    @torch.no_grad()
    def measure(self, subject: Subject) -> pd.DataFrame:
        inputs = subject.prompts(self.prompts).inputs
        places = spread_places(inputs.shape[1], self.places)
        return probe_table(
            beside(*(self._rows(model, inputs, places) for model in (subject.model, subject.untrained())))
        )

    def _rows(self, model: Model, inputs: Tensor, places: list[int]) -> Iterator[Row]:
        mixers = state_sites(model)
        for site, states in states_over(model, inputs, places, list(mixers)).items():
            named = {part.name: part.words for part in parts(states[-1], mixers[site])}
            for place, state in zip(places, states, strict=True):
                for part in parts(state, mixers[site]):
                    of = {"site": site, "what": named.get(part.name, part.words), "place": place}
                    told = self._matrix(part) if part.matrix else _vector(part.value)
                    yield from ({**of, **row} for row in told if place == places[-1] or row["measure"] != OF_HEAD)

    def _matrix(self, part: Part) -> Iterator[Row]:
        """part: [B, H, n, D]."""
        values = torch.linalg.svdvals(part.value.double())
        rank = effective_rank(values)  # [B, H]
        energy = values.square()
        top = energy[..., : self.top].sum(-1) / energy.sum(-1)
        most = values.shape[-1]
        told = ((RANK, rank, (1.0, float(most))), (SHARE, rank / most, (0.0, 1.0)), (TOP, top, (0.0, 1.0)))
        if bool(rank.isnan().all()):  # nothing is written yet
            return
        for measure, value, bounds in told:
            yield {"measure": measure, **mean_of(value.nanmean(1), bounds)}
        for head in range(rank.shape[1]):
            if not bool(rank[:, head].isnan().all()):
                yield {"measure": OF_HEAD, "head": head, **mean_of(rank[:, head], (1.0, float(most)))}

    def words(self, rows: list[Row]) -> list[str]:
        last = [row for row in rows if row["head"] is None and row["place"] == max(each["place"] for each in rows)]
        sentences = []
        for what, own in by(last, "what").items():
            told = by(own, "measure")
            if SPREAD in told:
                spread = listed([f"{shown(row, 1)} in layer {row['layer']}" for row in told[SPREAD]])
                sentences.append(
                    f"Over prompts the state ({what}) varies in this many directions (participation ratio): {spread}; "
                    f"with fresh weights {_controls(told[SPREAD])}."
                )
            if RANK not in told:
                continue
            ranks = [
                f"{shown(row, 1)} in layer {row['layer']} ({share['value']:.0%} of what it could be)"
                for row, share in zip(told[RANK], told[SHARE], strict=True)
            ]
            sentences.append(
                f"After the last token the effective rank of the {what} is {listed(ranks)}; "
                f"with fresh weights {_controls(told[RANK])}."
            )
            tops = listed([f"{row['value']:.0%}" for row in told[TOP]])
            largest = "largest singular value has" if self.top == 1 else f"{self.top} largest singular values have"
            sentences.append(f"Of the {what} the {largest} {tops} of the energy, layer by layer.")
        return sentences


def effective_rank(values: Tensor) -> Tensor:
    """exp of the entropy of singular values [..., n] that are made to sum to 1; nan where all are 0."""
    p = values / values.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1).exp()


def participation(rows: Tensor) -> Tensor:
    """The participation ratio of what rows [..., N, D] are drawn from, [...]; N at least 3.

    With m = N - 1 and S the covariance of the sample, tr(S)^2 and tr(S^2) of Gaussian rows are on average
    tr(C)^2 + 2 tr(C^2) / m and (1 + 1 / m) tr(C^2) + tr(C)^2 / m, which is solved for those of C.
    """
    m = rows.shape[-2] - 1
    x = rows - rows.mean(-2, keepdim=True)
    gram = x @ x.mT if x.shape[-2] < x.shape[-1] else x.mT @ x
    first = (gram.diagonal(dim1=-2, dim2=-1).sum(-1) / m).square()
    second = gram.square().sum((-2, -1)) / m**2
    second_true = m**2 / ((m - 1) * (m + 2)) * (second - first / m)
    first_true = first - 2 * second_true / m
    return (first_true / second_true.clamp_min(torch.finfo(rows.dtype).tiny)).clamp(1, rows.shape[-1])


def _vector(value: Tensor) -> Iterator[Row]:
    """value: [B, D]. The interval is the jackknife's over groups of prompts."""
    value = value.double()
    if bool((value == value[0]).all()):  # nothing is written yet
        return
    ratio = participation(value).item()
    groups = min(GROUPS, len(value))
    size = len(value) // groups
    number = torch.arange(groups * size, device=value.device) // size
    kept = torch.stack([(number != group).nonzero()[:, 0] for group in range(groups)])
    others = participation(value[kept])
    half = t95(groups - 1) * ((groups - 1) * others.var(correction=0)).sqrt().item()
    ends = {"ci_low": max(1.0, ratio - half), "ci_high": min(float(value.shape[1]), ratio + half)}
    yield {"measure": SPREAD, "value": ratio, **ends, "n": len(value)}


def _controls(rows: list[Row]) -> str:
    return listed([f"{row['control']:.1f}" for row in rows if row["control"] is not None] or ["nothing"])
