"""Softmax attention to a part of what was read: the best keys, the best blocks, clusters, blocks behind landmarks.

All keys and values stay in the state; what is read of them depends on the query.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.layers import Linear, with_loss
from contextlab.mixers.softmax import Attention
from contextlab.ops.softmax import resolve_positions
from contextlab.ops.sparse import (
    block_means,
    block_topk,
    landmark_attention,
    native_sparse_attention,
    routing_attention,
    topk_attention,
)
from contextlab.registry import register
from contextlab.state import State


class SparseAttention(Attention):
    """Base: attention whose queries read a part of the keys.

    reads: keys that a query reads at most, for counting operations, as a function of how many there are.
    """

    summaries: ClassVar[bool] = False  # whether queries are compared with summaries of blocks first

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None,
        head_dim: int | None,
        position: Literal["rope", "none"],
        rope_base: float,
        block: int = 1,
    ) -> None:
        super().__init__(width, heads, kv_heads, head_dim, position, rope_base)
        self.block = block

    def _reads(self, length: int) -> int:
        """Keys in full that the last of `length` queries reads."""
        raise NotImplementedError

    def _pairs(self, length: int) -> int:
        # In few steps: what the last query of each stretch reads stands for all of it.
        total, first = 0, 0
        while first < length:
            last = min(max(1, 2 * first), length)
            total += (last - first) * min(self._reads(last), last)
            first = last
        summaries = length * (length // self.block) // 2 if self.summaries else 0
        return total + summaries // 2  # keys only: no values are read of them


@register(
    "mixer",
    "topk_attention",
    papers=("2106.06899", "1912.11637"),
    cases=({"top_k": 3}, {"top_k": 1, "kv_heads": 2, "position": "none"}),
)
class TopkAttention(SparseAttention):
    """Softmax attention of each query to its best keys alone.

    width: size of a token's vector.
    top_k: keys that a query reads.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads.
    head_dim: size of a head; default width / heads.
    position: rotary (rope) or none.
    rope_base: base of the rotary frequencies.
    """

    def __init__(
        self,
        width: PositiveInt,
        top_k: PositiveInt = 16,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(width, heads, kv_heads, head_dim, position, rope_base)
        self.top_k = top_k

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        return topk_attention(q, k, v, self.top_k, q_position=q_position, k_position=k_position)

    def _pairs(self, length: int) -> int:
        return length * (length + 1) // 2  # every score is needed to know the best


@register(
    "mixer",
    "moba",
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
        block: PositiveInt = 64,
        top_k: PositiveInt = 3,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(width, heads, kv_heads, head_dim, position, rope_base, block)
        self.top_k = top_k

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        return block_topk(q, k, v, self.block, self.top_k, q_position=q_position, k_position=k_position)

    def _reads(self, length: int) -> int:
        return self.block * self.top_k


@register(
    "mixer",
    "nsa",
    papers=("2502.11089",),
    cases=(
        {"block": 4, "top_k": 2, "window": 6},
        {"block": 8, "top_k": 1, "window": 1, "kv_heads": 1, "position": "none"},
        {"block": 3, "top_k": 3, "window": 5, "kv_heads": 2},
    ),
)
class NativeSparseAttention(SparseAttention):
    """NSA: compressed blocks, the best blocks in full and a window, joined by gates of the token.

    The paper compresses a block by a small network and lets compressed blocks overlap; here, as in public
    implementations, a block is compressed to its mean, and the compressed blocks are those that are chosen from.

    width: size of a token's vector.
    block: tokens of a block.
    top_k: blocks read in full, the query's own among them.
    window: tokens that the near branch sees, the query's own counted.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads. The query heads of a key head choose together.
    head_dim: size of a head; default width / heads.
    position: rotary (rope) or none.
    rope_base: base of the rotary frequencies.
    """

    summaries = True

    def __init__(
        self,
        width: PositiveInt,
        block: PositiveInt = 32,
        top_k: PositiveInt = 4,
        window: PositiveInt = 64,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(width, heads, kv_heads, head_dim, position, rope_base, block)
        self.top_k, self.near = top_k, window
        self.branch_proj = Linear(width, 3 * heads)

    def _biased(
        self, x: Tensor, q: Tensor, k: Tensor, state: State | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # The gates travel with the queries, for `_softmax` sees no x.
        return torch.cat((q, self.branch_proj(x).sigmoid().unflatten(-1, (self.heads, 3))), -1), k

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        q, gates = q.split((self.head_dim, 3), -1)
        return native_sparse_attention(
            q, k, v, gates, self.block, self.top_k, self.near, q_position=q_position, k_position=k_position
        )

    def _reads(self, length: int) -> int:
        return self.block * self.top_k + self.near

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        return super().flops(length) + 2 * length * self.branch_proj.weight.numel()


@register(
    "mixer",
    "landmark",
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
        block: PositiveInt = 64,
        top_k: PositiveInt | None = None,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(width, heads, kv_heads, head_dim, position, rope_base, block)
        self.top_k = top_k
        self.landmark = nn.Parameter(torch.ones(self.kv_heads, 1))

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        q_at, k_at = resolve_positions(q, k, q_position, k_position)
        landmarks = block_means(k, k_at, self.block) * self.landmark
        return landmark_attention(q, k, v, landmarks, self.block, self.top_k, q_position=q_at, k_position=k_at)

    def _reads(self, length: int) -> int:
        return length if self.top_k is None else self.block * (self.top_k + 1)


@register(
    "mixer",
    "routing",
    papers=("2003.05997",),
    cases=({"clusters": 3}, {"clusters": 1, "heads": 2}, {"clusters": 8, "heads": 3, "head_dim": 5}),
)
class RoutingAttention(SparseAttention):
    """Routing attention: each query reads the keys before it that lie nearest to the same centroid.

    Queries and keys are normalised to unit length and belong to the centroid of the largest product
    (2003.05997). In training the centroids are drawn to the queries and keys of their clusters by a k-means term in
    the gradient, in place of the paper's moving averages. The paper's clusters keep the nearest tokens of the whole
    sequence, which looks ahead; see `ops.routing_attention`. Routing is by content: there are no rotary positions.

    width: size of a token's vector.
    clusters: centroids of each head.
    heads: number of heads.
    head_dim: size of a head; default width / heads.
    """

    def __init__(
        self,
        width: PositiveInt,
        clusters: PositiveInt = 8,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
    ) -> None:
        super().__init__(width, heads, None, head_dim, "none", 10000.0)
        self.centroids = nn.Parameter(F.normalize(torch.randn(heads, clusters, self.head_dim), dim=-1))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, mask: Tensor | None, keep_state: bool
    ) -> tuple[Tensor, State | None]:
        q, k = (y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for y in (q, k))
        if self.training and torch.is_grad_enabled():
            # Whole sequences only: a mean over pieces would depend on how they are cut.
            q = with_loss(q, self.centroids.sum() * 0 if keep_state else self._distance(torch.cat((q, k), 1).detach()))
        return super()._attend(q, k, v, state, mask, keep_state)

    def _distance(self, x: Tensor) -> Tensor:
        """The mean squared distance of x [B, T, H, D] to the nearest centroids."""
        nearest = self._products(x).argmax(-1, keepdim=True)  # [B, T, H, 1]
        index = nearest.expand(*nearest.shape[:-1], self.head_dim).unsqueeze(-2)
        mine = self.centroids.expand(*x.shape[:2], -1, -1, -1).gather(-2, index).squeeze(-2)
        return (x - mine).square().sum(-1).mean()

    def _products(self, x: Tensor) -> Tensor:
        """[B, T, H, clusters] of x [B, T, H, D] and the centroids."""
        return torch.einsum("bthd,hcd->bthc", x, self.centroids)

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        with torch.no_grad():
            q_cluster, k_cluster = self._products(q).argmax(-1), self._products(k).argmax(-1)
        # Scores of unit vectors are at most 1: scaled by the root of the size they can single out a key.
        scale = self.head_dim**0.5
        return routing_attention(
            q, k, v, q_cluster, k_cluster, scale=scale, q_position=q_position, k_position=k_position
        )

    def _reads(self, length: int) -> int:
        return -(-length // self.centroids.shape[1])

    def flops(self, length: int) -> int:
        """See `Mixer.flops`; clusters of equal size are taken."""
        return super().flops(length) + 4 * length * self.centroids.numel()
