"""Softmax attention whose positions depend on the content."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from contextlab.mixers.softmax.base import AttentionMixer, AttentionOptions, Tokens
from contextlab.ops.contextual import cope_attention
from contextlab.registry import register


@register(
    "mixer",
    "cope_attention",
    family="softmax",
    papers=("2405.18719",),
    cases=({"positions": 8}, {"kv_heads": 2, "positions": 64}, {"heads": 2, "head_dim": 5, "positions": 1}),
)
class CopeAttention(AttentionMixer):
    """Contextual position encoding (CoPE): a query counts the keys that its gates open for, not the tokens.

    The gate of key j for query i is sigmoid(q_i k_j / sqrt(d)), the position of j the sum of the gates from j to i, and
    q_i times the embedding of that position, interpolated between whole numbers, is added to the score. So "the third
    verb back" can be a position.

    width: size of a token's vector.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads.
    head_dim: size of a head; default width / heads.
    positions: embeddings; farther keys have the last one.
    """

    def __init__(
        self,
        width: PositiveInt,
        *,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        positions: PositiveInt = 64,
    ) -> None:
        super().__init__(width, AttentionOptions(heads=heads, kv_heads=kv_heads, head_dim=head_dim, position="none"))
        self.position_embedding = nn.Parameter(torch.zeros(positions, self.head_dim))

    def _score(self, new: Tokens, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        return cope_attention(new.q, k, v, self.position_embedding, q_position=q_position, k_position=k_position)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`; the products of queries and positions beside those of attention."""
        return super().flops(length) + 2 * length * self.heads * self.position_embedding.numel()
