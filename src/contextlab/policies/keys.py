"""Training-free scores of the tokens held, by their keys or places alone: no query is needed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from contextlab.errors import check_whole
from contextlab.policies.base import EvictionPolicy, Seen
from contextlab.policies.eviction import Amount
from contextlab.registry import register


@register("policy", "key_norm", papers=("2406.11430",), cases=({"every": 1, "reposition": True},))
class KeyNorm(EvictionPolicy):
    """Key norm: the tokens with the smallest keys, which in trained models tend to get the most attention.

    Differs from the paper in that every layer is compressed; there the first two are left whole.

    budget: what may be kept: "10%", "512tok", "64MB".
    sinks: first tokens of each row that are never dropped; the paper protects none.
    window: last tokens that are never dropped; the paper protects none.
    every: slots made free at a time while decoding; default an eighth.
    pyramid, reposition: see `EvictionPolicy`.
    """

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the key's negated L2 norm."""
        # Rotation leaves a norm as it is but for rounding, which must not choose between equal tokens: 16 bits count.
        part, exponent = _widened(seen.keys).norm(dim=-1).to(torch.float32).frexp()
        return -torch.ldexp((part * 2**16).round(), exponent)


@register("policy", "keydiff", papers=("2504.15364",))
class KeyDiff(EvictionPolicy):
    """KeyDiff: the tokens whose keys are unlike the others'.

    A key's importance is its negated cosine similarity with the mean of the normalised keys that its head holds.

    budget: what may be kept: "10%", "512tok", "64MB".
    sinks: first tokens of each row that are never dropped; the paper protects none.
    window: last tokens that are never dropped; the paper protects none.
    every: slots made free at a time while decoding; default an eighth.
    pyramid, reposition: see `EvictionPolicy`.
    """

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the negated cosine with the heads' mean direction."""
        keys, held = _widened(seen.keys), (seen.positions >= 0)[..., None]
        mean = (normalize(keys, dim=-1) * held).sum(2, keepdim=True) / held.sum(2, keepdim=True).clamp_min(1)
        return -cosine_similarity(keys, mean, dim=-1)


@register("policy", "random", cases=({"seed": 1, "every": 1},))
class Random(EvictionPolicy):
    """Chance: a floor for every score. Each head keeps tokens drawn uniformly.

    A token's importance depends on the seed, the layer, the head and the token's place alone, so that what is kept of
    a prompt is the same in any pieces and any batch.

    budget: what may be kept: "10%", "512tok", "64MB".
    sinks: first tokens of each row that are never dropped.
    window: last tokens that are never dropped.
    seed: of the draws.
    every: slots made free at a time while decoding; default an eighth.
    pyramid, reposition: see `EvictionPolicy`.
    """

    def __init__(
        self,
        budget: Amount = None,
        sinks: int = 4,
        window: int = 32,
        seed: int = 0,
        every: int | None = None,
        pyramid: float | None = None,
        reposition: bool = False,
    ) -> None:
        super().__init__(budget, sinks, window, every, pyramid, reposition)
        check_whole(seed=(seed, 0))
        self.seed = seed

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: 24 bits that are as good as random."""
        heads = torch.arange(seen.layer.kv_heads, device=seen.positions.device)[:, None]
        x = mixed(mixed(mixed(heads + self.seed * 65_599) + seen.layer.index) + seen.positions.clamp_min(0))
        return (x >> 8).to(torch.float32)  # as many bits as float32 tells apart


def _widened(x: Tensor) -> Tensor:
    """x in float32 at least: half precision would make many tokens the same."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mixed(x: Tensor) -> Tensor:
    """int64 -> 32 bits of which each depends on all bits of x: multiplications and shifts, the same everywhere."""
    x = x & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # odd factors and shifts: no two numbers fall together
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)
