"""The mathematics: pure functions on tensors in the layout [batch, time, heads, dim]."""

from __future__ import annotations

from contextlab.ops.position import alibi_slopes, rope, rope_table, rotary_size, rotate, sinusoidal
from contextlab.ops.softmax import naive_softmax_attention, softmax_attention

__all__ = [
    "alibi_slopes",
    "naive_softmax_attention",
    "rope",
    "rope_table",
    "rotary_size",
    "rotate",
    "sinusoidal",
    "softmax_attention",
]
