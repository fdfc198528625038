"""Attention that chooses single keys: the best scored, or those of a query's cluster."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.layers import with_loss
from contextlab.mixers.softmax.base import AttentionOptions, Tokens
from contextlab.mixers.sparse.base import SparseAttention
from contextlab.ops.precision import unit_length
from contextlab.ops.sparse import (
    routing_attention,
    topk_attention,
)
from contextlab.registry import register
from contextlab.state import State


@register(
    "mixer",
    "topk_attention",
    family="sparse",
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
        *,
        top_k: PositiveInt = 16,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(
            width,
            AttentionOptions(heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=position, rope_base=rope_base),
        )
        self.top_k = top_k

    def _score(self, new: Tokens, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        return topk_attention(new.q, k, v, self.top_k, q_position=q_position, k_position=k_position)

    def _pairs(self, length: int) -> int:
        return length * (length + 1) // 2  # every score is needed to know the best


@register(
    "mixer",
    "routing",
    family="sparse",
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
        *,
        clusters: PositiveInt = 8,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
    ) -> None:
        super().__init__(width, AttentionOptions(heads=heads, head_dim=head_dim, position="none"))
        self.centroids = nn.Parameter(F.normalize(torch.randn(heads, clusters, self.head_dim), dim=-1))

    def _attend(self, new: Tokens, state: State | None, keep_state: bool) -> tuple[Tensor, State | None]:
        q, k = (unit_length(y) for y in (new.q, new.k))
        if self.training and torch.is_grad_enabled():
            # Whole sequences only: a mean over pieces would depend on how they are cut.
            q = with_loss(q, self.centroids.sum() * 0 if keep_state else self._distance(torch.cat((q, k), 1).detach()))
        return super()._attend(replace(new, q=q, k=k), state, keep_state)

    def _distance(self, x: Tensor) -> Tensor:
        """The mean squared distance of x [B, T, H, D] to the nearest centroids."""
        nearest = self._products(x).argmax(-1, keepdim=True)  # [B, T, H, 1]
        index = nearest.expand(*nearest.shape[:-1], self.head_dim).unsqueeze(-2)
        mine = self.centroids.expand(*x.shape[:2], -1, -1, -1).gather(-2, index).squeeze(-2)
        return (x - mine).square().sum(-1).mean()

    def _products(self, x: Tensor) -> Tensor:
        """[B, T, H, clusters] of x [B, T, H, D] and the centroids."""
        return torch.einsum("bthd,hcd->bthc", x, self.centroids)

    def _score(self, new: Tokens, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        with torch.no_grad():
            q_cluster, k_cluster = self._products(new.q).argmax(-1), self._products(k).argmax(-1)
        # Scores of unit vectors are at most 1: scaled by the root of the size they can single out a key.
        scale = self.head_dim**0.5
        return routing_attention(
            new.q, k, v, q_cluster, k_cluster, scale=scale, q_position=q_position, k_position=k_position
        )

    def _reads(self, length: int) -> int:
        return -(-length // self.centroids.shape[1])

    def flops(self, length: int) -> int:
        """See `Mixer.flops`; counted as if all clusters were of one size."""
        return super().flops(length) + 4 * length * self.centroids.numel()
