"""Merging: what is dropped leaves something of itself in the tokens that are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from contextlab.errors import InputError, check_whole
from contextlab.ops.kv import SCORES, KVLayer
from contextlab.policies.core.slots import KeptState, gathered
from contextlab.policies.eviction.by_attention import H2O, within
from contextlab.policies.eviction.by_key import mixed
from contextlab.policies.eviction.seen import Seen
from contextlab.registry import register
from contextlab.state import tensor_bytes


@register(
    "policy", "cam", family="merging", cases=({"merge": 4}, {"merge": 2, "by": "attention", "seed": 3, "every": 1})
)
@dataclass(eq=False)
class CaM(H2O):
    """CaM, cache merging: the value of a dropped token is shared among the kept tokens that follow it (ICML 2024).

    With the probability min(1, a / m), a being the attention that the dropped token got so far and m the mean of that
    of the next `merge` kept tokens, its value divided by `merge` is added to each of theirs; so what the attention
    to these adds to an output is, on average, what it would have taken from the dropped one. Differs from the paper
    in that tokens that are dropped at once, at the end of a prompt, are merged at once, where the authors' code goes
    through the prompt token by token; and in that chance depends on seed, layer, head and the token's place alone.

    sinks: first tokens of each row that are never dropped.
    window: last tokens that are never dropped; at least `merge`.
    merge: kept tokens that share a dropped token's value.
    by: what is kept: the "recent" tokens, as in the authors' code, or those with the most "attention" so far (H2O).
    seed: of chance.
    every: slots made free at a time while decoding; default an eighth; 1 as in the paper.
    """

    values_apart = "merges values and not keys"

    only_scores = False
    sinks: int = 4
    merge: int = 16
    by: Literal["recent", "attention"] = "recent"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        within("merge", self.merge, self.window)
        check_whole(seed=(self.seed, 0))

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the later the more important, or the attention received so far."""
        return seen.positions.to(torch.float32) if self.by == "recent" else super().score(seen)

    def merged(
        self, layer: KVLayer, state: KeptState, index: Tensor, left: Tensor, kept: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `EvictionPolicy.merged`."""
        assert state.mass is not None
        gone, real = dropped(state, index, left)
        if not gone.shape[2]:
            return kept, state.notes
        # The window is kept, so at least `merge` kept tokens follow a dropped one.
        after = torch.searchsorted(_rising(index, left), gone).clamp_max(index.shape[2] - 1)
        kept_mass = gathered(state.mass, index)
        following = pad(kept_mass, (0, self.merge - 1)).unfold(2, self.merge, 1).mean(3)
        mass = gathered(state.mass, gone)
        chance = mass / following.gather(2, after)
        places = state.positions.long().gather(2, gone)
        heads = torch.arange(layer.kv_heads, device=gone.device)[:, None]
        draw = mixed(mixed(mixed(heads + self.seed * 65_599) + layer.index) + places.clamp_min(0))
        joins = real & ((draw >> 8) / 2**24 < chance)
        share = gathered(state.slots["values"], gone) / self.merge * joins[..., None]
        given = torch.zeros_like(kept["values"]).scatter_add(2, after[..., None].expand(share.shape), share)
        given = pad(given, (0, 0, self.merge - 1, 0)).unfold(2, self.merge, 1).sum(4)
        return {**kept, "values": kept["values"] + given}, state.notes


def _rising(index: Tensor, left: Tensor) -> Tensor:
    """The kept slots [B, Hkv, n], with -1 where there is no token, so that each row rises."""
    empty = torch.arange(index.shape[2], device=index.device) < index.shape[2] - left[:, None, None]
    return index.masked_fill(empty, -1)


def dropped(state: KeptState, index: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """The slots [B, Hkv, d] int64 of the tokens that are not kept, and whether [B, Hkv, d] there is one.

    index, left: see `EvictionPolicy.kept`.
    """
    used = state.slots.used
    if not state.padded:
        stays = torch.zeros(*index.shape[:2], used, dtype=torch.uint8, device=index.device).scatter(2, index, 1)
        gone = stays.argsort(dim=2, stable=True)[..., : used - index.shape[2]].contiguous()
        return gone, torch.ones_like(gone, dtype=torch.bool)
    stays = torch.zeros(*index.shape[:2], used + 1, dtype=torch.bool, device=index.device)
    stays = stays.scatter(2, _rising(index, left) + 1, True)[..., 1:]  # -1, no token, falls into the first place
    goes = ~stays & (state.positions >= 0)
    count = int(goes.sum(2).max())
    gone = goes.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[..., :count].contiguous()
    return gone, goes.gather(2, gone)


@register("policy", "weighted_kv", family="merging", papers=("2503.01330",), cases=({}, {"sinks": 2, "every": 1}))
@dataclass(eq=False)
class WeightedKV(H2O):
    """WeightedKV: keys of dropped tokens are gone, values are merged into that of the next kept token.

    A kept token's value becomes the mean of its own and those of the dropped tokens right before it, weighted by the
    mean attention that each of them got from the queries that could see it. The tokens with the least such attention
    are dropped.

    sinks: first tokens of each row that are never dropped.
    window: last tokens that are never dropped.
    every: slots made free at a time while decoding; default an eighth; 1 drops token by token.
    """

    values_apart = "merges values and drops keys"

    only_scores = False

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the mean attention of the queries that could see the token."""
        assert seen.mass is not None
        last = seen.positions.amax(2, keepdim=True)
        return seen.mass / (last - seen.positions + 1)

    def merged(
        self, layer: KVLayer, state: KeptState, index: Tensor, left: Tensor, kept: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `EvictionPolicy.merged`."""
        gone, real = dropped(state, index, left)
        if not gone.shape[2]:
            return kept, state.notes
        values = kept["values"]
        weight = self.score(self.seen(layer, state)).to(values.dtype)
        lost = gathered(weight, gone) * real
        after = torch.searchsorted(_rising(index, left), gone).clamp_max(index.shape[2] - 1)
        own = gathered(weight, index)
        total = own.scatter_add(2, after, lost)[..., None]
        given = gathered(state.slots["values"], gone) * lost[..., None]
        summed = (values * own[..., None]).scatter_add(2, after[..., None].expand(given.shape), given)
        merged = torch.where(
            total > own[..., None], summed / total.clamp_min(1e-30), values
        )  # alone it stays exactly as it is
        return {**kept, "values": merged}, state.notes


@register("policy", "d2o", family="merging", papers=("2406.13035",), cases=({}, {"memory": 1.0, "every": 1}))
@dataclass(eq=False)
class D2O(H2O):
    """D2O's compensation: a dropped token that is like a kept one is merged into it, key and value.

    Each dropped key finds the kept key of its head with which its cosine is highest. It is merged if that cosine u is
    at least a threshold: the mean of these cosines at the first eviction, then a running mean of them. A kept token
    and those that are merged into it are averaged with weights e and exp(u). Keys are compared and merged as held,
    with their rotations. Differs from the paper in that the layers' budgets do not follow the variance of their
    attention; pyramid can divide them.

    sinks: first tokens of each row that are never dropped.
    window: last tokens that are never dropped.
    memory: part in [0, 1] of the threshold that is the cosines of the latest eviction; the rest is its past.
    every: slots made free at a time while decoding; default an eighth; 1 as in the paper.
    """

    only_scores = False
    sinks: int = 4
    memory: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.memory, bool) or not isinstance(self.memory, int | float) or not 0 <= self.memory <= 1:
            raise InputError(f"memory: expected a part from 0 to 1, got {self.memory!r}")

    def notes_nbytes(self, layer: KVLayer, batch: int, dtype: torch.dtype) -> int:
        """See `EvictionPolicy.notes_nbytes`: a threshold for each head."""
        return tensor_bytes(batch, layer.kv_heads, dtype=dtype)

    def merged(
        self, layer: KVLayer, state: KeptState, index: Tensor, left: Tensor, kept: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `EvictionPolicy.merged`; notes: "threshold" [B, Hkv], minus infinity before the first eviction."""
        gone, real = dropped(state, index, left)
        if not gone.shape[2]:
            return kept, state.notes
        keys, values = gathered(state.slots["keys"], gone), gathered(state.slots["values"], gone)
        nearest, into = most_alike(keys, kept["keys"], _rising(index, left) >= 0)
        count = real.sum(2)
        now = (nearest * real).sum(2) / count.clamp_min(1)
        past = state.notes.get("threshold", torch.full_like(now, -math.inf))
        threshold = torch.where(past.isinf(), now, self.memory * now + (1 - self.memory) * past)
        threshold = torch.where(count > 0, threshold, past)
        # Rounding must not part a token from a threshold that is its own cosine: the mean of one.
        joins = real & (nearest >= threshold[..., None] - 1e-6)
        weight = nearest.exp() * joins
        total = torch.full_like(kept["keys"][..., 0], math.e).scatter_add(2, into, weight)[..., None]
        merged = {}
        for name, own, lost in (("keys", kept["keys"], keys), ("values", kept["values"], values)):
            given = lost * weight[..., None]
            summed = (own * math.e).scatter_add(2, into[..., None].expand(given.shape), given)
            merged[name] = torch.where(total > math.e, summed / total, own)  # alone it stays exactly as it is
        return {**kept, **merged}, {"threshold": threshold}


def most_alike(x: Tensor, among: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The highest cosine of each x [B, H, d, D] with `among` [B, H, n, D] where real [B, H, n]; and whose it is.

    Both [B, H, d]. In blocks, so that the memory is O(d + n).
    """
    among = normalize(among, dim=-1)
    block = max(1, SCORES // max(1, among.shape[0] * among.shape[1] * among.shape[2]))
    found = [
        (normalize(part, dim=-1) @ among.mT).masked_fill(~real[:, :, None], -math.inf).max(3)
        for part in x.split(block, 2)
    ]
    return torch.cat([each.values for each in found], 2), torch.cat([each.indices for each in found], 2)
