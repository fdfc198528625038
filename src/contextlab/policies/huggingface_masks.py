"""The masks of `transformers` while a policy is attached: only what left padding there is."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
)

from contextlab.errors import InputError


def padding_mask(
    before: str,
    *,
    mask_function: Any,
    attention_mask: Tensor | None,
    q_length: int,
    kv_length: int,
    local_size: int | None = None,
    **options: Any,
) -> Any:
    """The mask function that transformers calls: [B, q_length] bool, False at left padding, or None without any."""
    if local_size is not None:  # of layers with a sliding window, which are not served
        return ALL_MASK_ATTENTION_FUNCTIONS[before](
            mask_function=mask_function, attention_mask=attention_mask, q_length=q_length, kv_length=kv_length,
            local_size=local_size, **options,
        )  # fmt: skip
    if mask_function is bidirectional_mask_function:  # of an encoder's states, made even where there is no encoder
        options["allow_is_bidirectional_skip"] = False  # None would say nothing to a layer that is served
        return ALL_MASK_ATTENTION_FUNCTIONS[before](
            mask_function=mask_function, attention_mask=attention_mask, q_length=q_length, kv_length=kv_length,
            **options,
        )  # fmt: skip
    if mask_function is not causal_mask_function:
        raise InputError("policies serve plain causal attention; packed sequences and other masks are refused")
    if attention_mask is None:
        return None
    if attention_mask.shape[1] != kv_length:
        raise InputError(f"attention_mask: expected all {kv_length} tokens read so far, got {attention_mask.shape[1]}")
    if bool(attention_mask.all()):
        return None
    if bool((attention_mask[:, 1:] < attention_mask[:, :-1]).any()):
        raise InputError("attention_mask: expected padding at the left only; set tokenizer.padding_side = 'left'")
    return attention_mask[:, -q_length:]
