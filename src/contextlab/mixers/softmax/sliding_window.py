"""Softmax attention over a sliding window with attention sinks."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from contextlab.errors import InputError
from contextlab.mixers.softmax.base import AttentionMixer, AttentionOptions, Tokens, row_places
from contextlab.ops.position import RopeScaling
from contextlab.ops.softmax import softmax_attention
from contextlab.ops.window import Sinks, window_attention
from contextlab.registry import register
from contextlab.state import State, WindowState


@register(
    "mixer",
    "sliding_window",
    family="softmax",
    papers=("2004.05150", "2310.06825", "2309.17453", "2308.16137", "2209.15001"),
    cases=(
        {"window": 8},
        {"window": 1},
        {"window": 5, "sinks": 3, "kv_heads": 2},
        {"window": 20, "sinks": 2, "position": "alibi"},
        {"window": 1, "sinks": 1, "position": "none"},
        {"window": 64, "heads": 2, "rope_fraction": 0.5, "qk_norm": True},
        {"window": 6, "sinks": 1, "short_conv": 3},
        {"window": 7, "output_gate": True, "rope_scaling": {"kind": "ntk", "factor": 2.0}},
        {"window": 4, "dilation": 3},
        {"window": 3, "dilation": 5, "sinks": 2, "position": "alibi", "kv_heads": 2},
        {"window": 5, "sinks": 3, "max_distance": 6, "kv_heads": 2, "rope_fraction": 0.67},
        {"window": 6, "sinks": 2, "max_distance": 9, "position": "alibi", "short_conv": 3},
        {"window": 3, "dilation": 2, "sinks": 2, "max_distance": 7, "qk_norm": True},
    ),
)
class SlidingWindow(AttentionMixer):
    """Causal softmax attention over the last tokens and a few attention sinks, with a state of constant size.

    width: size of a token's vector.
    window: tokens that a query sees, its own counted.
    sinks: first tokens of each sequence, which stay visible for ever (StreamingLLM; distances stay true).
    dilation: steps between the tokens that a query sees, its own the last; they are that many times as far away
        (causal dilated neighbourhood attention).
    max_distance: no sink counts as further away than this, as in LM-Infinite, where it is the length of the training
        and the window's; at least (window - 1) dilation. None leaves distances true.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads (multi-head), 1 is multi-query.
    head_dim: size of a head; default width / heads.
    position: rotary (rope), a linear bias by distance (alibi), or none (absolute positions are the model's).
    rope_base: base of the rotary frequencies.
    rope_fraction: part of each head's dimensions that is rotated.
    rope_scaling: a change of the rotary frequencies, for longer contexts or p-RoPE; see `ops.RopeScaling`.
    qk_norm: RMS-normalise queries and keys in each head, before the rotation.
    norm_eps: of that normalisation; None takes PyTorch's default.
    output_gate: multiply the heads' outputs by a sigmoid gate of the token (Qwen3-Next; 2505.06708).
    bias: whether the projections have biases.
    short_conv: width of a causal depthwise convolution over q, k and v (Primer, 2109.08668); 0 for none.
    """

    def __init__(
        self,
        width: PositiveInt,
        *,
        window: PositiveInt = 64,
        sinks: NonNegativeInt = 0,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        position: Literal["rope", "alibi", "none"] = "rope",
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
        rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
        qk_norm: bool = False,
        bias: bool = False,
        short_conv: NonNegativeInt = 0,
        norm_eps: PositiveFloat | None = None,
        output_gate: bool = False,
        rope_scaling: RopeScaling | None = None,
        dilation: PositiveInt = 1,
        max_distance: PositiveInt | None = None,
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
        self.sinks = sinks
        self.dilation, self.max_distance = dilation, max_distance
        self.reach = (window - 1) * dilation + 1  # tokens from a query back to the first that it may see
        if max_distance is None:
            return
        if self.plain_tokens:
            raise InputError(
                "max_distance turns keys to other places, which plain_tokens forbids; leave one of them out"
            )
        if not sinks or position == "none":
            lacks = "sinks is 0; set sinks=4" if not sinks else "position is 'none'; set position='rope'"
            raise InputError(
                f"max_distance bounds the distance that sinks are given, but {lacks} or leave max_distance out"
            )
        if max_distance < self.reach - 1:
            fits = self.reach - 1
            raise InputError(f"max_distance {max_distance} is less than the window reaches; the nearest is {fits}")

    @property
    def sink_score(self) -> Tensor | None:
        """[heads], the score of a learned sink beside each head's keys (`ops.softmax_attention`); None for none."""
        return None

    def _attend(self, new: Tokens, state: State | None, keep_state: bool) -> tuple[Tensor, State | None]:
        q, k, v, mask = new.q, new.k, new.v, new.mask
        special = self.dilation > 1 or self.max_distance is not None
        if state is None and not keep_state and not special:
            places = row_places(mask)
            return self._score(new, k, v, places, places), None
        before = WindowState.empty(k, v, self.reach, self.sinks) if state is None else state
        assert isinstance(before, WindowState)
        start = before.start if mask is None else before.start + (~mask).sum(1)
        places = torch.arange(before.length, before.length + q.shape[1], device=q.device)[None]
        padded = before.padded or mask is not None
        if padded:
            places = places - start[:, None]
        after = before.append(k, v, places, mask) if keep_state else None
        if special:
            return self._limited(q, k, v, places, None if state is None else before), after
        if state is None:
            given = places if padded else None
            return self._score(new, k, v, given, given), after
        old_k, old_v, old_places = before.cached()
        k, v = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)
        if q.shape[1] == 1 and not padded and self.slopes is None:
            return softmax_attention(q, k, v, sink=self.sink_score), after  # all that the state holds is in sight
        if not padded and (self.slopes is None or not self.sinks):
            # The keys follow one another, but for a gap after the sinks, and sinks are in sight wherever they are:
            # places in the row say nothing new, and without them the op leaves out what is beyond the window.
            return self._score(new, k, v, None, None), after
        k_places = torch.cat([old_places, places.expand(len(old_places), -1)], 1)
        return self._score(new, k, v, places, k_places), after

    def _score(self, new: Tokens, k: Tensor, v: Tensor, q_position: Tensor | None, k_position: Tensor | None) -> Tensor:
        return softmax_attention(
            new.q,
            k,
            v,
            scale=self.head_dim**-0.5,
            window=self.window,
            sinks=self.sinks,
            slopes=self.slopes,
            sink=self.sink_score,
            q_position=q_position,
            k_position=k_position,
        )

    def _limited(self, q: Tensor, k: Tensor, v: Tensor, places: Tensor, before: WindowState | None) -> Tensor:
        """Attention with a dilation or a distance limit; k, v and places are the new tokens'."""
        all_k, all_v, at, read = k, v, places, 0
        if before is not None:
            old = before.position if len(places) > 1 else before.position[:1]  # unpadded rows are alike
            all_k = torch.cat((before.keys.transpose(1, 2), k), 1)
            all_v = torch.cat((before.values.transpose(1, 2), v), 1)
            at, read = torch.cat((old, places), 1), before.length
        sinks = None
        if self.sinks:
            # Sinks are in their slots, still in the window, or new.
            match = at[:, None] == torch.arange(self.sinks, device=q.device)[:, None]
            chosen = match.to(torch.uint8).argmax(-1)
            rows = torch.arange(len(q), device=q.device)[:, None]
            sinks = Sinks(all_k[rows, chosen], all_v[rows, chosen], match.any(-1), self.max_distance)
            if self.max_distance is not None and self.rotary:
                # Each sink is turned back to place 0 and each query to that of the limit, whatever was their place.
                first = read - places[:, :1]  # the place in what was read of each row's first token
                sinks.far_k = self._rotated_further(sinks.k, -first - torch.arange(self.sinks, device=q.device))
                queries = torch.arange(read, read + q.shape[1], device=q.device)
                sinks.far_q = self._rotated_further(q, self.max_distance - queries)
            if before is not None:
                all_k, all_v, at = all_k[:, self.sinks :], all_v[:, self.sinks :], at[:, self.sinks :]
        return window_attention(
            q, all_k, all_v, at, self.window, self.dilation, sinks, self.head_dim**-0.5, self.slopes
        )

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length."""
        kept = WindowState.bytes_for(self.reach, self.sinks, batch, self.kv_heads, self.head_dim, self.head_dim, dtype)
        return kept + self._conv_nbytes(batch, dtype)

    def _pairs(self, length: int) -> int:
        # Beyond the sinks the t-th key of a window is in sight from (t - 1) dilation tokens after the first on.
        sunk, rest = min(length, self.sinks), max(0, length - self.sinks)
        keys = min(self.window, -(-rest // self.dilation))
        near = keys * rest - self.dilation * keys * (keys - 1) // 2
        return near + sunk * (sunk + 1) // 2 + rest * sunk
