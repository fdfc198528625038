"""A model that drafts for itself beside plain decoding: how much of the draft stays, and what time it saves."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from contextlab.errors import InputError, check_whole
from contextlab.evaluation.cost import seconds_of
from contextlab.evaluation.cost_pair import LEAST, MOST, Quartiles, quartiles
from contextlab.models import DraftSpec, Model, generate_drafted
from contextlab.models.drafting import check_draft


@dataclass(frozen=True)
class DraftTimed:
    """How a model that drafts for itself compares with plain decoding; each triple is first quartile, median, third.

    layers, ahead: of the `DraftSpec`. prompts: that were written on, one by one. tokens: written after each.
    acceptance: share of the drafted tokens that stayed. per_pass: tokens for each reading of the layers that check.
    same: share of the tokens that plain decoding writes at the same place; rounding alone makes it less than 1.
    turns: how often both were timed. plain, drafted: seconds a token, the reading of the prompt among them.
    ratio: drafted over plain in the same turn; below 1 is faster.
    """

    layers: int
    ahead: int
    prompts: int
    tokens: int
    acceptance: float
    per_pass: float
    same: float
    turns: int
    plain: Quartiles
    drafted: Quartiles
    ratio: Quartiles


@torch.no_grad()
def time_drafts(
    model: Model,
    prompts: Sequence[Tensor] | Tensor,
    tokens: int,
    drafts: Sequence[DraftSpec | Mapping[str, Any]],
    *,
    seconds: float = 1.0,
) -> list[DraftTimed]:
    """Write on from prompts plainly and by drafts, in turns, which one first alternating.

    prompts: [N, T] int64, or several [T], on the model's device, each written on alone. tokens: after each, at least 2.
    drafts: each a `DraftSpec` or its keys.
    seconds: how long to time each draft. Each prompt has a turn; there are `LEAST` at least and, of few prompts, `MOST`
        at most, after one of each prompt that is not counted.

    Returns one for each draft. Raises InputError where the model cannot draft for itself so, before anything is timed.
    """
    check_whole(tokens=(tokens, 2))
    wanted = [DraftSpec.parse(each, "draft") for each in drafts]
    for each in wanted:
        check_draft(model, each)
    rows = [each[None] for each in prompts]
    if not rows:
        raise InputError("prompts: expected at least one, got none")
    mode = model.training
    model.eval()
    try:
        return [_timed(model, rows, tokens, each, seconds) for each in wanted]
    finally:
        model.train(mode)


def _timed(model: Model, rows: Sequence[Tensor], tokens: int, draft: DraftSpec, seconds: float) -> DraftTimed:
    found = [generate_drafted(model, row, tokens, draft) for row in rows]
    alike = [one.tokens == model.generate(row, tokens) for one, row in zip(found, rows, strict=True)]
    taken: tuple[list[float], list[float]] = [], []
    began, turn = time.perf_counter(), 0
    least = max(LEAST, len(rows))
    while turn < least or (turn < MOST and time.perf_counter() - began < seconds):
        row = rows[turn % len(rows)]
        for place in (0, 1) if turn % 2 == 0 else (1, 0):
            write = partial(model.generate, row, tokens, draft=draft if place else None)
            taken[place].append(seconds_of(write, row.device))
        turn += 1
    plain, drafted = ([each / tokens for each in times] for times in taken)
    ratios = [new / old for old, new in zip(plain, drafted, strict=True)]
    proposed, accepted, passes = (
        sum(getattr(one, name) for one in found) for name in ("drafted", "accepted", "passes")
    )
    return DraftTimed(
        draft.layers, draft.ahead, len(rows), tokens, accepted / max(1, proposed), (accepted + passes) / passes,
        float(torch.cat(alike).double().mean()), turn, quartiles(plain), quartiles(drafted), quartiles(ratios),
    )  # fmt: skip
