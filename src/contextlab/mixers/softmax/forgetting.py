"""Forgetting attention: scores that fall by forget gates."""

from __future__ import annotations

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.mixers.convolution import without_padding
from contextlab.mixers.layers import Linear
from contextlab.mixers.softmax.base import AttentionMixer, AttentionOptions, Tokens
from contextlab.registry import register
from contextlab.state import KVState, State, tensor_bytes


@register(
    "mixer",
    "forgetting_attention",
    family="softmax",
    papers=("2503.02130",),
    cases=({}, {"heads": 3, "head_dim": 4, "qk_norm": True}, {"short_conv": 3, "output_gate": True}),
)
class ForgettingAttention(AttentionMixer):
    """Forgetting attention (FoX): softmax attention whose scores fall by the forget gates between key and query.

    The score of key j for query i gains sum over l = j + 1 .. i of log f_l, with a gate f_l = sigmoid(w . x_l + b) for
    each head (eq. 7). With c the running sum of log f that is c_i - c_j: c_i is the same for all keys of a query and
    leaves with the softmax, and -c_j is one more dimension of the key, so every attention kernel serves. In float32
    the sum is exact to 1e-3 while it is above -10,000.

    width: size of a token's vector.
    heads: number of heads.
    head_dim: size of a head; default width / heads.
    qk_norm: RMS-normalise queries and keys in each head.
    output_gate: multiply the heads' outputs by a sigmoid gate of the token (of the paper's "Pro" block).
    bias: whether the projections have biases.
    short_conv: width of a causal depthwise convolution over q, k and v; 0 for none.
    """

    def __init__(
        self,
        width: PositiveInt,
        *,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
        qk_norm: bool = False,
        output_gate: bool = False,
        bias: bool = False,
        short_conv: NonNegativeInt = 0,
    ) -> None:
        super().__init__(
            width,
            AttentionOptions(
                heads=heads,
                head_dim=head_dim,
                qk_norm=qk_norm,
                output_gate=output_gate,
                bias=bias,
                short_conv=short_conv,
                position="none",
            ),
        )
        self.key_dim = self.head_dim + 1
        self.forget_proj = Linear(width, heads, bias=True)

    def _encode(self, x: Tensor, qk: Tensor, state: State | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(x.dtype, torch.float32)  # the sum outgrows the digits of a half precision
        q, k = qk.split((self.heads, self.kv_heads), 2)
        log_f = without_padding(F.logsigmoid(self.forget_proj(x).to(exact)), mask)
        total = log_f.cumsum(1).unsqueeze(-1)  # [B, T, H, 1]
        if isinstance(state, KVState) and state.length:
            total = total + self._total(state)
        return F.pad(q.to(exact), (0, 1), value=1.0), torch.cat((k.to(exact), total * -(self.head_dim**0.5)), -1)

    def _total(self, state: KVState) -> Tensor:
        """The sum of log f of the tokens that the state holds [B, 1, H, 1]: its last key ends with it."""
        return -state.cached()[0][:, -1:, :, -1:] * self.head_dim**-0.5

    def _score(self, new: Tokens, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        with torch.autocast(new.q.device.type, enabled=False):
            return super()._score(new, k, v.to(new.q.dtype), q_position, k_position).to(v.dtype)

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`; keys are held in float32 at least, for their last dimension is the sum."""
        keys = KVState.bytes_at(length, batch, self.heads, self.key_dim, 0, torch.promote_types(dtype, torch.float32))
        values = tensor_bytes(batch, self.heads, KVState.capacity(length), self.head_dim, dtype=dtype)
        return keys + values + self._conv_nbytes(batch, dtype)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        return (
            super().flops(length) + 2 * length * self.forget_proj.weight.numel() + 2 * self.heads * self._pairs(length)
        )
