"""Which tokens each layer and the whole model rest on, in mixers of any family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.inspect.influences import influence, layers_alone
from contextlab.inspect.looks import Over, looks, places_of, ratio_of_means, shares
from contextlab.inspect.maps import VALUES
from contextlab.inspect.probe import Drawing, Probe, Row, Subject, by, over_control, probe_table, shown, some
from contextlab.models import Model
from contextlab.prompt import Prompt
from contextlab.registry import register

NAMED, ABOVE = 0.5, 0.1
"""The part of the influence from which on it is named after a score, and by how much it must exceed the control."""
WHOLE = "logits"
ROLE, DISTANCE, REACH = "share", "share by distance", "tokens back"


@register("probe", "influence", papers=("1312.6034", "2209.11895"), family="maps",
          cases=({"prompts": 2, "places": 6},))  # fmt: skip
@dataclass(frozen=True)
class Influence(Probe):
    """Which tokens each layer and the whole model rest on: recurrent and gated mixers as well as attention.

    How much token j moves what is said at place t is its gradient times itself (`contextlab.inspect.influence`): of a
    layer by what its mixer reads and answers, of the whole model by the tokens' vectors and the answer it gives. Shares
    of that in absolute values have the names of the probe `heads`: previous, same, duplicate, induction, bigram, first.
    Beside them stand shares by distance, and how many tokens back it lies on average. Where attention is sure of itself
    the slope of its weights is nil, and what is left is what the values carry. The control is the same with fresh
    weights.

    prompts: over which shares are means.
    places: at most so many of a prompt at which is asked what is said there, evenly spaced; of the whole model those
        alone whose prediction counts.
    """

    drawing: ClassVar[Drawing] = Drawing(
        "map", "what", "site", figures=("measure",), note="Share of gradient times input, in absolute values."
    )

    prompts: PositiveInt = 8
    places: PositiveInt = 64

    def refusal(self, subject: Subject) -> str:
        return "the model answers once for a whole text" if subject.model.spec.pool is not None else ""

    def measure(self, subject: Subject) -> pd.DataFrame:
        prompt = subject.prompts(self.prompts)
        found, fresh = self._scored(subject.model, prompt), self._scored(subject.untrained(), prompt)
        rows: list[dict[str, Any]] = []
        for (site, measure, what), over in found.items():
            row = {"site": site, "measure": measure, "what": what, "control": fresh[site, measure, what].value[0]}
            rows.append({**row, **{name: each[0] for name, each in zip(VALUES, over, strict=True)}, "n": self.prompts})
        return probe_table(rows)

    def _scored(self, model: Model, prompt: Prompt) -> dict[tuple[str, str, str], Over]:
        """(site, measure, what) -> the mean over prompts."""
        found: dict[tuple[str, str, str], Over] = {}
        everywhere = torch.ones_like(prompt.scored)
        for site, number in [*((f"blocks.{n}.mixer", n) for n in layers_alone(model)), (WHOLE, None)]:
            counted = prompt.scored if number is None and bool(prompt.scored.any()) else everywhere
            wanted = spaced(counted.any(0).nonzero()[:, 0].tolist(), self.places)
            share = shares(influence(model, prompt.inputs, layer=number, places=wanted))[:, None]
            counted = counted[:, wanted]
            back = _back(prompt, wanted)
            roles = {what: where[:, wanted] for what, where in places_of(prompt.inputs).items()}
            for measure, places in ((ROLE, roles), (DISTANCE, _bins(back))):
                there = {what: where & counted[..., None] for what, where in places.items()}
                found |= {(site, measure, what): over for what, over in looks(share, there).items()}
            lies = ((share * back).sum(-1) * counted[:, None]).sum(-1)
            value, half, _ = ratio_of_means(lies, counted.sum(-1, keepdim=True))
            found[site, REACH, "mean"] = Over(value, (value - half).clip(0), value + half)
        return found

    def words(self, rows: list[Row]) -> list[str]:
        sentences = []
        of_model = [row for row in rows if row["site"] == WHOLE]
        reach = next(row for row in of_model if row["measure"] == REACH)
        sentences.append(
            f"What the model says rests on tokens {shown(reach, 1)} back on average, control {reach['control']:.1f}."
        )
        roles = [row for row in rows if row["measure"] == ROLE]
        top = max((row for row in roles if row["site"] == WHOLE), key=lambda row: row["value"] - row["control"])
        sentences.append(
            f"What training has made it rest on most is {ON[top['what']]}: {shown(top)} of it, control "
            f"{top['control']:.2f}."
            if over_control(top)
            else UNCHANGED
        )
        for what, own in by((row for row in roles if row["site"] != WHOLE), "what").items():
            layers = [row for row in own if row["value"] >= NAMED and row["value"] > row["control"] + ABOVE]
            layers.sort(key=lambda row: -row["value"])
            if layers:
                told = some([f"{row['layer']} ({shown(row)})" for row in layers])
                sentences.append(f"Layers whose mixer rests mostly on {ON[what]}: {told}.")
        return sentences


UNCHANGED = "By what tokens are to the one that asks, it rests on the same ones as with fresh weights."
ON = {
    "previous": "the token before",
    "same": "the token itself",
    "duplicate": "the same symbol earlier",
    "induction": "what followed the same symbol",
    "bigram": "what followed the same two symbols",
    "first": "the first token",
}


def spaced(places: list[int], most: int) -> list[int]:
    """At most so many of the places, evenly spaced, the last one among them."""
    return places[::-1][:: -(-len(places) // most)][::-1]


def _back(prompt: Prompt, wanted: list[int]) -> Tensor:
    """How far off each token is, [Q, T]."""
    at = torch.arange(prompt.length, device=prompt.inputs.device)
    return (at[wanted, None] - at).abs()


def _bins(back: Tensor) -> dict[str, Tensor]:
    """Distances by powers of two: 0, 1, 2 to 3, 4 to 7, ... -> where they are, [1, Q, T]. back: [Q, T]."""
    found, low = {"0": back == 0}, 1
    while low <= int(back.max()):
        high = 2 * low - 1
        found[str(low) if high == low else f"{low} to {high}"] = (back >= low) & (back <= high)
        low = high + 1
    return {name: where[None] for name, where in found.items()}
