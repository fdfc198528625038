"""What `forward` is given by programs of transformers: made ours, or refused in one line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError, nearest
from contextlab.models.pretrained.packed import NAMES, without_others_first
from contextlab.models.stack import Model
from contextlab.ops.documents import Documents
from contextlab.prompt import wide

SERVED = (
    *NAMES, "attention_mask", "cache", "input_ids", "inputs_embeds", "labels", "logits_to_keep", "num_items_in_batch",
    "output_hidden_states", "past_key_values", "position_ids", "return_dict", "shift_labels", "use_cache",
)  # fmt: skip


def refuse_others(others: dict[str, Any]) -> None:
    """Raises InputError for an argument that we do not know, or whose value would have to change something."""
    for name, value in others.items():
        asked = bool(value.any()) if isinstance(value, Tensor) else bool(value)  # token_type_ids are zeros, say
        if asked:
            near = nearest(name, SERVED)
            hint = f"; the nearest that is taken is {near!r}" if near else ""
            raise InputError(f"{name}: our models under transformers do not take it; leave it out{hint}")


def tokens_of(model: Model, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Token ids [B, T], and vectors [B, T, D] in place of what the model's embedding makes of them, or None."""
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError(
            "expected either input_ids or inputs_embeds, got " + ("neither" if input_ids is None else "both")
        )
    if input_ids is not None:
        tokens = input_ids
    else:
        assert inputs_embeds is not None
        width = model.spec.width
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != width:
            raise InputError(f"inputs_embeds: expected [B, T, {width}], got {list(inputs_embeds.shape)}")
        for block in model.blocks:
            if block.mixer.reads_tokens:  # type: ignore[union-attr]
                name = type(block.mixer).__name__
                raise InputError(f"inputs_embeds: the model's {name} reads token ids; give input_ids")
        tokens = inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.int64)
    if not tokens.numel():
        raise InputError(f"expected at least one token in a row, got {list(tokens.shape)}")
    return tokens, inputs_embeds


def mask_of(attention_mask: Tensor | None, tokens: Tensor, read: int) -> Tensor | None:
    """The mask [B, T] bool of these tokens, None where all count.

    attention_mask: [B, T], or [B, read + T] with what was read before them.
    """
    if attention_mask is None:
        return None
    batch, length = tokens.shape
    if (
        attention_mask.ndim != 2
        or len(attention_mask) != batch
        or attention_mask.shape[1] not in (length, read + length)
    ):
        shapes = f"[{batch}, {length}]" + (f" or [{batch}, {read + length}] with what was read before" if read else "")
        raise InputError(f"attention_mask: expected {shapes}, got {list(attention_mask.shape)}")
    mask = attention_mask[:, -length:].bool()
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask


def check_positions(
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    mask: Tensor | None,
    tokens: Tensor,
    read: int,
    model: Model,
) -> None:
    """Raises InputError where places are not the plain count of a row's tokens, which is what the model counts itself.

    position_ids, mask, tokens: [B, T]. attention_mask: [B, read + T]. read: tokens before them.
    Where only distances count (rotary and the like) a row may start anywhere.
    """
    if position_ids is None or torch.compiler.is_compiling():
        return
    batch, length = tokens.shape
    if position_ids.ndim != 2 or position_ids.shape[1] != length or len(position_ids) not in (1, batch):
        raise InputError(f"position_ids: expected [{batch}, {length}], got {list(position_ids.shape)}")
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    off = position_ids - (real.cumsum(1) - 1)  # the same at all of a row's tokens where they count on
    first = off.gather(1, real.to(torch.int8).argmax(1, keepdim=True))
    if bool(((off != first) & real).any()):
        raise InputError(
            "position_ids: expected a count of each row's tokens, 0, 1, 2, ...; 0 again where another "
            "document begins; those that leave places out are not taken"
        )
    if model.spec.position in ("learned", "sinusoidal"):
        before = read if attention_mask is None else attention_mask[:, :-length].bool().sum(1, keepdim=True)
        if bool(((first != before) & real.any(1, keepdim=True)).any()):
            raise InputError(
                f"position_ids: a row's tokens count on from {int(torch.as_tensor(before).max())}, got "
                f"{first.flatten().tolist()[:8]}; leave position_ids out"
            )


def places_of(logits_to_keep: int | Tensor, labels: bool) -> slice | Tensor | None:
    """The places that are predicted at, as `Within.last`; None for all. logits_to_keep: a count, or places [n]."""
    if isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim == 1 and not logits_to_keep.is_floating_point():
        last: slice | Tensor | None = logits_to_keep
    elif isinstance(logits_to_keep, int) and logits_to_keep >= 0:
        last = slice(-logits_to_keep, None) if logits_to_keep else None
    else:
        raise InputError(
            f"logits_to_keep: expected a count of last places, or places [n] int64, got {logits_to_keep!r}"
        )
    if last is not None and labels:
        raise InputError("logits_to_keep: a loss needs the logits of all places; leave out logits_to_keep or labels")
    return last


def loss_of(
    logits: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    items: Tensor | int | None,
    documents: Documents | None = None,
) -> Tensor:
    """The mean cross-entropy, in float32 at least, where labels are not -100.

    logits: [B, T, V]. labels: [B, T], of which place t + 1 is what place t is to predict. shift_labels: [B, T], what
    each place is to predict; used where both are given. items: what the sum is divided by in place of their count.
    documents: of which the last place predicts nothing; None where each row is one.
    """
    due = shift_labels
    if due is None:
        assert labels is not None
        due = F.pad(labels, (0, 1), value=-100)[:, 1:]
    if due.shape != logits.shape[:2]:
        name = "labels" if shift_labels is None else "shift_labels"
        raise InputError(f"{name}: expected {list(logits.shape[:2])}, got {list(due.shape)}")
    due = without_others_first(due, documents)
    scored = wide(logits.flatten(0, 1))
    due = due.flatten().to(scored.device)
    if items is None:
        return F.cross_entropy(scored, due, ignore_index=-100)
    total = F.cross_entropy(scored, due, ignore_index=-100, reduction="sum")
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)
