"""Mamba-2."""

from __future__ import annotations

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.convolution import ShortConv, without_padding
from contextlab.mixers.layers import initial_dt_bias
from contextlab.mixers.matrix import MatrixMixer, recurrent
from contextlab.mixers.state_space.base import heads_and_size
from contextlab.ops.linear import ssd
from contextlab.registry import register
from contextlab.state import RecurrentState, State


@register(
    "mixer",
    "mamba2",
    family="state space",
    papers=("2405.21060",),
    cases=(
        {"state_size": 8},
        {"heads": 6, "state_size": 5, "groups": 2, "short_conv": 3},
        {"short_conv": 0},
        {"head_dim": 12, "state_size": 4, "expand": 1, "groups": 2},
    ),
)
class Mamba2(MatrixMixer):
    """Mamba-2: a state-space model whose scalar decay, writing and reading depend on the token.

    width: size of a token's vector.
    heads: number of heads, a divisor of expand * width; default 4, or what head_dim gives.
    head_dim: size of a head; default expand * width / heads.
    state_size: N, the size of B and C, the keys and queries of the state.
    expand: inner size over width.
    groups: heads of a group share B and C, and are normalised together; a divisor of heads.
    short_conv: width of the causal convolution before x, B and C; 0 for none.
    """

    tells_mixing = True

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        state_size: PositiveInt = 64,
        expand: PositiveInt = 2,
        groups: PositiveInt = 1,
        short_conv: NonNegativeInt = 4,
    ) -> None:
        inner = expand * width
        heads, value = heads_and_size(inner, heads, head_dim, groups)
        channels = inner + 2 * groups * state_size
        super().__init__(width, heads, state_size, value, inner + channels + heads, channels, short_conv)
        self.inner, self.groups = inner, groups
        self.conv = ShortConv(channels, short_conv, bias=True) if short_conv else None
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.dt_bias = nn.Parameter(initial_dt_bias(heads))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self._project_out(inner)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. At padding the values are zero, so that the state stays as it started."""
        before = recurrent(state)
        z, values, dt, B, C, conv = self._parts(without_padding(x, mask), before, keep_state)
        C, B, values, dt = self.sites(q=C, k=B, v=without_padding(values, mask), dt=dt)
        matrix = None if before is None else before["matrix"]
        o, matrix = ssd(values, dt, -self.A_log.exp(), B, C, self.D, matrix, keep_state)
        gated = (self.site("heads", o).flatten(2) * F.silu(z)).unflatten(-1, (self.groups, -1))
        y = F.rms_norm(gated, gated.shape[-1:], eps=1e-5).flatten(2) * self.norm_weight
        return self._answer(y, x), self._kept(x, before, matrix, conv) if keep_state else None

    def _parts(
        self, x: Tensor, before: RecurrentState | None, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Gate z [B, T, inner], values [B, T, H, V], dt [B, T, H], B and C [B, T, G, N], the convolution's state."""
        z, xBC, dt = self.in_proj(x).split((self.inner, self.conv_channels, self.heads), -1)
        xBC, conv = self._convolved(xBC, before, keep, "silu")
        BC = self.groups * self.key
        values, B, C = xBC.split((self.inner, BC, BC), -1)
        B, C = (each.unflatten(-1, (self.groups, self.key)) for each in (B, C))
        return z, values.unflatten(-1, (self.heads, self.value)), F.softplus(dt + self.dt_bias), B, C, conv
