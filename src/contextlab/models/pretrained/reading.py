"""Whole texts, read at once or in pieces."""

from __future__ import annotations

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.models.padding import padding
from contextlab.models.stack import Model, Within

WHOLE = (
    "a policy is attached, and a whole text is read at once: most policies drop only what was read before, so that its "
    "scores are the full cache's; set read_in_pieces = 64, say, for scores under the policy"
)


def in_pieces(model: Model, size: int, tokens: Tensor, mask: Tensor | None, within: Within) -> Tensor:
    """Logits of whole texts [B, T], each of `size` tokens read on from the state that those before left."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InputError(f"read_in_pieces: expected a whole number of at least 1, or None, got {size!r}")
    placed = padding(mask, tokens, begun=False, waiting=None)
    tokens = placed.moved(tokens)
    embedded = None if within.embedded is None else placed.moved(within.embedded)
    logits, hidden, state = [], [], None
    for at in range(0, tokens.shape[1], size):
        piece = slice(at, at + size)
        each = Within(None if embedded is None else embedded[:, piece], [])
        some = None if placed.mask is None else placed.mask[:, piece]
        answered, state = model.read(tokens[:, piece], state, some, within=each)
        logits.append(answered)
        hidden.append(each.hidden or [])
    if within.hidden is not None:
        within.hidden.extend(placed.back(torch.cat(parts, 1)) for parts in zip(*hidden, strict=True))
    whole = placed.back(torch.cat(logits, 1))
    return whole if within.last is None else whole[:, within.last]


def answers_whole(model: Model) -> bool:
    """Whether a policy is attached under which a text that is read at once is not what it is in pieces."""
    served = [getattr(module, "served", None) for module in model.modules()]
    return any(each is not None and not each.policy.chunk_invariant for each in served)
