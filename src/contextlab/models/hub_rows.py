"""Rows of unequal length in models of transformers that do not heed padding.

Their masks serve most models: rows are padded on the left, and each token is told its place. A model that counts
places by itself, pools tokens by their places in the batch, or takes no mask would answer padded rows wrongly. For
these the rows of equal length are read together, and no padding is shown to the model at all.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from contextlab.models.hub_state import HuggingFaceState, RaggedState
from contextlab.state import State

UNHEEDING = ("rwkv", "xlstm")  # take a mask, or none, and take no notice of padding
LENGTH_BOUND = ("prophetnet",)  # the distances of its second stream depend on how long a row is
PLACES = {"pos", "position", "positions", "rotary", "rope", "wpe"}  # words in the names of modules that know places


def heeds_padding(model: Any, known: set[str]) -> bool:
    """Whether a model of transformers is right for rows with padding on the left, told from how it is made.

    known: the arguments of its forward.
    """
    if "attention_mask" not in known or model.config.model_type in UNHEEDING or makes_places(model):
        return False
    placed = any(PLACES & set(name.split(".")[-1].split("_")) for name, _ in model.named_modules())
    return ("position_ids" in known or not placed) and _plain_cache(model.config)


def makes_places(model: nn.Module) -> bool:
    """Whether the model makes places out of the ids, counting from one past its padding id (RoBERTa and its like)."""
    return any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())


def length_matters(config: Any, length: int = 2**62) -> bool:
    """Whether what a row answers depends on how long the rows beside it are, while no row exceeds `length` tokens.

    Rotations that stretch with the length take that of the whole batch.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    each = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    stretched = [r for r in each if r.get("rope_type") in ("dynamic", "longrope")]
    limits = [r.get("original_max_position_embeddings") or text.max_position_embeddings for r in stretched]
    return config.model_type in LENGTH_BOUND or any(length > limit for limit in limits)


def _plain_cache(config: Any) -> bool:
    """Whether each layer's cache holds one key a token, a window or a recurrence.

    Others hold what was pooled over blocks of tokens, or choose among such, and blocks begin where padding does.
    """
    from transformers import cache_utils

    plain = {"DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer"} | {
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
    }
    try:
        layers = cache_utils.DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError, ValueError):  # a cache of another kind, as its configuration tells
        return True
    return all(type(layer).__module__ == cache_utils.__name__ and type(layer).__name__ in plain for layer in layers)


class Read(Protocol):
    """Reads tokens [n, t] on from a state -> logits [n, t, V] and the state after them; mask [n, t], left padding."""

    def __call__(self, inputs: Tensor, state: Any, mask: Tensor | None = None) -> tuple[Tensor, Any]: ...


def begins(mask: Tensor) -> list[int]:
    """Places within a left-padded piece, mask [B, T], at which a row begins, in order."""
    at = (~mask).sum(1)
    return sorted(set(at[(at > 0) & (at < mask.shape[1])].tolist()))


def in_pieces(
    read: Read, inputs: Tensor, state: HuggingFaceState, mask: Tensor | None, cuts: list[int]
) -> tuple[Tensor, HuggingFaceState]:
    """Read inputs [B, T] on with these cuts, between 0 and T; mask: [B, T] bool, False at padding, or None.

    Where rows begin: within a piece a row is padding only or tokens only. After each token: models that continue a
    state by single tokens only.
    """
    logits = []
    for first, last in pairwise([0, *cuts, inputs.shape[1]]):
        each, state = read(inputs[:, first:last], state, None if mask is None else mask[:, first:last])
        logits.append(each)
    return torch.cat(logits, 1), state


def row_by_row(
    read: Read, inputs: Tensor, state: HuggingFaceState, mask: Tensor | None
) -> tuple[Tensor, HuggingFaceState]:
    """Read inputs [B, 1] on with each row alone, mask [B, 1] or None.

    For models whose code takes a single token for a batch of one only.
    """
    rows = torch.arange(len(inputs), device=inputs.device)
    masks = [None] * len(inputs) if mask is None else mask.split(1)
    each = [read(inputs[i : i + 1], state.select(rows[i : i + 1]), masks[i]) for i in rows.tolist()]
    parts: Any = zip(*(after.leaves for _, after in each), strict=True)
    leaves: list[Tensor | State] = [torch.cat(part) for part in parts]
    start = torch.cat([after.start for _, after in each])
    after = dataclasses.replace(each[0][1], leaves=leaves, start=start, padded=state.padded or mask is not None)
    return torch.cat([logits for logits, _ in each]), after


def read_ragged(
    read: Read, inputs: Tensor, state: RaggedState | None, real: Tensor, blank: Tensor
) -> tuple[Tensor, RaggedState]:
    """Read on with the rows of equal length together.

    inputs: [B, T], padded on the left. real: [B] int64, how many of a row's tokens are none of padding.
    blank: [1, 1, V], what to answer where nothing is read.
    Returns logits [B, T, V], zero at padding, and the state; a row's part is as it was where the piece is padding.
    """
    batch, length = inputs.shape
    counts: list[int] = real.tolist()
    before = RaggedState([], (), batch) if state is None else state
    waiting = set(range(batch)).difference(*before.rows)
    parts, rows, answers = list[HuggingFaceState](), list[tuple[int, ...]](), list[tuple[Tensor, list[int]]]()
    for part, own in [*zip(before.parts, before.rows, strict=True), (None, tuple(sorted(waiting)))]:
        for count in sorted({counts[row] for row in own}):
            here = [place for place, row in enumerate(own) if counts[row] == count]
            index = torch.tensor([own[place] for place in here], device=inputs.device)
            kept = part
            if part is not None and len(here) < len(own):
                kept = part.select(torch.tensor(here, device=inputs.device))
            if count:
                logits, kept = read(inputs.index_select(0, index)[:, length - count :], kept)
                answers.append((logits, index.tolist()))
            if kept is not None:
                parts.append(kept)
                rows.append(tuple(index.tolist()))
    after = RaggedState(parts, tuple(rows), batch, length=before.length + length)
    if not answers:
        return blank.repeat(batch, length, 1), after
    first = answers[0][0]
    found = first.new_zeros(batch, length, first.shape[-1])
    for logits, each in answers:
        found[each, length - logits.shape[1] :] = logits
    return found, after
