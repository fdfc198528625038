"""The oracle: a ceiling, which keeps what the queries to come would miss most."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.kv import SCORES, KVLayer
from contextlab.ops.softmax import capped
from contextlab.policies.eviction.seen import Seen
from contextlab.policies.eviction.two_pass import Read, Recorder, TwoPassPolicy
from contextlab.registry import register


def leave_one_out(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    *,
    scale: float,
    visible: Tensor | None = None,
    real: Tensor | None = None,
    slopes: Tensor | None = None,
    cap: float | None = None,
    place: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """How much the attention outputs of queries to come would change without each token that is held.

    For one query with weights p and output y, dropping token j gives (y - p_j v_j) / (1 - p_j), which is
    p_j / (1 - p_j) (y - v_j) away from y; the squares of that are summed over queries and heads that share a key head.

    q: [B, F, H, D], of the tokens to come. keys: [B, Hkv, N, D] and values: [B, Hkv, N, V], held.
    new_keys: [B, Hkv, F, D], new_values: [B, Hkv, F, V], of the tokens to come, which see each other causally.
    visible: [B, N] or [B, Hkv, N] bool, where a slot holds a token; None for all. real: [B, F] bool, which queries
        count; None for all.
    slopes: [H] of ALiBi; then place [B, F] and position [B, Hkv, N] tell where tokens stand.
    cap: see `KVLayer`.

    Returns [B, Hkv, N] float64; infinite where a query would see nothing else. One pass over blocks of queries.
    """
    batch, length, heads, _ = q.shape
    kv_heads, slots = keys.shape[1:3]
    shared = heads // kv_heads
    block = max(1, SCORES // max(1, batch * heads * (slots + length)))
    all_keys, all_values = torch.cat((keys, new_keys), 2), torch.cat((values, new_values), 2)
    squares = values.square().sum(-1)[:, :, None, None]  # [B, Hkv, 1, 1, N]
    change = torch.zeros(batch, kv_heads, slots, dtype=torch.float64, device=q.device)
    rows = (q * scale).transpose(1, 2).unflatten(1, (kv_heads, shared))
    for first in range(0, length, block):
        last = min(first + block, length)
        stop = slots + last
        few = rows[..., first:last, :].flatten(2, 3)
        scores = capped(few @ all_keys[:, :, :stop].mT, cap).unflatten(2, (shared, -1))  # [B, Hkv, shared, count, stop]
        if slopes is not None:
            assert place is not None
            assert position is not None
            everywhere = torch.cat((position, place[:, None].expand(-1, kv_heads, -1)), 2)[:, :, None, None, :stop]
            slope = slopes.to(q).view(kv_heads, shared, 1, 1)
            scores = scores + slope * (everywhere - place[:, None, None, first:last, None])
        seen = torch.arange(stop, device=q.device) <= torch.arange(slots + first, stop, device=q.device)[:, None]
        if visible is not None:
            at = (visible[:, None] if visible.ndim == 2 else visible)[:, :, None, None]
            seen = seen & torch.nn.functional.pad(at, (0, last), value=True)
        scores = scores.masked_fill(~seen, -math.inf)
        p = scores.softmax(-1)
        y = p.flatten(2, 3) @ all_values[:, :, :stop]
        apart = (y.square().sum(-1, keepdim=True) - 2 * y @ values.mT).unflatten(2, (shared, -1)) + squares
        lost = (p[..., :slots] / (1 - p[..., :slots])).square() * apart.clamp_min(0)
        # Beside a weight near 1 the rest is lost in rounding; so a query's greatest weight is left out in earnest.
        top = p.argmax(-1, keepdim=True)
        rest = scores.scatter(-1, top, -math.inf).softmax(-1).flatten(2, 3) @ all_values[:, :, :stop]
        exact = (y - rest).square().sum(-1).nan_to_num(nan=math.inf).unflatten(2, (shared, -1))[..., None]
        lost = torch.where(torch.arange(slots, device=q.device) == top, exact, lost)
        if real is not None:
            lost = lost.masked_fill(~real[:, None, None, first:last, None], 0.0)
        change += lost.to(torch.float64).sum((2, 3))
    return change


@register("policy", "oracle", family="two-pass", cases=())
@dataclass(eq=False)
class Oracle(TwoPassPolicy):
    """A ceiling: keeps the tokens without which the queries to come would be answered most differently.

    It has read the whole text, what follows included (`watch`), so it is no method to use but one to compare with. A
    token's importance is how much dropping it alone would change the heads' outputs (before they are projected and
    added) for the text's queries to come, in squares; see `leave_one_out`. That is the best choice where one token is
    dropped and where the queries are those of the full cache; of several tokens dropped at once it is not the best of
    all subsets, whose number is too large, and what it knows of the text is not counted as memory.

    ahead: how many queries to come count; default all that were watched.
    """

    serves_sinks = False

    sinks: int = 0
    window: int = 1
    ahead: int | None = None
    reposition: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        ahead = self.ahead
        if ahead is not None and (isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 1):
            raise InputError(
                f"ahead: expected a whole number of at least 1, got {ahead!r}; leave it out to look at all that follows"
            )
        self._read: dict[int, Read] = {}

    @property
    def reads_first(self) -> Literal["", "prompt", "everything"]:
        """See `Policy.reads_first`."""
        return "everything"

    def _watch(
        self, model: Any, recorder: Recorder, layers: list[KVLayer], tokens: Tensor, mask: Tensor | None
    ) -> None:
        """See `TwoPassPolicy._watch`: all queries, keys and values of the text."""
        model.read(tokens, None, mask)
        self._read = recorder.last
        self._keys = self._read[0]

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the change of the outputs to come."""
        self._must_be_known(seen)
        if seen.length > self.watched:
            raise InputError(
                f"Oracle watched {self.watched} tokens, and the model reads one more; watch all that it is to read"
            )
        read, layer = self._read[seen.layer.index], seen.layer
        last = self.watched if self.ahead is None else min(self.watched, seen.length + self.ahead)
        future = slice(seen.length, last)
        place = torch.arange(seen.length, last, device=read.q.device) - read.start[:, None]
        return leave_one_out(
            read.q[:, future], seen.keys, seen.values, read.k[:, future].transpose(1, 2),
            layer.values(read.k, read.v)[:, future].transpose(1, 2), scale=layer.scale, visible=seen.visible,
            real=place >= 0, slopes=layer.slopes, cap=layer.cap, place=place, position=seen.positions,
        )  # fmt: skip
