"""Softmax attention with rotary positions that follow the content (CARoPE)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.layers import Linear, in_dtype_of, multiplications
from contextlab.mixers.softmax.base import AttentionMixer, AttentionOptions, Tokens, with_conv
from contextlab.mixers.softmax.rotary import _turned_size
from contextlab.ops.linear import working_dtype
from contextlab.ops.position import rotate, rotations
from contextlab.ops.position_variants import carope_phases
from contextlab.registry import register
from contextlab.state import State, own, tensor_bytes


@dataclass
class PhaseState(State):
    """The state of attention with rotations that add up over the tokens.

    attended: the keys and values, the keys turned. phase: [B, Hkv, P] float64, each pair's angle, modulo 2 pi.
    """

    attended: State
    phase: Tensor


@register(
    "mixer",
    "carope_attention",
    family="softmax",
    papers=("2507.23083",),
    cases=(
        {},
        {"kv_heads": 2, "rope_fraction": 0.67, "qk_norm": True},
        {"heads": 3, "head_dim": 6, "rope_base": 500.0, "short_conv": 3, "output_gate": True, "bias": True},
    ),
)
class CaropeAttention(AttentionMixer):
    """Context-aware rotary positions (CARoPE): each token says, for each head, how far the rotations go on.

    Token t turns pair i of a head by f(x_t)^i further, with f(x) = 1 / (1 + softplus(w . x + b)) between 0 and 1, so
    that the angles are sums over the tokens and scores see their differences. Keys are turned when they are written;
    the state holds the angles' sums too. Training starts at RoPE: w = 0, and b gives f = rope_base^(-2 / D), which in
    the paper is the start as well, though its formula has no b to make it so. Here x is the layer's input, and the
    query heads on one key head share f.

    width: size of a token's vector.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads.
    head_dim: size of a head; default width / heads.
    rope_base: base of the rotary frequencies where training starts.
    rope_fraction: part of each head's dimensions that is rotated, 4 at least.
    qk_norm: RMS-normalise queries and keys in each head, before the rotation.
    bias: whether the projections have biases.
    short_conv: width of a causal depthwise convolution over q, k and v; 0 for none.
    norm_eps: of that normalisation; None takes PyTorch's default.
    output_gate: multiply the heads' outputs by a sigmoid gate of the token.
    """

    policies_may_serve: ClassVar[bool] = True

    def __init__(
        self,
        width: PositiveInt,
        *,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
        rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
        qk_norm: bool = False,
        bias: bool = False,
        short_conv: NonNegativeInt = 0,
        norm_eps: PositiveFloat | None = None,
        output_gate: bool = False,
    ) -> None:
        super().__init__(
            width,
            AttentionOptions(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                qk_norm=qk_norm,
                norm_eps=norm_eps,
                output_gate=output_gate,
                bias=bias,
                short_conv=short_conv,
                position="none",  # rotations are made here
            ),
        )
        size = _turned_size(self.head_dim, rope_fraction, "CARoPE")
        self.pairs = size // 2
        self.freq_proj = Linear(width, self.kv_heads, bias=True)
        nn.init.zeros_(self.freq_proj.weight)
        slow = rope_base ** (2 / size) - 1  # 1 / f - 1; the bias is its inverse softplus
        nn.init.constant_(self.freq_proj.bias, slow + math.log(-math.expm1(-slow)))

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. x: [B, T, width]."""
        qk, v, before, last = self._project_in(x, state, mask, keep_state)
        attended, phase = (before.attended, before.phase) if isinstance(before, PhaseState) else (None, None)
        with torch.autocast(x.device.type, enabled=False):  # an error in f would add up over the tokens
            z = in_dtype_of(x.to(working_dtype(x.dtype)), self.freq_proj)
        log_f = -F.softplus(z.to(torch.float64)).log1p()
        angles, phase = carope_phases(log_f, self.pairs, phase, mask)
        table = rotations(angles, x.dtype)
        q, k = qk.split((self.heads, self.kv_heads), 2)
        q, k = rotate(q, table.repeat_interleave(self.heads // self.kv_heads, 2)), rotate(k, table)
        q, k, v = self.sites(q=q, k=k, v=v)
        y, after = self._attend(Tokens(x, q, k, v, mask), attended, keep_state)
        y = self.site("heads", y)
        if after is not None:
            after = with_conv(PhaseState(after, own(phase), length=after.length), last)
        return self._project_out(x, y.flatten(2)), after

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`; the angles are in float64."""
        phase = tensor_bytes(batch, self.kv_heads, self.pairs, dtype=torch.float64)
        return super().state_nbytes(length, batch, dtype) + phase

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        return super().flops(length) + 2 * length * multiplications(self.freq_proj)
