"""Which heads carry the answer: each one's clean values, put alone into a corrupted prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pandas as pd
from pydantic import PositiveInt

from contextlab.inspect.causal import By, patch_scores
from contextlab.inspect.held import mean_of
from contextlab.inspect.layout import sites
from contextlab.inspect.pairs import margin_of, pairs_of, pairs_refusal, share_of
from contextlab.inspect.probe import Drawing, Probe, Row, Subject, by, over_control, probe_table, some
from contextlab.models import Model
from contextlab.registry import register

SHARE, MARGIN = "share of the effect", "margin"
NAMED = 0.1
"""A part that brings back at least so much is named."""


@register("probe", "patching", papers=("2202.05262", "2211.00593"), family="causal",
          cases=({"prompts": 6}, {"prompts": 6, "by": "places"}))  # fmt: skip
@dataclass(frozen=True)
class Patching(Probe):
    """Which heads carry the answer: what each gave in a clean prompt, put alone into the corrupted one.

    The task makes the pairs (`Task.corrupt`): the same question, in a context that gives another answer. How much of
    the clean answer is there is told at the place that asks, in each prompt its own: of choices by the logit of the
    clean answer less that of the corrupted one, of numbers by how far the prediction is on the way from one target to
    the other. 0 is what the corrupted prompt gives, 1 what the clean one does; the interval is over prompts, of a ratio
    of means. The shares of several parts need not sum to 1: what one head hands on to the next is in both.

    The control is the same with the values of an unrelated clean prompt: it is above 0 where they take the corrupted
    answer away, which is half of the way, without bringing the clean one. The row "answer" has the margin between clean
    and corrupted prompts, beside that of a model with fresh weights: where there is none, shares mean nothing.

    prompts: pairs that are drawn.
    by: "heads", all places of a head at once (a mixer without heads is patched as a whole, `mixer.output`, and counted
        as head 0); "places", the stream before each layer at each place of the text.
    """

    drawing: ClassVar[Drawing] = Drawing(
        "map", "head", measures=(SHARE,), note="Share of the clean answer that a part, put back alone, brings back."
    )

    prompts: PositiveInt = 64
    by: Literal["heads", "places"] = "heads"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by == "places":
            drawn = Drawing("map", "place", measures=(SHARE,), note=self.drawing.note)
            object.__setattr__(self, "drawing", drawn)

    def refusal(self, subject: Subject) -> str:
        return pairs_refusal(subject)

    def measure(self, subject: Subject) -> pd.DataFrame:
        pairs = pairs_of(subject, self.prompts)
        asked: dict[str, tuple[By, ...]]
        if self.by == "heads":
            asked = {site: ("heads",) if site.endswith("heads") else () for site in head_sites(subject.model)}
        else:
            asked = {site: ("places",) for site in sites(subject.model, named=False) if is_stream(site)}
        found = patch_scores(subject.model, pairs.clean.inputs, pairs.corrupted.inputs, pairs.score, asked)
        whole = found.clean_score - found.corrupted_score
        fresh = margin_of(pairs, subject.untrained()).mean().item()
        rows: list[dict[str, Any]] = [{"what": "answer", "measure": MARGIN, "control": fresh, **mean_of(whole)}]
        for site, parts in found.parts.items():
            for (place, head), own, other in zip(parts, found.scores[site], found.controls[site], strict=True):
                control = share_of(other - found.corrupted_score, whole)["value"]
                part = {"place": place, "head": head} if self.by == "places" else {"head": head or 0}
                told = {"site": site, "what": self.by, "measure": SHARE, "control": control, **part}
                rows.append({**told, **share_of(own - found.corrupted_score, whole)})
        return probe_table(rows)

    def words(self, rows: list[Row]) -> list[str]:
        if no_margin := margin_words(rows):
            return [no_margin]
        parts = [row for row in rows if row["measure"] == SHARE]
        named = [row for row in parts if over_control(row) and row["value"] >= NAMED]
        if not named:
            top = max(parts, key=lambda row: row["value"])
            return [f"No part alone brings back a tenth of the answer; the most is {percent(top)}, of {name(top)}."]
        if parts[0]["what"] == "places":
            streams = []
            for _, own in by(named, "layer").items():
                largest = sorted(own, key=lambda row: -row["value"])
                places = some([f"{row['place']} ({percent(row)})" for row in largest])
                streams.append(f"Before layer {own[0]['layer']} the answer is carried by the stream at place {places}.")
            return streams
        named.sort(key=lambda row: -row["value"])
        first, *rest = named
        said = [
            f"{capital(name(first))}, put back alone, brings back {percent(first)} of the answer "
            f"(from an unrelated prompt {first['control']:.0%})."
        ]
        if rest:
            said.append(f"Others, each alone: {some([f'{name(row)} ({percent(row)})' for row in rest])}.")
        return said


def margin_words(rows: list[Row]) -> str:
    """That the model does not tell clean from corrupted prompts, in a sentence; "" where it does."""
    row = next(row for row in rows if row["measure"] == MARGIN)
    if over_control(row) and row["value"] > 0 and (row["ci_low"] is None or row["ci_low"] > 0):
        return ""
    ends = "" if row["ci_low"] is None else f" [{row['ci_low']:.3g}, {row['ci_high']:.3g}]"
    return (
        "The model's answers do not tell the clean context from the corrupted one "
        f"(margin {row['value']:.3g}{ends}, fresh weights {row['control']:.3g}), so that no part is named."
    )


def head_sites(model: Model) -> list[str]:
    """Where each layer's mixer is taken apart: its heads' answers, or its output where it has no heads."""
    known = sites(model)
    mixers = [site.removesuffix(".output") for site in known if site.endswith(".mixer.output")]
    return [f"{mixer}.heads" if f"{mixer}.heads" in known else f"{mixer}.output" for mixer in mixers]


def is_stream(site: str) -> bool:
    """Whether a place is the stream before a layer."""
    return site.startswith("blocks.") and site.count(".") == 2 and site.endswith(".input")


def name(row: Row) -> str:
    """What a row is of, in words: a head, a whole mixer, the stream at a place."""
    if row["site"].endswith(".heads"):
        return f"head {row['layer']}.{row['head']}"
    part = row["site"].split(".")[2]
    if part in ("mixer", "mlp"):
        return f"the {'MLP' if part == 'mlp' else part} of layer {row['layer']}"
    return f"the stream before layer {row['layer']} at place {row['place']}"


def capital(text: str) -> str:
    """With a capital letter in front."""
    return text[:1].upper() + text[1:]


def percent(row: Row) -> str:
    """A row's share with its interval: 81% [77%, 84%]."""
    ends = "" if row["ci_low"] is None else f" [{row['ci_low']:.0%}, {row['ci_high']:.0%}]"
    return f"{row['value']:.0%}{ends}"
