"""Softmax attention within a window and linear attention before it, in one sum: LoLCATs' layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from contextlab.mixers.convolution import without_padding
from contextlab.mixers.linear.features import Hedgehog
from contextlab.mixers.softmax.base import AttentionMixer, AttentionOptions, Tokens
from contextlab.ops.linear import simple_gla_flops
from contextlab.ops.position import RopeScaling, rope_table, rotate
from contextlab.ops.precision import working_dtype
from contextlab.ops.window_linear import compared, window_linear_attention
from contextlab.registry import register
from contextlab.state import State, own, tensor_bytes

SHARE = -2.197
"""What the shares of the window start from, before a sigmoid: a tenth, as in the published code."""


@dataclass
class WindowLinearState(State):
    """The tokens of a window, and the sum of those that left it.

    keys: [B, W, Hkv, D], rotary positions in them. values: [B, W, Hkv, D]; zeros where no token stands.
    matrix: [B, H, F, D + 1], sums of features times values and, in the last column, of features.
    read: [B] int64, tokens of each row, padding not counted. padded: whether any piece came with a mask.
    """

    keys: Tensor
    values: Tensor
    matrix: Tensor
    read: Tensor
    padded: bool = field(default=False, metadata={"static": True})


@register(
    "mixer",
    "window_linear",
    family="hybrid",
    papers=("2410.10254", "2402.04347"),
    cases=(
        {"window": 8},
        {"window": 1, "heads": 2},
        {"window": 5, "kv_heads": 2, "qk_norm": True, "output_gate": True, "rope_fraction": 0.67},
        {"window": 20, "position": "none", "short_conv": 3, "heads": 3, "head_dim": 4},
    ),
)
class WindowLinear(AttentionMixer):
    """Softmax attention to the last tokens and linear attention to all before, under one normalising sum (LoLCATs).

    A token that leaves the window is added to a matrix by Hedgehog's feature map softmax(W k), softmax(-W k), so that
    the state is of constant size. A learned share of each head weighs the window against the rest. A text no longer
    than the window is answered as by softmax attention.

    width: size of a token's vector.
    window: tokens that a query compares itself with, its own counted.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads.
    head_dim: size of a head; default width / heads.
    position: rotary (rope), in the queries and keys that the feature map reads, too; or none.
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
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "none"] = "rope",
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
            width,
            AttentionOptions(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                position=position,
                rope_base=rope_base,
                rope_fraction=rope_fraction,
                rope_scaling=rope_scaling,
                qk_norm=qk_norm,
                norm_eps=norm_eps,
                output_gate=output_gate,
                bias=bias,
                short_conv=short_conv,
            ),
        )
        self.window: int = window
        self.feature = Hedgehog(self.head_dim, heads)
        self.share = nn.Parameter(torch.full((heads,), SHARE))

    def _encode(self, x: Tensor, qk: Tensor, state: State | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        # A feature map of what is rotated depends on the places themselves, not on distances alone.
        if not self.rotary or (mask is None and not (isinstance(state, WindowLinearState) and state.padded)):
            return super()._encode(x, qk, state, mask)
        assert state is None or isinstance(state, WindowLinearState)
        new = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        places = new.cumsum(1) - 1 + (0 if state is None else state.read[:, None])
        table = rope_table(places.clamp_min(0), self.rotary, self.rope_base, x.dtype, self.rope_scaling)
        q, k = rotate(qk, table).split((self.heads, self.kv_heads), 2)
        return q, k

    def _attend(self, new: Tokens, state: State | None, keep_state: bool) -> tuple[Tensor, State | None]:
        q, k, v = (without_padding(each, new.mask) for each in (new.q, new.k, new.v))
        batch, length = q.shape[:2]
        before = self._start(k, v) if state is None else state
        assert isinstance(before, WindowLinearState)
        k, v = torch.cat((before.keys, k), 1), torch.cat((before.values, v), 1)
        padded = before.padded or new.mask is not None
        slots = torch.arange(-self.window, 0, device=q.device)
        if padded:
            real = q.new_ones(batch, length, dtype=torch.bool) if new.mask is None else new.mask
            seen = torch.cat((slots + before.read[:, None] >= 0, real), 1)
        else:
            seen = torch.cat((slots + before.length >= 0, slots.new_ones(length, dtype=torch.bool)))[None]
        gone = k[:, :length].repeat_interleave(self.heads // self.kv_heads, 2)
        places = slots.new_zeros(length)  # Hedgehog's map asks for none
        features = without_padding(self.feature(gone, places, False), seen[:, :length].expand(batch, -1))
        y, matrix = window_linear_attention(
            q, k, v, self.feature(q, places, True), features, self.share.sigmoid(), seen, None, before.matrix,
            keep_state,
        )  # fmt: skip
        if matrix is None:
            return y, None
        read = before.read + (length if new.mask is None else new.mask.sum(1))
        kept = own(k[:, length:]), own(v[:, length:]), own(matrix), own(read)
        return y, WindowLinearState(*kept, padded, length=before.length + length)

    def _start(self, k: Tensor, v: Tensor) -> WindowLinearState:
        """A state that has read nothing, for tokens like k and v [B, T, Hkv, D]."""
        batch = len(k)
        shape = batch, self.heads, self.feature.features, v.shape[-1] + 1
        keys, values = (x.new_zeros(batch, self.window, *x.shape[2:]) for x in (k, v))
        read = torch.zeros(batch, dtype=torch.int64, device=k.device)
        return WindowLinearState(keys, values, k.new_zeros(shape, dtype=working_dtype(k.dtype)), read)

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length. The matrix is kept in float32 at least."""
        kept = tensor_bytes(batch, self.window, self.kv_heads, 2 * self.head_dim, dtype=dtype)
        matrix = tensor_bytes(batch, self.heads, self.feature.features, self.head_dim + 1, dtype=working_dtype(dtype))
        return kept + matrix + tensor_bytes(batch, dtype=torch.int64) + self._conv_nbytes(batch, dtype)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        far = simple_gla_flops(length, self.heads, self.feature.features, self.head_dim + 1)
        return super().flops(length) + 2 * length * self.feature.products + far

    def _pairs(self, length: int) -> int:
        return compared(length, self.window)
