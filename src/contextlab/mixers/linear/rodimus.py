"""Rodimus: linear attention with data-dependent tempered selection."""

from __future__ import annotations

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.convolution import without_padding
from contextlab.mixers.gates import softplus_power
from contextlab.mixers.layers import Linear, multiplications
from contextlab.mixers.linear.gla import ChannelDecayMixer
from contextlab.mixers.matrix import recurrent
from contextlab.ops.gla import gla
from contextlab.ops.precision import unit_length, with_room
from contextlab.registry import register
from contextlab.state import State


@register(
    "mixer",
    "rodimus",
    family="linear",
    papers=("2410.06577",),
    cases=({}, {"state_size": 5, "expand": 1, "gate_rank": 2}, {"short_conv": 0}),
)
class Rodimus(ChannelDecayMixer):
    """Rodimus: one wide head of linear attention that forgets and writes by one tempered gate for each key channel.

    With the gate g = softplus(W_g u) and its temperature tau = sigmoid(W_tau u), u the convolved input, what was kept
    decays by exp(-g tau) and the unit key is scaled by g^tau; the values pass an input gate of low rank.

    width: size of a token's vector.
    state_size: size of the key, the rows of the state.
    expand: size of the value over width.
    gate_rank: rank of the map to the input gate.
    short_conv: width of the causal convolution, with SiLU, before q, k and the gates; 0 for neither.
    """

    tells_mixing = True

    def __init__(
        self,
        width: PositiveInt,
        state_size: PositiveInt = 64,
        expand: PositiveInt = 2,
        gate_rank: PositiveInt = 16,
        short_conv: NonNegativeInt = 4,
    ) -> None:
        inner = expand * width
        super().__init__(width, 1, state_size, inner, 2 * inner, inner, short_conv)
        self.select_proj = Linear(inner, 4 * state_size, bias=True)  # q, k, the gate and its temperature
        self.gate_in, self.gate_out = Linear(inner, gate_rank), Linear(gate_rank, inner, bias=True)
        self.residual = nn.Parameter(torch.ones(inner))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self._project_out(inner)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. At padding the values are zero, so that the state stays as it started."""
        before = recurrent(state)
        up, gate = self.in_proj(without_padding(x, mask)).chunk(2, -1)
        shifted, conv = self._convolved(up, before, keep_state, "silu" if self.conv_size else None)
        q, k, g, tau = with_room(self.select_proj(shifted.to(up.dtype))).chunk(4, -1)
        tau = tau.sigmoid()
        k = unit_length(k, eps=1e-12) * softplus_power(g, tau)
        g = F.softplus(g)
        v = with_room(self.gate_out(self.gate_in(up)).sigmoid() * up)
        initial = None if before is None else before["matrix"]
        q, k, v, decay = (y.unsqueeze(2) for y in (q, k, v, -g * tau))
        q, k, v, decay = self.sites(q=q, k=k, v=v, g=decay)
        o, matrix = gla(q, k, v, decay, None, initial, keep_state)
        o = (self.site("heads", o).squeeze(2) + shifted * self.residual) * F.silu(gate)
        y = self._answer(F.rms_norm(o, o.shape[-1:], eps=1e-5) * self.norm_weight, x)
        return y, self._kept(x, before, matrix, conv) if keep_state else None

    def _gate_products(self) -> int:
        return sum(multiplications(layer) for layer in (self.select_proj, self.gate_in, self.gate_out))
