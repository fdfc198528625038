"""Training-free scores of the tokens held, by their keys or places alone: no query is needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from contextlab.errors import check_whole
from contextlab.ops.kv import KVLayer, values_of
from contextlab.ops.precision import working_dtype
from contextlab.ops.softmax import softmax_attention
from contextlab.policies.core.ranking import coarse
from contextlab.policies.core.slots import KeptState, Slots
from contextlab.policies.eviction.base import EvictionPolicy
from contextlab.policies.eviction.seen import Seen
from contextlab.registry import register


@register(
    "policy",
    "streaming_llm",
    family="by key",
    papers=("2309.17453", "2308.16137"),
    cases=({}, {"reposition": True}),
)
@dataclass(eq=False)
class StreamingLLM(EvictionPolicy):
    """Attention sinks and the last tokens: the rest is dropped (StreamingLLM, LM-Infinite).

    Inside a piece, too, a token sees the sinks and the last tokens only, as many as the budget holds.

    window: the least number of last tokens that the budget must hold.
    every: slots made free at a time while decoding; default an eighth; 1 makes the result independent of pieces.
    reposition: whether tokens take the positions that they have among those held, as in the paper.
    """

    only_scores = False
    window: int = 1

    @property
    def chunk_invariant(self) -> bool:
        """See `Policy.chunk_invariant`."""
        fixed = self.every == 1 and self.allowed.kind != "ratio" and not self.reposition
        return self.lossless and (self.allowed.everything or fixed)

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the later, the more important."""
        return seen.positions.to(torch.float32)

    def _answer(
        self, layer: KVLayer, q: Tensor, slots: Slots, state: KeptState, places: Tensor, padded: bool
    ) -> tuple[Tensor, Tensor | None]:
        limit = self.slots(layer, slots.length, len(q), q.dtype)
        if q.shape[1] == 1 or slots.used <= limit:
            return super()._answer(layer, q, slots, state, places, padded)
        # Without padding slots do for places: those held are the first tokens and the last. ALiBi counts the gap.
        at = slots["position"][:, 0].long() if padded or layer.slopes is not None else None
        keys = slots["keys"].transpose(1, 2)
        y = softmax_attention(
            q, keys, values_of(keys, slots["values"].transpose(1, 2)), scale=layer.scale,
            window=limit - self.sinks, sinks=self.sinks, slopes=layer.slopes, sink=layer.sink,
            cap=layer.cap, q_position=None if at is None else places, k_position=at,
        )  # fmt: skip
        return y, None


@register("policy", "key_norm", family="by key", papers=("2406.11430",), cases=({"every": 1, "reposition": True},))
@dataclass(eq=False)
class KeyNorm(EvictionPolicy):
    """Key norm: the tokens with the smallest keys, which in trained models tend to get the most attention.

    Differs from the paper in that every layer is compressed; there the first two are left whole.

    sinks: first tokens of each row that are never dropped; the paper protects none.
    window: last tokens that are never dropped; the paper protects none.
    """

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the key's negated L2 norm."""
        # Rotation leaves a norm as it is but for rounding, which must not choose between equal tokens: 16 bits count.
        return -coarse(_widened(seen.keys).norm(dim=-1).to(torch.float32))


@register("policy", "keydiff", family="by key", papers=("2504.15364",))
@dataclass(eq=False)
class KeyDiff(EvictionPolicy):
    """KeyDiff: the tokens whose keys are unlike the others'.

    A key's importance is its negated cosine similarity with the mean of the normalised keys that its head holds.

    sinks: first tokens of each row that are never dropped; the paper protects none.
    window: last tokens that are never dropped; the paper protects none.
    """

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the negated cosine with the heads' mean direction."""
        keys, there = _widened(seen.keys), (seen.positions >= 0)[..., None]
        mean = (normalize(keys, dim=-1) * there).sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp_min(1)
        return -cosine_similarity(keys, mean, dim=-1)


@register("policy", "random", family="by key", cases=({"seed": 1, "every": 1},))
@dataclass(eq=False)
class Random(EvictionPolicy):
    """Chance: a floor for every score. Each head keeps tokens drawn uniformly.

    A token's importance depends on the seed, the layer, the head and the token's place alone, so that what is kept of
    a prompt is the same in any pieces and any batch.

    seed: of the draws.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(seed=(self.seed, 0))

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: 24 bits that are as good as random."""
        heads = torch.arange(seen.layer.kv_heads, device=seen.positions.device)[:, None]
        x = mixed(mixed(mixed(heads + self.seed * 65_599) + seen.layer.index) + seen.positions.clamp_min(0))
        return (x >> 8).to(torch.float32)  # as many bits as float32 tells apart


def _widened(x: Tensor) -> Tensor:
    """x in float32 at least: half precision would make many tokens the same."""
    return x.to(working_dtype(x.dtype))


def mixed(x: Tensor) -> Tensor:
    """int64 [...] -> 32 bits of which each depends on all bits of x: by products and shifts, the same everywhere."""
    x = x & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # odd factors and shifts: no two numbers fall together
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)
