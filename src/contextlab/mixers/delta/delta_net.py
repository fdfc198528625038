"""Delta-rule mixers: DeltaNet and Gated DeltaNet."""

from __future__ import annotations

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.base import head_size
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.layers import RMSNorm, initial_dt_bias
from contextlab.mixers.matrix import MatrixMixer, recurrent
from contextlab.ops.delta import delta_rule_flops, gated_delta_rule
from contextlab.ops.precision import unit_length
from contextlab.registry import register
from contextlab.state import State


@register(
    "mixer",
    "delta_net",
    family="delta",
    papers=("2406.06484", "2411.12537"),
    cases=({}, {"heads": 2, "head_dim": 4, "expand_v": 2, "allow_neg_eigval": True}, {"short_conv": 0}),
)
class DeltaNet(MatrixMixer):
    """DeltaNet: each token corrects what the state answers to its key, with a learned strength.

    width: size of a token's vector.
    heads: number of heads.
    head_dim: size of a head's key; default width / heads.
    expand_v: size of a head's value over that of its key.
    short_conv: width of the causal convolution before q, k and v; 0 for none.
    allow_neg_eigval: strengths up to 2 instead of 1, so that the state's transition can have negative
        eigenvalues.
    """

    tells_mixing = True

    gated = False

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
        expand_v: PositiveInt = 1,
        short_conv: NonNegativeInt = 4,
        allow_neg_eigval: bool = False,
    ) -> None:
        key = head_size(width, heads) if head_dim is None else head_dim
        value = key * expand_v
        # q, k, v; the strength of each head; then, when gated, the output gate and the decay of each head
        parts = [heads * key, heads * key, heads * value, heads] + self.gated * [heads * value, heads]
        super().__init__(width, heads, key, value, sum(parts), sum(parts[:3]), short_conv)
        self.parts = parts
        self.strongest = 2.0 if allow_neg_eigval else 1.0
        self.norm = RMSNorm(value, eps=1e-6)
        self._project_out(heads * value)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. At padding k and v are zero, so that the state stays as it started."""
        before = recurrent(state)
        projected = self.in_proj(without_padding(x, mask))
        qkv, *rest = projected.split((self.conv_channels, *self.parts[3:]), -1)
        qkv, conv = self._convolved(qkv, before, keep_state, "silu")
        qk, v = qkv.split((2 * self.parts[0], self.parts[2]), -1)
        qk = qk.unflatten(-1, (2, self.heads, self.key))
        q, k = unit_length(qk).unbind(2)
        v = v.unflatten(-1, (self.heads, self.value))
        q, k, v, beta = self.sites(q=q, k=k, v=v, beta=rest[0].sigmoid() * self.strongest)
        g = self._decay(rest)
        g = g if g is None else self.site("g", g)
        initial = None if before is None else before["matrix"]
        o, matrix = gated_delta_rule(q, k, v, g, beta, None, initial, keep_state)
        o = self.norm(self.site("heads", o)).flatten(2)
        o = o * F.silu(rest[1]) if self.gated else o
        return self._answer(o, x), self._kept(x, before, matrix, conv) if keep_state else None

    def _decay(self, rest: list[Tensor]) -> Tensor | None:
        return None

    def _op_flops(self, length: int) -> int:
        return delta_rule_flops(length, self.heads, self.key, self.value)


@register(
    "mixer",
    "gated_delta_net",
    family="delta",
    papers=("2412.06464", "2411.12537"),
    cases=({}, {"heads": 2, "head_dim": 4, "expand_v": 2, "allow_neg_eigval": True}, {"short_conv": 0}),
)
class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet: the delta rule on a state that also decays by a learned rate, with a gated output.

    width: size of a token's vector.
    heads: number of heads.
    head_dim: size of a head's key; default width / heads.
    expand_v: size of a head's value over that of its key (the paper's models use 2).
    short_conv: width of the causal convolution before q, k and v; 0 for none.
    allow_neg_eigval: strengths up to 2 instead of 1, so that the state's transition can have negative
        eigenvalues.
    """

    gated = True

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
        expand_v: PositiveInt = 1,
        short_conv: NonNegativeInt = 4,
        allow_neg_eigval: bool = False,
    ) -> None:
        super().__init__(width, heads, head_dim, expand_v, short_conv, allow_neg_eigval)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(initial_dt_bias(heads))

    def _decay(self, rest: list[Tensor]) -> Tensor | None:
        """g = -exp(A_log) softplus(a + dt_bias) (2412.06464, as Mamba-2's)."""
        return -self.A_log.exp() * F.softplus(rest[2] + self.dt_bias)
