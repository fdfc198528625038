"""A model that drafts for itself: its first layers write on, all layers check (LayerSkip, 2404.16710)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.models.faults import finite, first_fault
from contextlab.models.generation import check_prompt, last_logits
from contextlab.models.within import Within
from contextlab.spec import Spec

if TYPE_CHECKING:
    from contextlab.models.stack import Model, ModelState


class DraftSpec(Spec):
    """How a model drafts for itself (self-speculative decoding, LayerSkip, 2404.16710, section 4.3).

    layers: E, which draft, by the model's own norm and read-out; of a looped model counted over all loops.
    ahead: d, tokens that are drafted before the other layers look at them.
    """

    layers: PositiveInt
    ahead: PositiveInt = 4


@dataclass(frozen=True)
class Drafted:
    """What was written, and how much of the draft was kept.

    tokens: [B, N] int64.
    drafted, accepted: tokens that the first layers drafted, and how many of them stayed, in each row.
    passes: readings of the layers that check, without that of the prompt; each gives a token of its own, too.
    """

    tokens: Tensor
    drafted: int
    accepted: int
    passes: int

    @property
    def acceptance(self) -> float:
        """Accepted of the drafted tokens; nan where none was drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def per_pass(self) -> float:
        """Tokens that were written for each reading of the layers that check; 1 is what plain decoding gives."""
        return (self.accepted + self.passes) / self.passes if self.passes else float("nan")


@torch.no_grad()
def generate_drafted(
    model: Model,
    prompt: Tensor,
    tokens: int,
    draft: DraftSpec | Mapping[str, Any],
    *,
    mask: Tensor | None = None,
) -> Drafted:
    """Continue token sequences by their likeliest tokens, drafted by the first layers of the model itself.

    The first E layers and the read-out write d tokens. The other layers read the vectors that the first left them of
    these tokens, all at once; what all layers find likeliest after each is what is written, as long as the draft
    agrees, and one token more. So the tokens are those of `generate`, but for the rounding by which reading together
    differs from reading one by one: logits that are as good as alike may be ordered otherwise. A state forgets the
    tokens that were not accepted: keys and values are cut off, the states of the first layers are those from before,
    and other layers that checked remember the accepted ones anew, from the state before them.

    prompt: [B, T] int64, T >= 1. A batch goes on together: as far as the draft of each of its rows agrees, so that
        long texts are best written one by one. tokens: how many to add. draft: a `DraftSpec` or its keys.
    mask: [B, T] bool, False at padding, left or right of a row's tokens.

    Raises InputError where the model cannot draft for itself.
    """
    given = DraftSpec.parse(draft, "draft")
    check_draft(model, given)
    check_prompt(prompt)
    logits, state = model.read(prompt, None, mask)
    written = [last_logits(logits, mask).argmax(-1, keepdim=True)]
    drafted = accepted = passes = 0
    while (left := tokens - 1 - accepted - passes) > 0:
        ahead = min(given.ahead, left - 1)
        found, state = _round(model, written[-1][:, -1:], state, given.layers, ahead)
        written.append(found)
        drafted, accepted, passes = drafted + ahead, accepted + found.shape[1] - 1, passes + 1
    return Drafted(torch.cat(written, 1)[:, :tokens], drafted, accepted, passes)


def check_draft(model: Model, draft: DraftSpec) -> None:
    """Raises InputError where the first layers of a model cannot draft for all of them."""
    spec = model.spec
    total = spec.depth * spec.loops
    if spec.read_in != "token":
        raise InputError("draft: this model reads vectors; only a model that reads tokens can generate")
    if spec.exit is not None:
        raise InputError("draft: tokens leave this model early already (exit); leave out one of the two")
    if total < 2:
        raise InputError("draft: a model of one layer has none that could draft for it")
    if draft.layers >= total:
        raise InputError(f"draft.layers: {draft.layers} of {total} layers; 1 to {total - 1} can draft for all")
    if any(getattr(module, "served", None) is not None for module in model.modules()):
        raise InputError(
            "draft: a policy is attached, which may keep other tokens where several are read at once; leave out draft"
        )


def _round(model: Model, last: Tensor, state: ModelState, layers: int, ahead: int) -> tuple[Tensor, ModelState]:
    """The tokens [B, n] that follow `last` [B, 1], of which the state knows nothing, n from 1 to ahead + 1.

    Returns them, and the state after `last` and all of them but the newest. state: must not be used any more.
    """
    drafts, after, streams = [last], [state], []
    for place in range(ahead + 1):
        low = Within(end=layers, given=[], last=slice(0, None if place < ahead else 0))
        logits, left = _read(model, drafts[-1], after[-1], low)
        after.append(left)
        streams.append(_taken(low.given)[-1])
        if place < ahead:
            drafts.append(logits[:, -1].argmax(-1, keepdim=True))
    read = torch.cat(drafts, 1)
    high = Within(stream=torch.cat(streams, 1), begin=layers, given=[], hidden=[])
    logits, whole = _read(model, read, replace(after[-1], length=state.length), high)
    if not finite(logits):
        raise InputError(first_fault(model, read, state, None))
    chosen = logits.argmax(-1)
    agrees = (chosen[:, :-1] == read[:, 1:]).all(0).long().cumprod(0)
    count = 1 + int(agrees.sum())
    if count == read.shape[1]:
        return chosen, whole
    kept = list(after[count].layers[:layers])
    for one in kept:
        one.reclaim()
    for number, (before, one) in enumerate(zip(state.layers[layers:], whole.layers[layers:], strict=True)):
        short = one.cut(state.length + count)
        if short is None:
            before.reclaim()
            x, embedded = _taken(high.given)[number][:, :count], _taken(high.hidden)[0][:, :count]
            i = (layers + number) % len(model.blocks)
            short = model._written(i, x, before, None, True, embedded, read[:, :count])
        kept.append(short)
    return chosen[:, :count], replace(whole, layers=kept, length=state.length + count)


def _read(model: Model, tokens: Tensor, state: ModelState, within: Within) -> tuple[Tensor, ModelState]:
    """Some layers of the model on tokens [B, T] that go on from a state."""
    logits, after = model._run(tokens, state, None, keep_state=True, within=within)
    assert after is not None
    return logits, after


def _taken(taken: list[Tensor] | None) -> list[Tensor]:
    assert taken is not None
    return taken
