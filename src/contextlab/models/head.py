"""One prediction for a whole sequence, from the vectors of its tokens: what a classifier reads out."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from contextlab.errors import InputError, unknown
from contextlab.mixers.layers import Linear, multiplications
from contextlab.models.lama import LowRankPooling

Pool = Literal["mean", "first", "last", "attention"]


class PooledHead(nn.Module):
    """Pool a sequence's token vectors into one, and predict from it by a linear map.

    width: size of a token's vector.
    output_size: of the prediction, for example the number of classes.
    pool: "mean" of the real tokens; "first" real token, for encoders, where it has seen all (BERT's [CLS]); "last",
        for causal models, where only it has; "attention" by learned weights (LAMA).
    """

    def __init__(self, width: int, output_size: int, pool: Pool = "mean") -> None:
        super().__init__()
        if pool not in get_args(Pool):
            raise InputError(unknown("pool", pool, get_args(Pool)))
        self.pool = pool
        self.attention = LowRankPooling(width) if pool == "attention" else None
        self.read_out = Linear(width, output_size, bias=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: [B, T, width], T >= 1. mask: [B, T] bool, False at left padding. Returns [B, output_size].

        A row with padding alone has the mean 0, and its padding's vector as first and last.
        """
        return self.read_out(self.pooled(x, mask))

    def matrices(self) -> int:
        """Multiply-adds for one sequence beyond those for each of its tokens."""
        merge = 0 if self.attention is None else multiplications(self.attention.merge)
        return multiplications(self.read_out) + merge

    def pooled(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The one vector of each sequence, [B, width]."""
        if x.ndim != 3 or not x.shape[1]:
            raise InputError(f"pooled head: expected [B, T, D] with at least one token, got {list(x.shape)}")
        if self.attention is not None:
            return self.attention(x, mask)
        if self.pool == "last":
            return x[:, -1]
        if mask is None:
            return x[:, 0] if self.pool == "first" else x.mean(1)
        if self.pool == "first":
            first = (~mask).sum(1).clamp_max(x.shape[1] - 1)
            return x[torch.arange(len(x), device=x.device), first]
        total = x.masked_fill(~mask.unsqueeze(-1), 0).sum(1)
        return total / mask.sum(1, keepdim=True).clamp_min(1)
