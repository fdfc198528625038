"""What each head looks at, in mixers of any family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
from pydantic import PositiveInt

from contextlab.inspect.maps import head_scores
from contextlab.inspect.probe import Drawing, Probe, Row, Subject, by, largest, probe_table, shown, some
from contextlab.registry import register

NAMED, ABOVE = 0.5, 0.1
"""The part of its looking from which on a head is named after a score, and by how much it must exceed the control."""


@register("probe", "heads", papers=("2209.11895",), family="maps", cases=({"prompts": 2},))
@dataclass(frozen=True)
class Heads(Probe):
    """What each head looks at: the token before, itself, the same symbol, what followed it, the first token.

    Shares of the head's mixing matrix in absolute values (`contextlab.inspect.head_scores`), which softmax attention
    has and linear attention, delta rules and state-space layers come to when their recurrence is unrolled. The control
    is the same in a model with fresh weights.

    prompts: over which shares are means.
    """

    drawing: ClassVar[Drawing] = Drawing(
        "map", "head", figures=("what",), note="Share of what the head looks at, in absolute values."
    )

    prompts: PositiveInt = 64

    def refusal(self, subject: Subject) -> str:
        if subject.task.read_in != "token":
            return "scores are of tokens, and the task's are vectors"
        return ""

    def measure(self, subject: Subject) -> pd.DataFrame:
        tokens = subject.prompts(self.prompts).inputs
        found, fresh = head_scores(subject.model, tokens), head_scores(subject.untrained(), tokens)
        rows = []
        for row, control in zip(found.to_dict("records"), fresh["value"], strict=True):
            rows.append(
                {"site": f"blocks.{row['layer']}.mixer", "head": row["head"], "what": row["score"], "measure": "share"}
                | {"value": row["value"], "control": control, "n": self.prompts}
            )
        return probe_table(rows)

    def words(self, rows: list[Row]) -> list[str]:
        sentences = []
        for score, own in by(rows, "what").items():
            named = [row for row in own if row["value"] >= NAMED and row["value"] > row["control"] + ABOVE]
            named.sort(key=lambda row: -row["value"])
            if named:
                heads = some([f"{row['layer']}.{row['head']} ({shown(row)})" for row in named])
                sentences.append(f"Heads that look {LOOKS[score]}: {heads}.")
        if sentences:
            return sentences
        top = largest(rows)
        head = f"head {top['layer']}.{top['head']} {LOOKS[top['what']]}"
        return [f"No head has learned to look mostly one way; the largest share is {shown(top)}, of {head}."]


LOOKS = {
    "previous": "at the token before",
    "same": "at the token itself",
    "duplicate": "at the same symbol earlier",
    "induction": "at what followed the same symbol",
    "first": "at the first token",
}
