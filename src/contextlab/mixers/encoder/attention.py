"""Softmax attention that reads both ways."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.mixers.softmax.base import AttentionMixer, AttentionOptions, Tokens
from contextlab.ops.softmax import softmax_attention
from contextlab.registry import register
from contextlab.state import State


@register(
    "mixer",
    "encoder_attention",
    family="encoder",
    papers=("1706.03762", "1810.04805"),
    cases=(
        {},
        {"kv_heads": 2, "head_dim": 8, "rope_fraction": 0.5, "bias": True},
        {"heads": 3, "position": "none", "qk_norm": True},
        {"position": "alibi", "heads": 6},
    ),
)
class EncoderAttention(AttentionMixer):
    """Softmax attention of every token to every token, as in BERT: the reference of the encoders.

    width: size of a token's vector.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads (multi-head), 1 is multi-query.
    head_dim: size of a head; default width / heads.
    position: rotary (rope), a linear bias by distance to either side (alibi), or none (positions are the model's).
    rope_base: base of the rotary frequencies.
    rope_fraction: part of each head's dimensions that is rotated.
    qk_norm: RMS-normalise queries and keys in each head, before the rotation.
    bias: whether the projections have biases.
    """

    causal: ClassVar[bool] = False

    def __init__(
        self,
        width: PositiveInt,
        *,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "alibi", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
        rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
        qk_norm: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(
            width,
            AttentionOptions(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                position=position,
                rope_base=rope_base,
                rope_fraction=rope_fraction,
                qk_norm=qk_norm,
                bias=bias,
            ),
        )

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Encoder.forward`."""
        return super().forward(x, None, mask, keep_state=False)

    def _score(self, new: Tokens, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        return softmax_attention(
            new.q,
            k,
            v,
            scale=self.head_dim**-0.5,
            causal=False,
            slopes=self.slopes,
            q_position=q_position,
            k_position=k_position,
        )

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """0: an encoder holds nothing."""
        return 0

    def _pairs(self, length: int) -> int:
        return length**2
