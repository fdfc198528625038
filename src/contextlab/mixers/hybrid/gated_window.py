"""Softmax attention in a window and gated linear attention of everything, at equal parts: Liger's layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError, nearest_divisor
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.softmax.base import Tokens, with_conv
from contextlab.mixers.softmax.sliding_window import SlidingWindow
from contextlab.ops.gla import gla, gla_flops
from contextlab.ops.position import RopeScaling
from contextlab.ops.precision import working_dtype
from contextlab.registry import register
from contextlab.state import State, WindowState, own, tensor_bytes

SLOWNESS = 16.0
"""Of the decay sigmoid(.)^(1 / 16), as in GLA."""


@dataclass
class GatedWindowState(State):
    """What both parts remember.

    local: the window's tokens. matrix: [B, H, D, D], the gated linear attention's sum.
    """

    local: WindowState
    matrix: Tensor


@register(
    "mixer",
    "gated_window",
    family="hybrid",
    papers=("2503.01496",),
    cases=(
        {"window": 64},
        {"window": 5, "kv_heads": 2, "gate_rank": 6, "qk_norm": True},
        {"window": 7, "position": "none", "short_conv": 3, "heads": 3, "head_dim": 4, "output_gate": True},
    ),
)
class GatedWindow(SlidingWindow):
    """Sliding-window attention and gated linear attention on the same q, k and v, averaged (Liger).

    o_t = (softmax attention in the window + S_t^T softmax(q_t)) / 2 with S_t = diag(a_t) S_t-1 + softmax(k_t) v_t^T and
    the decay a_t = sigmoid(k_t)^(1 / 16), pooled: no weight is the gate's own. Rotary positions are the window's; the
    linear part reads q and k before the rotation. All other parameters are those of `sliding_window`.

    width: size of a token's vector.
    window: tokens that a query sees by softmax, its own counted.
    gate_rank: values that the key's channels are averaged to, neighbours together, before they decide on the decays; a
        divisor of kv_heads x head_dim; None for each by itself.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads.
    head_dim: size of a head; default width / heads.
    position: of the window's part: rotary (rope), a linear bias by distance (alibi), or none.
    rope_base: base of the rotary frequencies.
    rope_fraction: part of each head's dimensions that is rotated.
    rope_scaling: a change of the rotary frequencies; see `ops.RopeScaling`.
    qk_norm: RMS-normalise queries and keys in each head, before the rotation.
    norm_eps: of that normalisation; None takes PyTorch's default.
    output_gate: multiply the heads' outputs by a sigmoid gate of the token.
    bias: whether the projections have biases.
    short_conv: width of a causal depthwise convolution over q, k and v; 0 for none.
    """

    parallel_form = "chunks"

    def __init__(
        self,
        width: PositiveInt,
        *,
        window: PositiveInt = 64,
        gate_rank: PositiveInt | None = None,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "alibi", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
        rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
        rope_scaling: RopeScaling | None = None,
        qk_norm: bool = False,
        norm_eps: PositiveFloat | None = None,
        output_gate: bool = False,
        bias: bool = False,
        short_conv: NonNegativeInt = 0,
    ) -> None:
        super().__init__(
            width, window=window, heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=position,
            rope_base=rope_base, rope_fraction=rope_fraction, rope_scaling=rope_scaling, qk_norm=qk_norm,
            norm_eps=norm_eps, output_gate=output_gate, bias=bias, short_conv=short_conv,
        )  # fmt: skip
        channels = self.kv_heads * self.head_dim
        self.gate_rank = channels if gate_rank is None else gate_rank
        if channels % self.gate_rank:
            fits = nearest_divisor(channels, self.gate_rank)
            raise InputError(
                f"gate_rank {self.gate_rank} does not divide the keys' {channels} channels; the nearest is {fits}"
            )

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. x: [B, T, width]."""
        qk, v, before, last = self._project_in(x, state, mask, keep_state)
        assert before is None or isinstance(before, GatedWindowState)
        local = None if before is None else before.local
        q, k, v = self.sites(**dict(zip("qk", self._encode(x, qk, local, mask), strict=True)), v=v)
        near, after = self._attend(Tokens(x, q, k, v, mask), local, keep_state)
        far, matrix = self._linear(qk, v, mask, None if before is None else before.matrix, keep_state)
        y = self._project_out(x, self.site("heads", (near + far) / 2).reshape(*x.shape[:2], -1))
        if after is None or matrix is None:
            return y, None
        assert isinstance(after, WindowState)
        return y, with_conv(GatedWindowState(after, own(matrix), length=after.length), last)

    def _linear(
        self, qk: Tensor, v: Tensor, mask: Tensor | None, matrix: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The gated linear attention of q and k [B, T, H + Hkv, D], as they are before the rotation."""
        q, k = qk.to(working_dtype(qk.dtype)).split((self.heads, self.kv_heads), 2)
        channels = k.flatten(2)
        pooled = channels.unflatten(-1, (self.gate_rank, -1)).mean(-1)
        decay = F.logsigmoid(pooled).repeat_interleave(channels.shape[-1] // self.gate_rank, -1) / SLOWNESS
        wrote = without_padding(k.softmax(-1), mask), without_padding(v, mask), decay.unflatten(-1, (self.kv_heads, -1))
        k, v, g = (each.repeat_interleave(self.heads // self.kv_heads, 2) for each in wrote)
        return gla(q.softmax(-1), k, v, g, 1.0, matrix, keep)

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length. The matrix is kept in float32 at least."""
        matrix = tensor_bytes(batch, self.heads, self.head_dim, self.head_dim, dtype=working_dtype(dtype))
        return super().state_nbytes(length, batch, dtype) + matrix

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        return super().flops(length) + gla_flops(length, self.heads, self.head_dim, self.head_dim)
