"""Other windows: heads that see windows of several sizes, and sigmoid attention over a window."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.mixers.softmax.base import AttentionMixer, AttentionOptions, Tokens
from contextlab.ops.softmax import softmax_attention
from contextlab.registry import register
from contextlab.state import State, WindowState


@dataclass
class WindowsState(State):
    """The windows of the groups of heads, the smallest first."""

    groups: list[WindowState] = field(default_factory=list)


@register(
    "mixer",
    "multi_scale_window",
    family="softmax",
    papers=("2501.01039",),
    cases=(
        {"window": 8},
        {"window": 4, "position": "none", "qk_norm": True},
        {"window": 12, "heads": 8, "kv_heads": 4, "head_dim": 4, "position": "alibi", "short_conv": 3},
    ),
)
class MultiScaleWindow(AttentionMixer):
    """Causal softmax attention whose heads see windows of four sizes, w/4, w/2, w and 2w.

    Each quarter of the heads has one of the sizes (MSWA, 2501.01039), and a state of that size: all
    of it is a sixteenth less than what `sliding_window` of size w holds. (The paper also lets w grow with depth:
    give the layers of a model other windows.)

    width: size of a token's vector.
    window: w, a multiple of 4; a query's own token counts.
    heads: query heads, a multiple of 4.
    kv_heads: key and value heads, a multiple of 4 that divides heads; default heads.
    head_dim: size of a head; default width / heads.
    position: rotary (rope), a linear bias by distance (alibi), or none (absolute positions are the model's).
    rope_base: base of the rotary frequencies.
    rope_fraction: part of each head's dimensions that is rotated.
    qk_norm: RMS-normalise queries and keys in each head, before the rotation.
    bias: whether the projections have biases.
    short_conv: width of a causal depthwise convolution over q, k and v (Primer, 2109.08668); 0 for none.
    """

    def __init__(
        self,
        width: PositiveInt,
        *,
        window: PositiveInt = 64,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "alibi", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
        rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
        qk_norm: bool = False,
        bias: bool = False,
        short_conv: NonNegativeInt = 0,
    ) -> None:
        for name, value in (("window", window), ("heads", heads), ("kv_heads", kv_heads)):
            if value is not None and value % 4:
                fits = max(4, round(value / 4) * 4)
                raise InputError(
                    f"{name} must be a multiple of 4 (a quarter for each window size), got {value}; the nearest "
                    f"is {fits}"
                )
        super().__init__(
            width,
            AttentionOptions(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                position=position,
                rope_base=rope_base,
                rope_fraction=rope_fraction,
                qk_norm=qk_norm,
                bias=bias,
                short_conv=short_conv,
            ),
        )
        self.windows = (window // 4, window // 2, window, 2 * window)

    def _attend(self, new: Tokens, state: State | None, keep_state: bool) -> tuple[Tensor, State | None]:
        assert state is None or isinstance(state, WindowsState)
        q, mask = new.q, new.mask
        before = [None] * 4 if state is None else state.groups
        slopes = [None] * 4 if self.slopes is None else self.slopes.chunk(4)
        outputs: list[Tensor] = []
        groups: list[WindowState] = []
        for window, own_q, own_k, own_v, slope, group in zip(
            self.windows, q.chunk(4, 2), new.k.chunk(4, 2), new.v.chunk(4, 2), slopes, before, strict=True
        ):
            seen_k, seen_v, places, after = in_sight(own_k, own_v, window, group, mask, keep_state)
            outputs.append(
                softmax_attention(
                    own_q,
                    seen_k,
                    seen_v,
                    window=window,
                    slopes=slope,
                    q_position=None if places is None else places[:, -q.shape[1] :],
                    k_position=places,
                )
            )
            if after is not None:
                groups.append(after)
        return torch.cat(outputs, 2), WindowsState(groups, length=groups[0].length) if keep_state else None

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length."""
        heads, dim = self.kv_heads // 4, self.head_dim
        kept = sum(WindowState.bytes_for(window, 0, batch, heads, dim, dim, dtype) for window in self.windows)
        return kept + self._conv_nbytes(batch, dtype)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`; only the pairs of query and key that the masks let through are counted."""
        seen = sum(_pairs(length, window) for window in self.windows)
        return super().flops(length) + self.heads * self.head_dim * (seen - 4 * self._pairs(length))


@register(
    "mixer",
    "sigmoid_window",
    family="softmax",
    papers=("2502.18845",),
    cases=(
        {"window": 8},
        {"window": 1, "heads": 2, "kv_heads": 1},
        {"window": 20, "kv_heads": 2, "head_dim": 4, "rope_fraction": 0.5, "qk_norm": True},
        {"window": 6, "short_conv": 3, "heads": 6},
    ),
)
class SigmoidWindow(AttentionMixer):
    """Causal sigmoid attention over the last tokens (SWAT): what one token weighs takes nothing from the others.

    The weight of a key is sigmoid(q . k / sqrt(d) + s distance), with RoPE in q and k (2502.18845, eq. 5). The slope
    s is -2^-k for the first half of the heads, which look at what is near, and 2^-k for the other half, which look
    at what will soon leave the window, k = 1 .. heads / 2 in each (eq. 4, "balanced ALiBi").

    width: size of a token's vector.
    window: tokens that a query sees, its own counted.
    heads: query heads, an even number.
    kv_heads: key and value heads, a divisor of heads; default heads (multi-head), 1 is multi-query.
    head_dim: size of a head; default width / heads.
    rope_base: base of the rotary frequencies.
    rope_fraction: part of each head's dimensions that is rotated.
    qk_norm: RMS-normalise queries and keys in each head, before the rotation.
    bias: whether the projections have biases.
    short_conv: width of a causal depthwise convolution over q, k and v (Primer, 2109.08668); 0 for none.
    """

    tilt: Tensor

    def __init__(
        self,
        width: PositiveInt,
        *,
        window: PositiveInt = 64,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
        rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
        qk_norm: bool = False,
        bias: bool = False,
        short_conv: NonNegativeInt = 0,
    ) -> None:
        if heads % 2:
            raise InputError(
                f"heads must be even, half with falling and half with rising slopes, got {heads}; "
                f"the nearest is {heads + 1}"
            )
        super().__init__(
            width,
            AttentionOptions(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                rope_base=rope_base,
                rope_fraction=rope_fraction,
                qk_norm=qk_norm,
                bias=bias,
                short_conv=short_conv,
            ),
        )
        self.window: int = window
        slopes = 2.0 ** -torch.arange(1, heads // 2 + 1, dtype=torch.get_default_dtype())
        self.register_buffer("tilt", torch.cat((-slopes, slopes)), persistent=False)

    def _attend(self, new: Tokens, state: State | None, keep_state: bool) -> tuple[Tensor, State | None]:
        k, v, places, after = in_sight(new.k, new.v, self.window, state, new.mask, keep_state)
        return sigmoid_attention(new.q, k, v, self.window, self.tilt, None if places is None else places >= 0), after

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length."""
        kept = WindowState.bytes_for(self.window, 0, batch, self.kv_heads, self.head_dim, self.head_dim, dtype)
        return kept + self._conv_nbytes(batch, dtype)

    def _pairs(self, length: int) -> int:
        return _pairs(length, self.window)


def sigmoid_attention(q: Tensor, k: Tensor, v: Tensor, window: int, tilt: Tensor, real: Tensor | None = None) -> Tensor:
    """Causal sigmoid attention over a window (2502.18845, eq. 5), in chunks of queries: time and memory O(T window).

    q: [B, Tq, H, D], of the last Tq of the tokens of k.
    k: [B, Tk, Hkv, D]; Hkv divides H, and H / Hkv query heads in a row share one key head.
    v: [B, Tk, Hkv, V].
    window: tokens that a query sees, its own counted.
    tilt: [H]; tilt * distance is added to the scores.
    real: [B, Tk] bool, False at keys that no query sees; None for all.

    Returns [B, Tq, H, V].
    """
    length, before, shared = q.shape[1], k.shape[1] - q.shape[1], q.shape[2] // k.shape[2]
    tilt = tilt.to(q.dtype).view(-1, shared, 1, 1)
    chunk = max(window, 128)
    outputs = []
    for first in range(0, length, chunk):
        last = min(first + chunk, length)
        keys = slice(max(0, before + first - window + 1), before + last)
        at_q = torch.arange(before + first, before + last, device=q.device)[:, None]
        distance = at_q - torch.arange(keys.start, keys.stop, device=q.device)
        sees = (distance >= 0) & (distance < window)
        if real is not None:
            sees = sees & real[:, None, None, None, keys]
        queries = q[:, first:last].unflatten(2, (-1, shared)) * q.shape[-1] ** -0.5
        scores = torch.einsum("bqhgd,bkhd->bhgqk", queries, k[:, keys]) + tilt * distance
        weights = scores.sigmoid().masked_fill(~sees, 0.0)
        outputs.append(torch.einsum("bhgqk,bkhv->bqhgv", weights, v[:, keys]).flatten(2, 3))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def in_sight(
    k: Tensor, v: Tensor, window: int, state: State | None, mask: Tensor | None, keep_state: bool
) -> tuple[Tensor, Tensor, Tensor | None, WindowState | None]:
    """The keys and values of the tokens that a window's state holds and of the new ones, and the state after them.

    k: [B, T, H, D]. v: [B, T, H, V]. state: a `WindowState` without sinks, or None. mask, keep_state: see `Mixer`.

    Returns keys and values [B, n + T, H, D or V], their places [B, n + T] (negative where there is no token; None
    where nothing is padded, for then they simply follow one another), and the state, None without keep_state.
    """
    before = WindowState.empty(k, v, window) if state is None else state
    assert isinstance(before, WindowState)
    places = torch.arange(before.length, before.length + k.shape[1], device=k.device)[None]
    padded = before.padded or mask is not None
    if padded:
        start = before.start if mask is None else before.start + (~mask).sum(1)
        places = places - start[:, None]
    after = before.append(k, v, places, mask) if keep_state else None
    if state is not None:
        old_k, old_v, old_places = before.cached()
        k, v = torch.cat((old_k, k), 1), torch.cat((old_v, v), 1)
        places = torch.cat((old_places, places.expand(len(old_places), -1)), 1)
    return k, v, places if padded else None, after


def _pairs(length: int, window: int) -> int:
    """Pairs of query and key within a window, in `length` tokens."""
    seen = min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * window
