"""Softmax attention behind a Fourier analysis layer."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.mixers.layers import Linear, multiplications
from contextlab.mixers.softmax.base import AttentionMixer, AttentionOptions
from contextlab.registry import register


@register(
    "mixer",
    "fan_attention",
    family="softmax",
    papers=("2502.21309", "2410.02675"),
    cases=(
        {},
        {"share": 0.1, "kv_heads": 2, "phase": True, "qk_norm": True},
        {"share": 0.5, "heads": 3, "position": "alibi", "bias": True},
        {"share": 0.4, "heads": 2, "head_dim": 5, "position": "none"},
    ),
)
class FanAttention(AttentionMixer):
    """FANformer's attention (ATF): queries, keys and values are read from waves of the token beside a linear map.

    They are projections of [cos(W_p x), sin(W_p x), W x + b], as wide as x: the Fourier analysis layer without its
    nonlinearity. W_p has int(share width) rows, so that twice as many outputs are periodic.

    width: size of a token's vector.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads.
    head_dim: size of a head; default width / heads.
    share: cosines over all outputs of the layer, at most 0.5; sines are as many.
    phase: whether W_p has a bias too, as in the authors' code; the paper's formula has none.
    position: rotary (rope), a linear bias by distance (alibi), or none (absolute positions are the model's).
    rope_base: base of the rotary frequencies.
    qk_norm: RMS-normalise queries and keys in each head, before the rotation.
    bias: whether the projections behind the layer have biases.
    """

    policies_may_serve: ClassVar[bool] = True

    def __init__(
        self,
        width: PositiveInt,
        *,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        share: Annotated[float, Field(gt=0, le=0.5)] = 0.25,
        phase: bool = False,
        position: Literal["rope", "alibi", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
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
                qk_norm=qk_norm,
                bias=bias,
            ),
        )
        self.waves = int(share * width + 1e-4)  # so that 6 x 0.333333 gives 2
        if self.waves == 0:
            raise InputError(
                f"share {share} of width {width} is less than one cosine; the nearest that fits is {1 / width:g}"
            )
        self.fan_proj = Linear(width, width - self.waves)  # rows: of W_p, then of W
        linear = width - 2 * self.waves
        self.fan_bias = nn.Parameter(torch.zeros(linear)) if linear else None
        self.fan_phase = nn.Parameter(torch.zeros(self.waves)) if phase else None

    def _read_in(self, x: Tensor) -> Tensor:
        """[cos(W_p x), sin(W_p x), W x + b]. x: [B, T, width] -> [B, T, width]."""
        angle, rest = self.fan_proj(x).split((self.waves, self.width - 2 * self.waves), -1)
        if self.fan_phase is not None:
            angle = angle + self.fan_phase
        if self.fan_bias is not None:
            rest = rest + self.fan_bias
        return torch.cat((angle.cos(), angle.sin(), rest), -1)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        return super().flops(length) + 2 * length * multiplications(self.fan_proj)
