"""Where programs of transformers say that documents stand in a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.models.packing import packed
from contextlab.ops.documents import Documents

ENDS = ("cu_seq_lens_q", "cu_seq_lens_k")
NAMES = (*ENDS, "max_length_q", "max_length_k", "seq_idx")
"""What `DataCollatorWithFlattening` gives beside `position_ids`; the longest document follows from the rest."""


def documents_of(
    tokens: Tensor, mask: Tensor | None, position_ids: Tensor | None, others: dict[str, Any], whole: bool
) -> Documents | None:
    """The documents of tokens [B, T], None where each row is one.

    mask: [B, T] bool, False at padding. position_ids: [B, T], 0 where a document begins. others: `NAMES` are taken out.
    whole: whether tokens are all that is read, with no cache before or after them, and at once.

    Raises InputError where these do not agree, and for documents that are not read whole.
    """
    given = {name: others.pop(name) for name in NAMES if others.get(name) is not None}
    ends = [given[name] for name in ENDS if name in given]
    if "seq_idx" in given:
        ends.append(_ends_of(given["seq_idx"], tokens))
    for other in ends[1:]:
        if not torch.equal(ends[0].cpu().long(), other.cpu().long()):
            raise InputError(f"{', '.join(given)}: they part the row at different tokens; give one of them")
    if not ends and (position_ids is None or torch.compiler.is_compiling() or not _begins_again(position_ids, mask)):
        return None
    if not whole:
        named = "position_ids that begin again" if not ends else next(iter(given))
        raise InputError(f"{named}: packed documents are read at once, without a cache; give each a row of its own")
    return packed(tokens, mask, ends[0] if ends else None, position_ids)


def without_others_first(due: Tensor, documents: Documents | None) -> Tensor:
    """What each place [B, T] is to predict, -100 where it would be the first token of the next document."""
    if documents is None:
        return due
    last = (documents.first + documents.length - 1)[documents.length > 0].to(due.device)
    return due.flatten().index_fill(0, last, -100).view_as(due)


def _begins_again(position_ids: Tensor, mask: Tensor | None) -> bool:
    """Whether a token has place 0 after another of its row."""
    first = position_ids == 0
    if mask is None:
        return bool(first[:, 1:].any())
    if first.shape not in (mask.shape, (1, mask.shape[1])):
        return False  # refused elsewhere
    return bool((first & mask & (mask.cumsum(1) > 1)).any())


def _ends_of(seq_idx: Tensor, tokens: Tensor) -> Tensor:
    """cu_seqlens [N + 1] of the number of each token's document, seq_idx [1, T]."""
    if seq_idx.shape != tokens.shape or len(seq_idx) != 1:
        raise InputError(f"seq_idx: expected [1, T] beside the tokens {list(tokens.shape)}, got {list(seq_idx.shape)}")
    changes = (seq_idx[0, 1:] != seq_idx[0, :-1]).nonzero().flatten() + 1
    return torch.cat((changes.new_zeros(1), changes, changes.new_full((1,), tokens.shape[1])))
