"""Attention that reads blocks of keys, chosen by a score of the block (MoBA, landmarks)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from contextlab.mixers.softmax.base import AttentionOptions, Tokens
from contextlab.mixers.sparse.base import SparseAttention
from contextlab.ops.softmax import resolve_positions
from contextlab.ops.sparse import (
    block_means,
    block_topk,
    landmark_attention,
)
from contextlab.registry import register


@register(
    "mixer",
    "moba",
    family="sparse",
    papers=("2502.13189",),
    cases=({"block": 5, "top_k": 2}, {"block": 8, "top_k": 3, "kv_heads": 1}, {"block": 1, "top_k": 1}),
)
class MixtureOfBlocks(SparseAttention):
    """MoBA: each query reads its own block and the blocks whose mean keys fit it best.

    width: size of a token's vector.
    block: tokens of a block.
    top_k: blocks that a query reads, its own among them.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads.
    head_dim: size of a head; default width / heads.
    position: rotary (rope) or none.
    rope_base: base of the rotary frequencies.
    """

    summaries = True

    def __init__(
        self,
        width: PositiveInt,
        *,
        block: PositiveInt = 64,
        top_k: PositiveInt = 3,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(
            width,
            AttentionOptions(heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=position, rope_base=rope_base),
            block,
        )
        self.top_k = top_k

    def _score(self, new: Tokens, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        return block_topk(new.q, k, v, self.block, self.top_k, q_position=q_position, k_position=k_position)

    def _reads(self, length: int) -> int:
        return self.block * self.top_k


@register(
    "mixer",
    "landmark",
    family="sparse",
    papers=("2305.16300",),
    cases=(
        {"block": 4},
        {"block": 6, "top_k": 1, "kv_heads": 2},
        {"block": 1, "top_k": 2},
        {"block": 5, "position": "none"},
    ),
)
class LandmarkAttention(SparseAttention):
    """Landmark attention: a past block weighs what its landmark weighs, and its tokens share that by their own scores.

    In the paper a landmark is a token of its own, put after every block of the text; here, where no token can be added,
    its key is the mean of its block's keys times a gain that each head learns.

    width: size of a token's vector.
    block: tokens of a block.
    top_k: past blocks that a query reads; None for all.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads.
    head_dim: size of a head; default width / heads.
    position: rotary (rope) or none.
    rope_base: base of the rotary frequencies.
    """

    summaries = True

    def __init__(
        self,
        width: PositiveInt,
        *,
        block: PositiveInt = 64,
        top_k: PositiveInt | None = None,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(
            width,
            AttentionOptions(heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=position, rope_base=rope_base),
            block,
        )
        self.top_k = top_k
        self.landmark = nn.Parameter(torch.ones(self.kv_heads, 1))

    def _score(self, new: Tokens, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        q_at, k_at = resolve_positions(new.q, k, q_position, k_position)
        landmarks = block_means(k, k_at, self.block) * self.landmark
        return landmark_attention(new.q, k, v, landmarks, self.block, self.top_k, q_position=q_at, k_position=k_at)

    def _reads(self, length: int) -> int:
        return length if self.top_k is None else self.block * (self.top_k + 1)
