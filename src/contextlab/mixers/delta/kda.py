"""Kimi delta attention: the gated delta rule with a decay for each channel."""

from __future__ import annotations

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.base import head_size
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.layers import Linear, RMSNorm, initial_dt_bias, multiplications
from contextlab.mixers.matrix import MatrixMixer, recurrent
from contextlab.ops.dplr import kda, kda_flops
from contextlab.ops.precision import unit_length
from contextlab.registry import register
from contextlab.state import State


@register(
    "mixer",
    "kda",
    family="delta",
    papers=("2510.26692", "2411.12537"),
    cases=({}, {"heads": 2, "head_dim": 4, "expand_v": 2, "allow_neg_eigval": True}, {"short_conv": 0, "gate_rank": 3}),
)
class KimiDeltaAttention(MatrixMixer):
    """Kimi delta attention: the delta rule on a state whose every channel decays by a learned rate, gated output.

    width: size of a token's vector.
    heads: number of heads.
    head_dim: size of a head's key; default width / heads.
    expand_v: size of a head's value over that of its key.
    gate_rank: rank of the maps to the decays and to the output gate; default the size of a head's value.
    short_conv: width of the causal convolution before q, k and v; 0 for none.
    allow_neg_eigval: strengths up to 2 instead of 1, so that the state's transition can have negative eigenvalues.
    """

    tells_mixing = True

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
        expand_v: PositiveInt = 1,
        gate_rank: PositiveInt | None = None,
        short_conv: NonNegativeInt = 4,
        allow_neg_eigval: bool = False,
    ) -> None:
        key = head_size(width, heads) if head_dim is None else head_dim
        value = key * expand_v
        rank = value if gate_rank is None else gate_rank
        keys, values = heads * key, heads * value
        # q, k, v; the strength of each head; then the low-rank parts of the decays and of the output gate
        parts = [2 * keys + values, heads, rank, rank]
        super().__init__(width, heads, key, value, sum(parts), parts[0], short_conv)
        self.parts = parts
        self.strongest = 2.0 if allow_neg_eigval else 1.0
        self.decay_proj = Linear(rank, keys)
        self.gate_proj = Linear(rank, values)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(initial_dt_bias(keys))
        self.norm = RMSNorm(value, eps=1e-5)
        self._project_out(values)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. At padding k and v are zero, so that the state stays as it started."""
        before = recurrent(state)
        qkv, beta, decay, gate = self.in_proj(without_padding(x, mask)).split(self.parts, -1)
        qkv, conv = self._convolved(qkv, before, keep_state, "silu")
        qk, v = qkv.split((2 * self.heads * self.key, self.heads * self.value), -1)
        qk = qk.unflatten(-1, (2, self.heads, self.key))
        q, k = unit_length(qk).unbind(2)
        # g = -exp(A) softplus(f + bias), as in Mamba-2 but for each channel
        g = F.softplus(self.decay_proj(decay) + self.dt_bias).unflatten(-1, (self.heads, self.key))
        v, g = v.unflatten(-1, (self.heads, self.value)), g * -self.A_log.exp().unsqueeze(-1)
        q, k, v, g, beta = self.sites(q=q, k=k, v=v, g=g, beta=beta.sigmoid() * self.strongest)
        o, matrix = kda(q, k, v, g, beta, None, None if before is None else before["matrix"], keep_state)
        o = self.norm(self.site("heads", o)).flatten(2) * self.gate_proj(gate).sigmoid()
        return self._answer(o, x), self._kept(x, before, matrix, conv) if keep_state else None

    def _op_flops(self, length: int) -> int:
        gates = multiplications(self.decay_proj) + multiplications(self.gate_proj)
        return kda_flops(length, self.heads, self.key, self.value) + 2 * length * gates
