"""Softmax attention over everything read: the base of all its kin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.mixers.base import Mixer, head_size
from contextlab.mixers.convolution import ShortConv, without_padding
from contextlab.mixers.layers import Linear, RMSNorm
from contextlab.ops.kv import KVLayer
from contextlab.ops.position import (
    RopeScaling,
    alibi_slopes,
    rope_frequencies,
    rope_table,
    rotary_size,
    rotate,
    step_table,
    xpos_attention,
)
from contextlab.ops.softmax import softmax_attention
from contextlab.registry import register
from contextlab.state import KVState, State, own


@dataclass
class ConvolvedState(State):
    """The state of attention behind a short convolution.

    attended: the keys and values. conv: [B, W-1, C], the convolution's last inputs.
    """

    attended: State | None = None
    conv: Tensor | None = None


def with_conv(after: State | None, last: Tensor | None) -> State | None:
    """The state `after`, with the short convolution's inputs `last` if there are any."""
    if after is None or last is None:
        return after
    return ConvolvedState(attended=after, conv=own(last), length=after.length)


@register(
    "mixer",
    "attention",
    family="softmax",
    papers=("1706.03762", "1911.02150", "2305.13245", "2104.09864", "2108.12409", "2010.04245", "2212.10554"),
    cases=(
        {},
        {"kv_heads": 1},
        {"kv_heads": 2, "head_dim": 8, "rope_fraction": 0.5, "bias": True},
        {"heads": 3, "head_dim": 4, "position": "alibi"},
        {"position": "none", "qk_norm": True},
        {"heads": 2, "rope_base": 500.0, "qk_norm": True, "kv_heads": 1},
        {"short_conv": 4, "kv_heads": 2},
        {"output_gate": True, "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_length": 32}},
        {"heads": 2, "head_dim": 8, "rope_scaling": {"kind": "p_rope", "keep": 0.5}},
        {"position": "xpos", "kv_heads": 2},
        {"position": "xpos", "xpos_scale": 16.0, "heads": 2, "rope_fraction": 0.67, "short_conv": 3, "qk_norm": True},
    ),
)
class Attention(Mixer):
    """Causal softmax attention (multi-head, grouped-query or multi-query); all keys and values are its state.

    width: size of a token's vector.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads (multi-head), 1 is multi-query.
    head_dim: size of a head; default width / heads.
    position: rotary (rope), rotary with scores that fade with distance (xpos), a linear bias by distance (alibi), or
        none (absolute positions are the model's).
    rope_base: base of the rotary frequencies.
    rope_fraction: part of each head's dimensions that is rotated.
    rope_scaling: a change of the rotary frequencies, for longer contexts or p-RoPE; see `ops.RopeScaling`.
    qk_norm: RMS-normalise queries and keys in each head, before the rotation.
    norm_eps: of that normalisation; None takes PyTorch's default.
    output_gate: multiply the heads' outputs by a sigmoid gate of the token (Qwen3-Next; 2505.06708).
    bias: whether the projections have biases.
    short_conv: width of a causal depthwise convolution over q, k and v (Primer, 2109.08668); 0 for none.
    xpos_scale: steps in which xpos's pairs fade by factors of 0.29 (the pair that turns fastest) to 1; default 512,
        at least 16. The state holds keys that have not faded, so that a stream may be of any length.
    """

    parallel_form = "attention"

    window: int | None = None
    sinks: int = 0
    served: Any = None  # a policy at this layer, while one is attached: `policies.Served`

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "xpos", "alibi", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
        rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
        qk_norm: bool = False,
        bias: bool = False,
        short_conv: NonNegativeInt = 0,
        norm_eps: PositiveFloat | None = None,
        output_gate: bool = False,
        rope_scaling: RopeScaling | None = None,
        xpos_scale: Annotated[float, Field(ge=16)] | None = None,
    ) -> None:
        super().__init__(width)
        if rope_scaling is not None and position == "xpos":
            raise InputError(
                "rope_scaling would leave the fading of xpos as it is; use position='rope' or leave it out"
            )
        if xpos_scale is not None and position != "xpos":
            raise InputError(f"xpos_scale is for position='xpos', but position is {position!r}; leave it out")
        if rope_scaling is not None and position != "rope":
            raise InputError(f"rope_scaling changes rotary positions, but position is {position!r}; leave it out")
        self.heads = heads
        self.kv_heads = heads if kv_heads is None else kv_heads
        if heads % self.kv_heads:
            fits = min((n for n in range(1, heads + 1) if heads % n == 0), key=lambda n: abs(n - self.kv_heads))
            raise InputError(f"kv_heads {self.kv_heads} does not divide heads {heads}; the nearest that does is {fits}")
        self.head_dim = head_size(width, heads) if head_dim is None else head_dim
        self.key_dim = self.head_dim  # of a key as the state holds it
        self.position = position
        self.rope_base, self.rope_scaling = rope_base, rope_scaling
        self.rotary = rotary_size(self.head_dim, rope_fraction) if position in ("rope", "xpos") else 0
        self.xpos_scale = (xpos_scale or 512.0) if position == "xpos" else None
        if self.rotary:
            rope_frequencies(self.rotary, rope_base, rope_scaling)  # refuses what does not fit the head
        # Rows: the heads of q, then of k, then of v.
        self.qkv_proj = Linear(width, (heads + 2 * self.kv_heads) * self.head_dim, bias=bias)
        self.out_proj = Linear(heads * self.head_dim, width, bias=bias)
        self.gate_proj = Linear(width, heads * self.head_dim) if output_gate else None
        self.conv = ShortConv(self.qkv_proj.out_features, short_conv) if short_conv else None
        self.q_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.slopes: Tensor | None
        slopes = alibi_slopes(heads).to(torch.get_default_dtype()) if position == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. x: [B, T, width]."""
        batch, length, _ = x.shape
        read = 0 if state is None else state.length
        qk, v, state, last = self._project_in(x, state, mask, keep_state)
        if self.rotary:
            # RoPE is relative: the place in what was read serves for all rows, however much each is padded.
            qk = rotate(qk, self._rotations(x, read))
        q, k = qk.split((self.heads, self.kv_heads), 2)
        q, k = self._biased(x, q, k, state, mask)
        y, after = self._attend(q, k, v, state, mask, keep_state)
        return self._project_out(x, y.reshape(batch, length, -1)), with_conv(after, last)

    def _rotations(self, x: Tensor, read: int) -> Tensor:
        """The table for `rotate` of the tokens x [B, T, width], which stand after `read` others."""
        if x.shape[1] == 1:
            return step_table(read, self.rotary, self.rope_base, x.dtype, self.rope_scaling, x.device)
        places = torch.arange(read, read + x.shape[1], device=x.device)
        return rope_table(places, self.rotary, self.rope_base, x.dtype, self.rope_scaling)

    def _project_in(
        self, x: Tensor, state: State | None, mask: Tensor | None, keep_state: bool
    ) -> tuple[Tensor, Tensor, State | None, Tensor | None]:
        """Queries and keys [B, T, H + Hkv, D], values, the state without the convolution's, and that one's next."""
        qkv, last = self.qkv_proj(x), None
        if self.conv is not None:
            before = state.conv if isinstance(state, ConvolvedState) else None
            qkv, last = self.conv(without_padding(qkv, mask), before, keep_state)
            state = state.attended if isinstance(state, ConvolvedState) else None
        qkv = qkv.view(*x.shape[:2], -1, self.head_dim)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((self.heads, self.kv_heads), 2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), 2)
        return qk, v, state, last

    def _project_out(self, x: Tensor, y: Tensor) -> Tensor:
        """From the heads' outputs y [B, T, heads * head_dim] to the mixer's."""
        return self.out_proj(y if self.gate_proj is None else y * self.gate_proj(x).sigmoid())

    def kv_layer(self) -> KVLayer | None:
        """What a policy needs to know to serve this layer; None where it does not keep all keys and values."""
        own = ("_attend", "_softmax", "_biased")
        if self.position == "xpos" or any(getattr(type(self), name) is not getattr(Attention, name) for name in own):
            return None
        return KVLayer(
            index=0, count=1, heads=self.heads, kv_heads=self.kv_heads, key_dim=self.key_dim, value_dim=self.head_dim,
            scale=self.head_dim**-0.5, slopes=self.slopes, turn=self._turned if self.rotary else None,
        )  # fmt: skip

    def _turned(self, x: Tensor, steps: Tensor) -> Tensor:
        """x [B, T, H, D], rotated already, by steps [T], [B or 1, T] or [B or 1, T, H or 1] more."""
        sharpen = rope_frequencies(self.rotary, self.rope_base, self.rope_scaling)[1]  # is in x
        table = rope_table(steps, self.rotary, self.rope_base, x.dtype, self.rope_scaling) / sharpen
        return rotate(x, table.squeeze(-3) if steps.ndim == 3 else table)

    def _biased(
        self, x: Tensor, q: Tensor, k: Tensor, state: State | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """q and k with what a subclass adds to the scores as further dimensions of both."""
        return q, k

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, mask: Tensor | None, keep_state: bool
    ) -> tuple[Tensor, State | None]:
        """Attention over the state's tokens and the new ones, and the state that holds both."""
        if self.served is not None:
            return self.served.attend(q, k, v, state, mask, keep_state)
        if state is None and not keep_state:
            places = _places(mask)
            return self._softmax(q, k, v, places, places), None
        before = KVState.empty(k, v) if state is None else state
        if not isinstance(before, KVState):
            raise InputError(f"a {type(before).__name__} was left by a policy; attach that policy to continue it")
        after = before.append(k, v, mask)
        if state is not None:
            k, v = after.held()
        places = after.positions()
        y = self._softmax(q, k, v, None if places is None else places[:, before.length :], places)
        return y, after if keep_state else None

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        if self.xpos_scale is not None:
            return xpos_attention(
                q,
                k,
                v,
                self.rotary,
                scale_base=self.xpos_scale,
                scale=self.head_dim**-0.5,
                q_position=q_position,
                k_position=k_position,
            )
        return softmax_attention(
            q,
            k,
            v,
            scale=self.head_dim**-0.5,
            window=self.window,
            sinks=self.sinks,
            slopes=self.slopes,
            q_position=q_position,
            k_position=k_position,
        )

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the buffers' capacity, which grows by a quarter at a time."""
        kept = KVState.bytes_at(length, batch, self.kv_heads, self.key_dim, self.head_dim, dtype)
        return kept + self._conv_nbytes(batch, dtype)

    def _conv_nbytes(self, batch: int, dtype: torch.dtype) -> int:
        return 0 if self.conv is None else self.conv.state_nbytes(batch, dtype)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`; only the pairs of query and key that the mask lets through are counted."""
        projections = self.qkv_proj.weight.numel() + self.out_proj.weight.numel()
        projections += 0 if self.conv is None else self.conv.weight.numel()
        projections += 0 if self.gate_proj is None else self.gate_proj.weight.numel()
        return 2 * length * projections + 4 * self.heads * self.head_dim * self._pairs(length)

    def _pairs(self, length: int) -> int:
        return length * (length + 1) // 2


def _places(mask: Tensor | None) -> Tensor | None:
    """Positions [B, T] of the tokens of whole sequences, negative at left padding; None without a mask."""
    if mask is None:
        return None
    return torch.arange(mask.shape[1], device=mask.device) - (~mask).sum(1, keepdim=True)
