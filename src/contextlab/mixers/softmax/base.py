"""What all softmax attention shares: options, projections, positions, and the seams where mixers differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor

from contextlab.errors import InputError, nearest_divisor
from contextlab.mixers.base import Mixer, head_size
from contextlab.mixers.convolution import ShortConv, without_padding
from contextlab.mixers.layers import Linear, RMSNorm, multiplications
from contextlab.ops.kv import KVLayer
from contextlab.ops.position import (
    RopeScaling,
    alibi_slopes,
    rope_frequencies,
    rope_table,
    rotary_size,
    rotate,
    step_table,
)
from contextlab.ops.softmax import softmax_attention
from contextlab.state import KVState, State, own

NOT_TURNED = (
    "plain_tokens: the first tokens keep plain rotary positions, so that keys cannot be turned to other places; leave "
    "plain_tokens out, or take a policy that turns none, such as h2o or snapkv"
)


@dataclass
class ConvolvedState(State):
    """The state of attention behind a short convolution.

    attended: the keys and values. conv: [B, W-1, C], the convolution's last inputs.
    """

    attended: State | None = None
    conv: Tensor | None = None


@overload
def with_conv(after: State, last: Tensor | None) -> State: ...


@overload
def with_conv(after: State | None, last: Tensor | None) -> State | None: ...


def with_conv(after: State | None, last: Tensor | None) -> State | None:
    """The state `after`, with the short convolution's inputs `last` [B, W-1, C] if there are any."""
    if after is None or last is None:
        return after
    return ConvolvedState(attended=after, conv=own(last), length=after.length)


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """The options that attention mixers share; `Attention` says what each is."""

    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    position: Literal["rope", "xpos", "alibi", "none"] = "rope"
    rope_base: float = 10000.0
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    norm_eps: float | None = None
    output_gate: bool = False
    bias: bool = False
    short_conv: int = 0


@dataclass(frozen=True)
class Tokens:
    """The tokens of one call, as attention reads them.

    x: [B, T, width], the mixer's input.
    q: [B, T, H, K], as they are compared with keys. k: [B, T, Hkv, K], as the state holds them. v: [B, T, Hkv, V].
    mask: [B, T] bool or None, False at left padding.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None


class AttentionMixer(Mixer):
    """Base of softmax attention: x -> queries, keys, values -> positions -> memory and scores -> output.

    A mixer overrides the seams in which it differs, and only these:

    - `_read_in(x)`: what queries, keys and values are projected from.
    - `_encode(x, qk, state, mask)`: queries and keys as they are compared and held, positions in them.
    - `_attend(new, state, keep_state)`: what is remembered of the tokens, and which of them are scored.
    - `_score(new, k, v, q_position, k_position)`: the answers, given the keys and values of all tokens in sight.
    - `_project_out(x, y)`: from the heads' outputs to the mixer's.
    - `_pairs(length)`: pairs of query and key, for counting operations.

    width: size of a token's vector.
    options: heads, positions, norms and the like.
    """

    parallel_form = "attention"
    tells_mixing = True
    policies_may_serve: ClassVar[bool] = False  # whether all is as in `Attention` but for what is projected

    state_class: ClassVar[type[KVState]] = KVState  # what holds the keys and values

    served: Any = None  # a policy at this layer, while one is attached: `policies.Served`

    def __init__(self, width: int, options: AttentionOptions) -> None:
        super().__init__(width)
        heads, position = options.heads, options.position
        if options.rope_scaling is not None and position == "xpos":
            raise InputError("rope_scaling does not change how xpos decays; use position='rope' or leave it out")
        if options.rope_scaling is not None and position != "rope":
            raise InputError(f"rope_scaling changes rotary positions, but position is {position!r}; leave it out")
        self.heads = heads
        self.kv_heads = heads if options.kv_heads is None else options.kv_heads
        if heads % self.kv_heads:
            fits = nearest_divisor(heads, self.kv_heads)
            raise InputError(f"kv_heads {self.kv_heads} does not divide heads {heads}; the nearest that does is {fits}")
        self.head_dim = head_size(width, heads) if options.head_dim is None else options.head_dim
        self.key_dim = self.head_dim  # of a key as the state holds it
        self.position = position
        self.rope_base, self.rope_scaling = options.rope_base, options.rope_scaling
        self.rotary = rotary_size(self.head_dim, options.rope_fraction) if position in ("rope", "xpos") else 0
        if self.rotary:
            rope_frequencies(self.rotary, self.rope_base, self.rope_scaling)  # refuses what does not fit the head
        # Rows: the heads of q, then of k, then of v.
        self.qkv_proj = Linear(width, (heads + 2 * self.kv_heads) * self.head_dim, bias=options.bias)
        self.out_proj = Linear(heads * self.head_dim, width, bias=options.bias)
        self.gate_proj = Linear(width, heads * self.head_dim) if options.output_gate else None
        self.conv = ShortConv(self.qkv_proj.out_features, options.short_conv) if options.short_conv else None
        self.q_norm = RMSNorm(self.head_dim, eps=options.norm_eps) if options.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=options.norm_eps) if options.qk_norm else None
        self.slopes: Tensor | None
        slopes = alibi_slopes(heads).to(torch.get_default_dtype()) if position == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. x: [B, T, width]."""
        qk, v, before, last = self._project_in(x, state, mask, keep_state)
        q, k = self._encode(x, qk, before, mask)
        q, k, v = self.sites(q=q, k=k, v=v)
        y, after = self._attend(Tokens(x, q, k, v, mask), before, keep_state)
        y = self.site("heads", y)
        return self._project_out(x, y.reshape(*x.shape[:2], -1)), with_conv(after, last)

    def _read_in(self, x: Tensor) -> Tensor:
        """What queries, keys and values are projected from. x: [B, T, width] -> the same shape."""
        return x

    def _project_in(
        self, x: Tensor, state: State | None, mask: Tensor | None, keep_state: bool
    ) -> tuple[Tensor, Tensor, State | None, Tensor | None]:
        """Queries and keys [B, T, H + Hkv, D], values, the state without the convolution's, and that one's next."""
        qkv, last = self.qkv_proj(self._read_in(x)), None
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

    def _encode(self, x: Tensor, qk: Tensor, state: State | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries [B, T, H, K] and keys [B, T, Hkv, K] as they are compared and held; K is `key_dim`.

        qk: [B, T, H + Hkv, head_dim], queries and keys as projected. state: of the tokens before, or None.
        """
        if self.rotary:
            qk = rotate(qk, self._rotations(x, 0 if state is None else state.length, row_start(state), mask))
        q, k = qk.split((self.heads, self.kv_heads), 2)
        return q, k

    def _rotations(self, x: Tensor, read: int, start: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The table for `rotate` of the tokens x [B, T, width], which stand after `read` others.

        start: [B] int64, the padding of each row among those, or None. mask: [B, T] bool, or None.
        """
        # RoPE is relative: the place in what was read serves for all rows, however much each is padded. With first
        # tokens that turn otherwise it is not, and places are those in the row.
        by_row = self.plain_tokens > 0 and not (start is None and mask is None)
        if x.shape[1] == 1 and not by_row:
            return step_table(read, self.rotary, self.rope_base, x.dtype, self.rope_scaling, x.device)
        places = torch.arange(read, read + x.shape[1], device=x.device)
        if by_row:
            before = 0 if start is None else start[:, None]
            places = places - before - (0 if mask is None else (~mask).sum(1, keepdim=True))
        return rope_table(places, self.rotary, self.rope_base, x.dtype, self.rope_scaling)

    def _rotated_further(self, x: Tensor, steps: Tensor) -> Tensor:
        """x [B, T, H, D], rotated already, by steps [T], [B or 1, T] or [B or 1, T, H or 1] more."""
        if self.plain_tokens:
            raise InputError(NOT_TURNED)
        sharpen = rope_frequencies(self.rotary, self.rope_base, self.rope_scaling)[1]  # is in x
        table = rope_table(steps, self.rotary, self.rope_base, x.dtype, self.rope_scaling) / sharpen
        return rotate(x, table.squeeze(-3) if steps.ndim == 3 else table)

    @property
    def plain_tokens(self) -> int:
        """First tokens of each sequence that are rotated by plain angles, where others are not."""
        return 0 if self.rope_scaling is None else self.rope_scaling.plain_tokens

    def _attend(self, new: Tokens, state: State | None, keep_state: bool) -> tuple[Tensor, State | None]:
        """Attention over the state's tokens and the new ones [B, T, H, V], and the state that holds both."""
        if self.served is not None:
            return self.served.attend(new.q, new.k, new.v, state, new.mask, keep_state)
        k, v, mask = new.k, new.v, new.mask
        if state is None and not keep_state:
            places = row_places(mask)
            return self._score(new, k, v, places, places), None
        before = self.state_class.empty(k, v) if state is None else state
        if not isinstance(before, self.state_class):
            raise InputError(f"a {type(before).__name__} was left by a policy; attach that policy to continue it")
        after = before.append(k, v, mask)
        if state is not None:
            k, v = after.cached()
        places = after.positions()
        y = self._score(new, k, v, None if places is None else places[:, before.length :], places)
        return y, after if keep_state else None

    def _score(self, new: Tokens, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        """The answers [B, T, H, V] to the new tokens' queries.

        k: [B, N, Hkv, K], v: [B, N, Hkv, V], of the tokens in sight; the last T are the new ones.
        q_position: [B or 1, T] int64, k_position: [B or 1, N]: places in the rows, negative at padding; None for both
            where keys follow one another and nothing is padded.
        """
        return softmax_attention(
            new.q, k, v, scale=self.head_dim**-0.5, slopes=self.slopes, q_position=q_position, k_position=k_position
        )

    def _project_out(self, x: Tensor, y: Tensor) -> Tensor:
        """From the heads' outputs y [B, T, heads * head_dim] to the mixer's [B, T, width]."""
        return self.out_proj(y if self.gate_proj is None else y * self.gate_proj(x).sigmoid())

    def state_of(self, keys: Tensor, values: Tensor) -> State:
        """The state that holds keys [B, n, Hkv, K] and values [B, n, Hkv, V], as if n tokens had left them.

        Of mixers that keep all keys and values (`kv_layer`). A short convolution has read nothing.
        """
        after = self.state_class.empty(keys, values).append(keys, values)
        if self.conv is None:
            return after
        return with_conv(after, keys.new_zeros(len(keys), self.conv.weight.shape[1] - 1, len(self.conv.weight)))

    def kv_layer(self) -> KVLayer | None:
        """What a policy needs to know to serve this layer; None where it does not keep all keys and values."""
        if not self.policies_may_serve or self.position == "xpos":
            return None
        return KVLayer(
            index=0, count=1, heads=self.heads, kv_heads=self.kv_heads, key_dim=self.key_dim, value_dim=self.head_dim,
            scale=self.head_dim**-0.5, slopes=self.slopes, turn=self._rotated_further if self.rotary else None,
            by_row=self.plain_tokens > 0, fixed=self.plain_tokens > 0,
        )  # fmt: skip

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the buffers' capacity, which grows by a quarter at a time."""
        kept = KVState.bytes_at(length, batch, self.kv_heads, self.key_dim, self.head_dim, dtype)
        return kept + self._conv_nbytes(batch, dtype)

    def _conv_nbytes(self, batch: int, dtype: torch.dtype) -> int:
        return 0 if self.conv is None else self.conv.state_nbytes(batch, dtype)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`; only the pairs of query and key that the mask lets through are counted."""
        projections = multiplications(self.qkv_proj) + multiplications(self.out_proj)
        projections += 0 if self.conv is None else self.conv.weight.numel()
        projections += 0 if self.gate_proj is None else multiplications(self.gate_proj)
        return 2 * length * projections + 4 * self.heads * self.head_dim * self._pairs(length)

    def _pairs(self, length: int) -> int:
        """Pairs of query and key that are compared in `length` tokens of one sequence."""
        return length * (length + 1) // 2


def row_start(state: State | None) -> Tensor | None:
    """[B] int64, the left-padding tokens of each row that a state of attention has read; None for none.

    A policy's state tells it itself or by a state within it.
    """
    if state is None:
        return None
    start = getattr(state, "start", None)
    if isinstance(start, Tensor):
        return start if getattr(state, "padded", True) else None
    within = (value for value in vars(state).values() if isinstance(value, State))
    return next((found for each in within if (found := row_start(each)) is not None), None)


def row_places(mask: Tensor | None) -> Tensor | None:
    """Positions [B, T] of the tokens of whole sequences, negative at left padding; None without a mask [B, T]."""
    if mask is None:
        return None
    return torch.arange(mask.shape[1], device=mask.device) - (~mask).sum(1, keepdim=True)
