"""An MLP of look-ups: hash tables in place of both matrices (MemoryFormer)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.models.mlp import Mlp
from contextlab.ops.linear import working_dtype
from contextlab.registry import register

Score = Literal["product", "probability"]
MOST_BITS = 16


class LookUp(nn.Module):
    """A sum of learned rows, one from each table, in place of a matrix product.

    The input is cut into `tables` pieces z of `bits` values. The signs of a piece are the number of a row, and the row
    counts with p = exp(<z, s>) / sum over all sign vectors r of exp(<z, r>), the softmax share of its signs s
    ("probability"), or with p <z, s> ("product"). Gradients reach z through that weight alone.

    tables, bits: the input has tables x bits values. outputs: size of a row. score: how a row counts.
    """

    def __init__(self, tables: int, bits: int, outputs: int, score: Score) -> None:
        super().__init__()
        self.tables, self.bits, self.score = tables, bits, score
        # So that the sum is about as large as one row of normal values, for the weights of "product" are near 1.
        self.weight = nn.Parameter(torch.randn(tables, 2**bits, outputs) * tables**-0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("place", 2 ** torch.arange(bits), persistent=False)
        self.register_buffer("first", 2**bits * torch.arange(tables), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., tables x bits] -> [..., outputs]."""
        z = x.unflatten(-1, (self.tables, self.bits))
        row = ((z >= 0) * self.place).sum(-1) + self.first
        size = z.abs().to(working_dtype(x.dtype))
        weight = F.logsigmoid(2 * size).sum(-1).exp()  # 1 / prod(1 + exp(-2 |z|)), the softmax share
        if self.score == "product":
            weight = weight * size.sum(-1)
        y = F.embedding_bag(
            row.flatten(0, -2),
            self.weight.flatten(0, 1),
            per_sample_weights=weight.flatten(0, -2).to(self.weight.dtype),
            mode="sum",
        )
        return (y + self.bias).to(x.dtype).view(*x.shape[:-1], -1)


@register(
    "mlp",
    "memory_lookup",
    family="memory",
    papers=("2411.12992",),
    cases=(
        {},
        {"bits": 3, "extra_bits": 0, "ratio": 2.0},
        {"bits": 4, "extra_bits": 1, "score": "probability"},
    ),
)
class MemoryLookUp(Mlp):
    """MemoryFormer's feed-forward block: two layers of hash-table look-ups with a LayerNorm between, no matrix at all.

    Each layer cuts its input into pieces of a few values, takes the signs of a piece as the number of a row in that
    piece's table, and adds the rows, weighted by how large the values are, so that there is a gradient. A row has no
    neighbours, so that outputs jump where a value changes its sign. `flops` counts matrix products: 0.

    The formulas are those of the authors' code (the paper's own were not at hand): pieces are hashed without a
    projection; of the two scores that it has, "product" is the one it runs, "probability" stands beside it. Tables
    start with the standard deviation tables^-0.5, there 0.02.

    width: size of a token's vector.
    ratio: hidden width over `width`, rounded to whole pieces; the authors' models have 1.25, which keeps as many tables
        in the second layer as in the first.
    bits: values of a piece in the first layer, a divisor of width; default the largest up to 8.
    extra_bits: further values of a piece in the second layer.
    score: how a row counts: by the softmax share of its signs (probability), or that times the sum of the values'
        sizes (product).
    """

    def __init__(
        self,
        width: PositiveInt,
        ratio: PositiveFloat = 1.25,
        bits: Annotated[int, Field(ge=1, le=MOST_BITS)] | None = None,
        extra_bits: NonNegativeInt = 2,
        score: Score = "product",
    ) -> None:
        super().__init__(width)
        fits = [n for n in range(1, MOST_BITS + 1) if width % n == 0]
        if bits is None:
            bits = max(n for n in fits if n <= 8)
        if width % bits:
            nearest = min(fits, key=lambda n: abs(n - bits))
            raise InputError(f"bits {bits} does not divide width {width}; the nearest that does is {nearest}")
        if bits + extra_bits > MOST_BITS:
            raise InputError(
                f"a table of 2^{bits + extra_bits} rows is too large: expected bits + extra_bits up to {MOST_BITS}; "
                f"the nearest extra_bits that fits is {MOST_BITS - bits}"
            )
        tables = max(1, round(width * ratio / (bits + extra_bits)))
        hidden = tables * (bits + extra_bits)
        self.up = LookUp(width // bits, bits, hidden, score)
        self.norm = nn.LayerNorm(hidden)
        self.out_proj = LookUp(tables, bits + extra_bits, width, score)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, width] -> [B, T, width]."""
        y: Tensor = self.out_proj(self.norm(self.up(x)))
        return y

    def flops(self, length: int) -> int:
        """See `Mlp.flops`: there is no matrix product."""
        return 0
