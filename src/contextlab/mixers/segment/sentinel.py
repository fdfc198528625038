"""Sentinel tokens: each segment leaves a few keys and values in place of its own."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from contextlab.mixers.base import Signature
from contextlab.mixers.layers import Linear, RMSNorm, multiplications
from contextlab.mixers.segment.base import SegmentAttention, SegmentState
from contextlab.ops.position import rope_table, rotate
from contextlab.ops.softmax import attend
from contextlab.registry import register
from contextlab.state import tensor_bytes


@register(
    "mixer",
    "sentinel",
    family="segment",
    papers=("2310.08152", "2401.03462", "2406.10985"),
    cases=(
        {"segment": 8},
        {"segment": 5, "sentinels": 1, "heads": 2, "head_dim": 4, "look_back": False, "own_maps": False},
        {"segment": 2, "sentinels": 3},
    ),
)
class Sentinel(SegmentAttention):
    """Sentinel (beacon) tokens: a full segment is condensed into the keys and values of a few learned tokens.

    A token sees the sentinels of all complete segments and, causally, its own segment's tokens. After s tokens c
    sentinels read the segment, and the sentinels before; their keys and values stay, the segment's go, so that the
    state grows as c / s of a full cache.

    What differs from the papers: there the sentinels pass through all layers with the tokens, and what they have read
    in one is in their keys and values of the next. Here each layer has its own, and a sentinel's key and value are
    made of its embedding plus what it read, normed. Sentinel tokens (2310.08152) end spans of any length and read
    their span alone: look_back False, own_maps False. Activation Beacon (2401.03462) spreads its beacons over a
    chunk and gives them maps of their own. The sentinels of 2406.10985 are seen besides the tokens, which stay.

    width: size of a token's vector.
    segment: tokens of a segment, s.
    sentinels: tokens that a segment leaves, c.
    look_back: a sentinel reads the sentinels before its segment too; False for its segment alone.
    own_maps: sentinels have their own query, key and value maps; False for those of the tokens.
    heads: number of heads.
    head_dim: size of a head; default width / heads.
    rope_base: base of the rotary frequencies; a complete segment takes up as many places as it has sentinels.
    """

    def __init__(
        self,
        width: PositiveInt,
        segment: PositiveInt = 64,
        sentinels: PositiveInt = 4,
        look_back: bool = True,
        own_maps: bool = True,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(width, segment, heads, head_dim, rope_base)
        self.sentinels, self.look_back = sentinels, look_back
        self.embedding = nn.Parameter(torch.randn(sentinels, width))
        self.sentinel_proj = Linear(width, self.values) if own_maps else None
        self.read_out = Linear(heads * self.head_dim, width)
        self.norm = RMSNorm(width, eps=1e-6)
        own = torch.ones(segment + sentinels, segment, dtype=torch.bool).tril()
        self.own: Tensor  # which of its segment's keys a token sees, and then a sentinel
        self.register_buffer("own", own, persistent=False)
        # Told, since the base finds out which sizes grow from 70 tokens, which may be less than a segment.
        left = (sentinels, 2, heads, self.head_dim)
        self._expected = Signature(
            SegmentState, ("tokens", "waiting", "left", "count"), ((segment - 1, self.values), (), (None, *left), ())
        )

    def _start(self, x: Tensor) -> dict[str, Tensor]:
        shape = (x.shape[0], 0, self.sentinels, 2, self.heads, self.head_dim)
        return {"left": x.new_zeros(shape), "count": torch.zeros(len(x), dtype=torch.int64, device=x.device)}

    def _grown(self, memory: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        left = memory["left"]
        more = length // self.segment - left.shape[1]
        if more <= 0:
            return memory
        return {**memory, "left": torch.cat((left, left.new_zeros(len(left), more, *left.shape[2:])), 1)}

    def _read(self, tokens: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        left, count = memory["left"], memory["count"]
        maps = self.qkv_proj if self.sentinel_proj is None else self.sentinel_proj
        q, k, v = self._heads(tokens)
        asks = self._heads(maps(self.embedding)[None])[0].expand(len(q), -1, -1, -1)
        # Places are a row's own: with padding, rows have read different numbers of segments.
        first = count[:, None] * self.sentinels
        places = first + torch.arange(self.segment + self.sentinels, device=count.device)
        table = rope_table(places, self.rotary, self.rope_base, k.dtype)
        q, k = rotate(torch.cat((q, asks), 1), table), rotate(k.contiguous(), table[:, : self.segment])
        old_k, old_v = left.flatten(1, 2).unbind(2)
        written = torch.arange(left.shape[1], device=count.device) < count[:, None]
        older = written.repeat_interleave(self.sentinels, 1)[:, None].expand(-1, q.shape[1], -1)
        if not self.look_back:
            older = older & (torch.arange(q.shape[1], device=count.device) < self.segment)[:, None]
        mask = torch.cat((older, self.own.expand(len(q), -1, -1)), 2)[:, None]
        read = attend(q, torch.cat((old_k, k), 1), torch.cat((old_v, v), 1), None, mask).flatten(2)
        summary = self.norm(self.embedding + self.read_out(read[:, self.segment :]))
        _, new_k, new_v = self._heads(maps(summary))
        new = torch.stack((rotate(new_k.contiguous(), table[:, : self.sentinels]), new_v), 2)
        here = torch.arange(left.shape[1], device=count.device) == count[:, None]
        after = torch.where(here[..., None, None, None, None], new[:, None], left)
        return self.out_proj(read[:, : self.segment]), {"left": after, "count": count + 1}

    def _memory_nbytes(self, length: int, batch: int, dtype: torch.dtype) -> int:
        left = self.sentinels * 2 * self.heads * self.head_dim
        return tensor_bytes(batch, length // self.segment, left, dtype=dtype) + tensor_bytes(batch, dtype=torch.int64)

    def _extra_flops(self, segments: int, length: int) -> int:
        begun, inner = -(-length // self.segment), self.heads * self.head_dim
        queries = self.segment + self.sentinels
        # Every segment goes over the whole buffer, what is not yet written masked.
        pairs = begun * (queries * segments + self.segment) * self.sentinels
        maps = begun * self.sentinels * (2 * multiplications(self.qkv_proj) + multiplications(self.read_out))
        return 4 * pairs * inner + 2 * maps
