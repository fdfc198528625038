"""Mamba: a selective scan with a few states for each channel."""

from __future__ import annotations

import math

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.convolution import without_padding
from contextlab.mixers.elementwise import ElementwiseMixer
from contextlab.mixers.layers import Linear, initial_dt_bias, multiplications
from contextlab.ops.precision import with_room
from contextlab.ops.scan import selective_scan
from contextlab.registry import register


@register(
    "mixer",
    "mamba",
    family="state space",
    papers=("2312.00752",),
    cases=({"state_size": 4}, {"state_size": 3, "expand": 1, "dt_rank": 2, "short_conv": 3}, {"short_conv": 0}),
)
class Mamba(ElementwiseMixer):
    """Mamba: a diagonal state-space model whose step size, writing and reading depend on the token.

    width: size of a token's vector.
    state_size: N, values of the state in each channel.
    expand: channels over width.
    dt_rank: rank of the map to the step sizes; default width / 16, rounded up.
    short_conv: width of the causal convolution before the scan; 0 for none.
    """

    activation = "silu"

    def __init__(
        self,
        width: PositiveInt,
        state_size: PositiveInt = 16,
        expand: PositiveInt = 2,
        dt_rank: PositiveInt | None = None,
        short_conv: NonNegativeInt = 4,
    ) -> None:
        inner = expand * width
        super().__init__(width, inner, 2 * inner, short_conv, conv_bias=True)
        self.state_size, self.dt_rank = state_size, math.ceil(width / 16) if dt_rank is None else dt_rank
        self.x_proj = Linear(inner, self.dt_rank + 2 * state_size)
        self.dt_proj = Linear(self.dt_rank, inner, bias=True)
        with torch.no_grad():
            self.dt_proj.bias.copy_(initial_dt_bias(inner))
        self.A_log = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))

    def _recur(self, projected: Tensor, h: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        x, gate = projected.chunk(2, -1)
        x = without_padding(x if self.conv is not None else F.silu(x), mask)
        low, B, C = self.x_proj(x).split((self.dt_rank, self.state_size, self.state_size), -1)
        y, h = selective_scan(with_room(x), F.softplus(self.dt_proj(low)), -self.A_log.exp(), B, C, self.D, h, True)
        assert h is not None
        return y * F.silu(gate), h

    def _state_shape(self) -> tuple[int, ...]:
        return (self.inner, self.state_size)

    def _products(self) -> int:
        return multiplications(self.x_proj) + multiplications(self.dt_proj) + 3 * self.inner * self.state_size
