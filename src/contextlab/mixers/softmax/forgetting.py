"""Forgetting attention: scores that fall by forget gates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.mixers.convolution import without_padding
from contextlab.mixers.layers import Linear, multiplications
from contextlab.mixers.softmax.base import AttentionMixer, AttentionOptions, Tokens
from contextlab.ops.precision import working_dtype
from contextlab.registry import register
from contextlab.state import KVState, State, tensor_bytes


@dataclass
class ForgettingState(KVState):
    """The state of forgetting attention: keys and values, and the sum of log gates up to each key.

    One buffer holds a key and its sum, as `with_gate_sums` lays them out, so that attention reads it without a copy.
    """

    def gate_sums(self) -> Tensor:
        """The sum of log gates up to each token that was read [B, length, H]."""
        keys, _ = self.cached()
        return -keys[..., -1] * (keys.shape[-1] - 1) ** -0.5


def with_gate_sums(q: Tensor, k: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, T, H, D + 1] of which q k / sqrt(D) is q k / sqrt(D) - sums, `sums` being the key's.

    q, k: [B, T, H, D]. sums: [B, T, H], in whose dtype both come back.
    """
    bias = sums.unsqueeze(-1) * -(q.shape[-1] ** 0.5)
    return F.pad(q.to(sums.dtype), (0, 1), value=1.0), torch.cat((k.to(sums.dtype), bias), -1)


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

    state_class: ClassVar[type[KVState]] = ForgettingState

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

    def _attend(self, new: Tokens, state: State | None, keep_state: bool) -> tuple[Tensor, State | None]:
        sums = self._gate_sums(new.x, new.mask, state)
        q, k = with_gate_sums(new.q, new.k, sums)
        return super()._attend(replace(new, q=q, k=k), state, keep_state)

    def _gate_sums(self, x: Tensor, mask: Tensor | None, state: State | None) -> Tensor:
        """The sum of log f from the first token to each new one [B, T, H], in float32 at least."""
        exact = working_dtype(x.dtype)  # the sum outgrows the digits of a half precision
        log_f = without_padding(F.logsigmoid(self.forget_proj(x).to(exact)), mask)
        sums = log_f.cumsum(1)
        return sums + state.gate_sums()[:, -1:] if isinstance(state, ForgettingState) and state.length else sums

    def _score(self, new: Tokens, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        with torch.autocast(new.q.device.type, enabled=False):
            return super()._score(new, k, v.to(new.q.dtype), q_position, k_position).to(v.dtype)

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`; keys are held in float32 at least, as the sums beside them are."""
        keys = KVState.bytes_at(length, batch, self.heads, self.key_dim, 0, working_dtype(dtype))
        values = tensor_bytes(batch, self.heads, KVState.capacity(length), self.head_dim, dtype=dtype)
        return keys + values + self._conv_nbytes(batch, dtype)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        gates = 2 * length * multiplications(self.forget_proj)
        return super().flops(length) + gates + 2 * self.heads * self._pairs(length)
