"""What each head looks at, in mixers of any family, and whether it copies it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
from pydantic import PositiveInt

from contextlab.inspect.copies import copying_scores
from contextlab.inspect.maps import NONE, VALUES, head_scores, telling_layers
from contextlab.inspect.probe import Drawing, Probe, Row, Subject, by, probe_table, shown, some
from contextlab.registry import register

NAMED, ABOVE = 0.5, 0.1
"""The part of its looking from which on a head is named after a score, and by how much it must exceed the control."""
SHARE, COPY, LOOK = "share", "copy", "Heads that look"


@register("probe", "heads", papers=("2209.11895", "2401.12973"), family="maps", cases=({"prompts": 2},))
@dataclass(frozen=True)
class Heads(Probe):
    """What each head looks at: the token before, itself, the same symbol, what followed it, the first token.

    Shares of the head's mixing matrix in absolute values (`contextlab.inspect.head_scores`), which softmax attention
    has and linear attention, delta rules and state-space layers come to when their recurrence is unrolled. Where tokens
    are vectors there are the shares of the token before, of itself and of the first. The control is the same in a model
    with fresh weights. Mixers that tell no matrices are compared by the probe `influence`.

    Of heads whose values are linear in the token, and whose answers reach the logits linearly, it also tells whether
    they copy: whether looking at a token raises that token's logit, from -1 to 1 by the eigenvalues of W_U W_O W_V W_E
    (`contextlab.inspect.copies`). Norms or gates after the heads and convolutions before them rule that out.

    prompts: over which shares are means.
    """

    drawing: ClassVar[Drawing] = Drawing(
        "map", "what", "layer.head", figures=(), bounds=(-1.0, 1.0),
        note="Share of what the head looks at, in absolute values; copy: of the eigenvalues, those that are positive "
        "less those that are negative.",
    )  # fmt: skip

    prompts: PositiveInt = 64

    def refusal(self, subject: Subject) -> str:
        return "" if telling_layers(subject.model) else f"{NONE}; `influence` compares all"

    def measure(self, subject: Subject) -> pd.DataFrame:
        inputs, untrained = subject.prompts(self.prompts).inputs, subject.untrained()
        found, fresh = head_scores(subject.model, inputs), head_scores(untrained, inputs)
        rows = []
        for row, control in zip(found.to_dict("records"), fresh["value"], strict=True):
            rows.append(
                {"site": f"blocks.{row['layer']}.mixer", "head": row["head"], "what": row["score"], "measure": SHARE}
                | {name: row[name] for name in VALUES}
                | {"control": control, "n": self.prompts}
            )
        copies, controls = copying_scores(subject.model)[0], copying_scores(untrained)[0]
        for site, scores in copies.items():
            beside = controls.get(site, scores.new_full(scores.shape, float("nan")))
            rows += [
                {"site": site, "head": head, "what": COPY, "measure": "eigenvalues", "value": value, "control": control}
                for head, (value, control) in enumerate(zip(scores.tolist(), beside.tolist(), strict=True))
            ]
        return probe_table(rows)

    def words(self, rows: list[Row]) -> list[str]:
        sentences = []
        for what, own in by(rows, "what").items():
            named = [row for row in own if row["value"] >= NAMED and row["value"] > (row["control"] or 0) + ABOVE]
            named.sort(key=lambda row: -row["value"])
            if named:
                heads = some([f"{row['layer']}.{row['head']} ({shown(row)})" for row in named])
                sentences.append(f"Heads that {DO[what]}: {heads}.")
        if not any(sentence.startswith(LOOK) for sentence in sentences):
            shares = [row for row in rows if row["measure"] == SHARE]
            top = max(shares, key=lambda row: row["value"] - (row["control"] or 0))
            beside = "" if top["control"] is None else f", control {top['control']:.2f}"
            none = (
                f"No head has learned to look mostly one way; what has grown most is the share for '{top['what']}' of "
                f"head {top['layer']}.{top['head']} ({shown(top)}{beside})."
            )
            sentences.insert(0, none)
        return sentences


DO = {
    "previous": "look at the token before",
    "same": "look at the token itself",
    "duplicate": "look at the same symbol earlier",
    "induction": "look at what followed the same symbol",
    "bigram": "look at what followed the same two symbols",
    "first": "look at the first token",
    COPY: "copy what they look at",
}
