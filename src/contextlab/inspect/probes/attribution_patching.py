"""How far gradients can stand in for patching: AtP and AtP* beside the exhaustive measurement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.inspect.attribution import estimates, node_sites
from contextlab.inspect.causal import By, patch_scores
from contextlab.inspect.held import mean_of
from contextlab.inspect.pairs import pairs_of, pairs_refusal
from contextlab.inspect.probe import Drawing, Probe, Row, Subject, by, probe_table, shown, some
from contextlab.registry import register

TOP = 10
EFFECT, OVERLAP, CORRELATION, COST = "effect", "share of the top ten", "correlation", "share of the readings"
METHODS = ("AtP", "AtP*")
DRAWS = 200
"""Of prompts with replacement, for intervals."""
PARTS = {"q": "queries", "k": "keys", "v": "values", "heads": "answers"}


@register("probe", "attribution_patching", papers=("2310.10348", "2403.00745"), family="causal",
          cases=({"prompts": 4}, {"prompts": 2, "by": "places"}))  # fmt: skip
@dataclass(frozen=True)
class AttributionPatching(Probe):
    """How far gradients can stand in for patching, and where not: estimates beside the exhaustive measurement.

    Each head's queries, keys, values and answers of the clean prompt are put alone into the corrupted one (`patching`
    says which prompts). An effect is the mean over prompts of how far that moves the score, in absolute values, over
    the mean distance of clean and corrupted scores. Beside it stand two estimates. AtP: the gradient times what
    differs. AtP*: with its two fixes, the weights of attention made anew for queries and keys, and the mean over layers
    of the estimates without the ways through that layer (`contextlab.inspect.attribution.estimates`). The first fix is
    for softmax attention over all tokens so far without biases; other mixers have the second alone. A mixer without
    heads is put in as a whole. What the estimates take to be linear is what follows: of an answer that feeds a later
    softmax which is sure of itself both say 0, whatever patching finds.

    Told of both: how many of patching's ten largest effects are among the ten largest estimates (the control is what
    chance gives), the correlation over parts, intervals by resampling prompts; and how many texts are read for it,
    forward and backward, for each that patching reads.

    prompts: pairs that are drawn.
    by: "heads", all places of a head at once; "places", each place alone, as in the papers (prompts of 100 tokens have
        a hundred times as many parts, and patching takes as long).
    """

    drawing: ClassVar[Drawing] = Drawing(
        "map", "head", "site", figures=("what",), measures=(EFFECT,), note="Mean absolute effect, share of the margin."
    )

    prompts: PositiveInt = 16
    by: Literal["heads", "places"] = "heads"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by == "places":
            drawn = Drawing(
                "map", "place", "site", figures=("what", "head"), measures=(EFFECT,), note=self.drawing.note
            )
            object.__setattr__(self, "drawing", drawn)

    def refusal(self, subject: Subject) -> str:
        return pairs_refusal(subject)

    def measure(self, subject: Subject) -> pd.DataFrame:
        pairs, names = pairs_of(subject, self.prompts), node_sites(subject.model)
        texts = pairs.clean.inputs, pairs.corrupted.inputs
        places = self.by == "places"
        guessed = estimates(subject.model, *texts, pairs.score, names, places)
        by_place: tuple[By, ...] = ("places",) if places else ()
        by_head: tuple[By, ...] = (*by_place, "heads")
        asked = {name: by_place if name.endswith(".output") else by_head for name in names}
        found = patch_scores(subject.model, *texts, pairs.score, asked, controls=False)
        scale = (found.clean_score - found.corrupted_score).double().abs().mean().item()
        parts = [(name, *part) for name in names for part in found.parts[name]]
        effects = {
            "patching": torch.cat([found.scores[name] - found.corrupted_score for name in names]),
            **{
                method: torch.cat([each[name].flatten(1).T for name in names])
                for method, each in zip(METHODS, (guessed.plain, guessed.fixed), strict=True)
            },
        }
        effects = {what: each.double().abs() / scale for what, each in effects.items()}  # [parts, B]
        rows: list[dict[str, Any]] = []
        for what, each in effects.items():
            for (name, place, head), values in zip(parts, each, strict=True):
                part = {"site": name, "place": place, "head": head or 0, "what": what, "measure": EFFECT}
                rows.append({**part, **mean_of(values)})
        most = min(TOP, len(parts))
        layers = len(subject.model.blocks) * subject.model.spec.loops
        generator = torch.Generator().manual_seed(subject.seed)
        count = len(pairs.at)
        draws = torch.randint(count, (DRAWS, count), generator=generator)
        for method, read in zip(METHODS, (3, 3 + (2 * layers if layers > 1 else 0)), strict=True):
            exact, guess = effects["patching"].cpu(), effects[method].cpu()
            for measure, told, chance in (
                (OVERLAP, _overlap, most / len(parts)),
                (CORRELATION, _correlation, 0.0),
            ):
                value = told(exact.mean(1), guess.mean(1))
                again = torch.tensor([told(exact[:, each].mean(1), guess[:, each].mean(1)) for each in draws])
                low, high = again.quantile(torch.tensor([0.025, 0.975], dtype=again.dtype)).tolist()
                ends = {"ci_low": min(low, value), "ci_high": max(high, value)}
                rows.append({"what": method, "measure": measure, "value": value, "control": chance, "n": count, **ends})
            rows.append({"what": method, "measure": COST, "value": read / len(parts)})
        return probe_table(rows)

    def words(self, rows: list[Row]) -> list[str]:
        told = {(row["what"], row["measure"]): row for row in rows if row["measure"] != EFFECT}
        said = []
        for method in METHODS:
            overlap, correlation, cost = (told[method, each] for each in (OVERLAP, CORRELATION, COST))
            said.append(
                f"{method} finds {_share(overlap)} of the ten largest effects of patching (by chance "
                f"{overlap['control']:.0%}) at {cost['value']:.1%} of the readings; correlation {shown(correlation)}."
            )
        parts = by((row for row in rows if row["measure"] == EFFECT), "site", "head", "place")
        missed = []
        for own in parts.values():
            values = {row["what"]: row["value"] for row in own}
            if values["patching"] > 0.1 and values["AtP"] < values["patching"] / 5:
                row = own[0]
                of = f"the {PARTS.get(row['site'].rpartition('.')[2], 'mixer')} of head {row['layer']}.{row['head']}"
                at = "" if row["place"] is None else f" at place {row['place']}"
                told_of = ", ".join(f"{what} {value:.0%}" for what, value in values.items())
                missed.append(f"{of}{at} ({told_of})")
        if missed:
            said.append(f"AtP all but misses {some(missed)}.")
        return said


def _share(row: Row) -> str:
    ends = "" if row["ci_low"] is None else f" [{max(0.0, row['ci_low']):.0%}, {min(1.0, row['ci_high']):.0%}]"
    return f"{row['value']:.0%}{ends}"


def _overlap(exact: Tensor, guess: Tensor) -> float:
    """How many of the largest of `exact` [parts] are among as many of the largest of `guess`, as a share."""
    most = min(TOP, len(exact))
    one, other = (set(each.topk(most).indices.tolist()) for each in (exact, guess))
    return len(one & other) / most


def _correlation(exact: Tensor, guess: Tensor) -> float:
    """Pearson's, over parts; 0 where either is constant."""
    one, other = exact - exact.mean(), guess - guess.mean()
    size = (one.norm() * other.norm()).item()
    return (one @ other).item() / size if size else 0.0
