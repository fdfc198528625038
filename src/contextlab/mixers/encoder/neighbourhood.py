"""Neighbourhood attention for encoders."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.mixers.encoder.attention import EncoderAttention
from contextlab.mixers.softmax.base import Tokens
from contextlab.ops.neighbourhood import neighbourhood_attention
from contextlab.registry import register


@register(
    "mixer",
    "neighbourhood_attention",
    family="encoder",
    papers=("2204.07143", "2209.15001", "2403.04690"),
    cases=({"window": 9}, {"window": 6, "dilation": 2, "kv_heads": 2}, {"window": 20, "position": "none"}),
)
class NeighbourhoodAttention(EncoderAttention):
    """Softmax attention of every token to the same number of nearest ones, to either side; for encoders.

    width: size of a token's vector.
    window: tokens that each one sees; at the ends of the sequence the window is shifted inwards.
    dilation: steps between them.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads.
    head_dim: size of a head; default width / heads.
    position: rotary (rope) or none.
    rope_base: base of the rotary frequencies.
    """

    causal: ClassVar[bool] = False

    def __init__(
        self,
        width: PositiveInt,
        *,
        window: PositiveInt = 31,
        dilation: PositiveInt = 1,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(
            width, heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=position, rope_base=rope_base
        )
        self.near, self.dilation = window, dilation

    def _score(self, new: Tokens, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        start = None if k_position is None else (k_position < 0).sum(1)
        return neighbourhood_attention(new.q, k, v, self.near, self.dilation, start)

    def _pairs(self, length: int) -> int:
        return length * min(self.near, length)
