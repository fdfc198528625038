"""Training-free scores of the tokens held, by estimates of the attention that is to come."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from contextlab.errors import InputError, check_whole
from contextlab.ops.kv import KVLayer
from contextlab.ops.softmax import capped
from contextlab.policies.core.base import in_own_places
from contextlab.policies.eviction.base import EvictionPolicy
from contextlab.policies.eviction.seen import Seen
from contextlab.registry import register
from contextlab.state import tensor_bytes


@register(
    "policy",
    "expected_attention",
    family="by estimate",
    papers=("2510.00636",),
    cases=({}, {"covariance": False, "future": 7}),
)
@dataclass(eq=False)
class ExpectedAttention(EvictionPolicy):
    """Expected attention: the tokens that queries like those so far will attend to from the places ahead.

    Queries before their rotation are taken as normal with the mean and covariance of all so far (without those of the
    first `sinks` tokens), and turned by the average rotation of the next `future` places. A token's share of the
    expectations of exp(score), averaged over the query heads of its key head, times its value's L2 norm. Differs from
    the paper in that the statistics are of all queries while decoding, too, and that the last tokens are kept.

    budget: what may be kept: "10%", "512tok", "64MB"; the statistics count.
    window: last tokens that are never dropped; the paper protects none.
    future: places ahead over which rotations are averaged.
    covariance: whether the covariance counts; it takes head size x head size numbers a query head.
    epsilon: added to the expected attention before it is multiplied by the value's norm.
    """

    future: int = 512
    covariance: bool = True
    epsilon: float = 0.0
    reposition: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(future=(self.future, 1))
        if not 0 <= self.epsilon < math.inf:
            raise InputError(f"epsilon: expected a number of at least 0, got {self.epsilon!r}")

    @property
    def turns(self) -> bool:
        """See `Policy.turns`."""
        return True

    @property
    def needs(self) -> str:
        """See `Policy.needs`."""
        return "the mean and covariance of all queries" if self.covariance else "the mean of all queries"

    def check(self, layers: list[KVLayer]) -> None:
        """See `Policy.check`."""
        super().check(layers)
        if any(layer.slopes is not None for layer in layers):
            raise InputError("expected_attention: is not defined for ALiBi's bias; use snapkv")

    def notes_nbytes(self, layer: KVLayer, batch: int, dtype: torch.dtype) -> int:
        """See `EvictionPolicy.notes_nbytes`."""
        numbers = layer.heads * layer.key_dim * (1 + layer.key_dim * self.covariance)
        return tensor_bytes(batch, numbers) + tensor_bytes(batch, dtype=torch.int64)

    def remember(
        self, layer: KVLayer, notes: dict[str, Tensor], q: Tensor, places: Tensor, length: int
    ) -> dict[str, Tensor]:
        """See `EvictionPolicy.remember`: "count" [B], "mean" [B, H, D] and "spread" [B, H, D, D] of unrotated queries.

        The spread is the sum of the outer products of what differs from the mean, so that it loses no digits.
        """
        with torch.no_grad():
            if layer.turn is not None:
                at = torch.arange(length, length + q.shape[1], device=q.device)
                q = layer.turn(q, -at[None, :, None])
            q = q.transpose(1, 2).to(torch.float32)
            weight = (places >= self.sinks)[:, None, :, None]
            if notes and q.shape[2] == 1:  # a single query is its own mean, and nothing differs from it
                count, mean, spread = weight.view(-1).to(torch.int64), q[:, :, 0], None
            else:
                count = weight.sum((1, 2, 3))
                mean = (q * weight).sum(2) / count.clamp_min(1)[:, None, None]
                apart = (q - mean[:, :, None]) * weight
                spread = apart.mT @ apart if self.covariance else None
            if not notes:
                return {"count": count, "mean": mean, **({} if spread is None else {"spread": spread})}
            both = count + notes["count"]
            part = (count.to(mean.dtype) / both.clamp_min(1))[:, None, None]
            further = mean - notes["mean"]
            merged = {"count": both, "mean": notes["mean"] + part * further}
            if self.covariance:
                moved = (part * notes["count"][:, None, None] * further)[..., None] * further[..., None, :]
                merged["spread"] = moved.add_(notes["spread"])
                if spread is not None:
                    merged["spread"] += spread
            return merged

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the expected attention, times the value's norm."""
        layer, keys = seen.layer, seen.keys.to(torch.float32)
        groups = (layer.kv_heads, layer.heads // layer.kv_heads)
        mean = seen.notes["mean"]
        ahead = self._average_rotation(layer, seen.length, mean)
        logits = (mean @ ahead).unflatten(1, groups) @ keys.mT * layer.scale  # [B, Hkv, G, N]
        logits = capped(logits, layer.cap)  # to the first order, a capped score is normal as the score is
        if self.covariance:
            covariance = seen.notes["spread"] / seen.notes["count"].clamp_min(1)[:, None, None, None]
            covariance = (ahead.mT @ covariance @ ahead).unflatten(1, groups)
            spread = ((keys[:, :, None] @ covariance) * keys[:, :, None]).sum(-1)
            steepness = 1.0 if layer.cap is None else 1 - (logits / layer.cap).square()
            logits = logits + spread * (layer.scale * steepness) ** 2 / 2
        apart = seen.positions < self.sinks  # these would take it all; slots without a token, too
        share = logits.masked_fill(apart[:, :, None], -math.inf).softmax(-1).nan_to_num(0.0).mean(2)
        return (share + self.epsilon) * seen.values.to(torch.float32).norm(dim=-1)

    def _average_rotation(self, layer: KVLayer, first: int, like: Tensor) -> Tensor:
        """[D, D], by which row vectors are multiplied: the mean of the rotations to places first, first + 1 .."""
        identity = torch.eye(layer.key_dim, dtype=like.dtype, device=like.device)
        if layer.turn is None:
            return identity

        def turned(x: Tensor, steps: int) -> Tensor:
            assert layer.turn is not None
            return layer.turn(x[None, None], torch.full((1, 1, 1), steps, device=x.device))[0, 0]

        # The sum over twice as many places is that over the first half, and the same again that many steps on.
        total, block, size, done = torch.zeros_like(identity), identity, 1, 0
        while done < self.future:
            if self.future & size:
                total, done = total + turned(block, done), done + size
            block, size = block + turned(block, size), 2 * size
        return turned(total, first) / self.future


@register(
    "policy",
    "hash_evict",
    family="by estimate",
    papers=("2412.16187",),
    cases=({"bits": 5, "seed": 1, "every": 1},),
)
@dataclass(eq=False)
class HashEvict(EvictionPolicy):
    """HashEvict: the tokens whose keys point where the new query does, by the signs of random projections.

    The number of signs in which the codes of key and query agree, over the query heads of a key head. It is judged
    before the query is answered. Differs from the paper in that a key's code is made anew when it is judged, from the
    key that is held, instead of being held, too.

    bits: signs in a code.
    seed: of the projections, which are normal.
    every: slots made free at a time while decoding; default an eighth; 1 as in the paper.
    """

    pre_attention = True
    window: int = 10
    bits: int = 16
    seed: int = 0
    reposition: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(bits=(self.bits, 1), seed=(self.seed, 0))

    def score(self, seen: Seen) -> Tensor:
        """See `EvictionPolicy.score`: the codes' agreements, less the disagreements."""
        assert seen.queries is not None
        layer, q, keys = seen.layer, seen.queries[:, -1:], seen.keys
        if seen.visible is not None and self.lossless:  # signs depend on the rotation that key and query share
            start = seen.length - 1 - seen.positions[:, 0, -1]
            q = in_own_places(layer, q, start)
            keys = in_own_places(layer, keys.transpose(1, 2), start).transpose(1, 2)
        generator = torch.Generator().manual_seed(self.seed)
        planes = torch.randn(layer.key_dim, self.bits, generator=generator).to(keys)
        query = layer.per_kv_head(_signs(q[:, 0] @ planes))
        return (_signs(keys @ planes) @ query[..., None])[..., 0]


def _signs(x: Tensor) -> Tensor:
    """1 where x is at least 0, else -1."""
    return (x >= 0).to(torch.float32) * 2 - 1
