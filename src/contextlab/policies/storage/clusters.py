"""Heads that look at the same tokens share the keys of one of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot, pad

from contextlab.errors import InputError, check_whole
from contextlab.ops.kv import SCORES, KVLayer, attend_cached, attention_rows
from contextlab.ops.softmax import capped
from contextlab.policies.core.base import Policy
from contextlab.registry import register
from contextlab.state import KVState, State

ROUNDS = 10
"""Of K-means; a layer has few heads, and from distant first centres they hardly change after two or three."""


@dataclass
class ClusteredState(State):
    """Keys of the heads that stand for others, and the values of all.

    kv: keys of all heads as long as `early` is there, then of C of them, [B, C, room, D]; values [B, Hkv, room, V].
    cluster: [B, Hkv] int64, each head's cluster. head: [B, C] int64, the head that stands for each cluster; as long as
        `early` is there, both are None.
    early: [B, tokens, H, D], the queries that tell which heads are alike, until every row has all of them.
    """

    kv: KVState
    cluster: Tensor | None = None
    head: Tensor | None = None
    early: Tensor | None = None


@register(
    "policy",
    "chai",
    family="sharing",
    papers=("2403.08058",),
    cases=({"clusters": 1, "tokens": 30}, {"clusters": 1, "tokens": 40}),
)
class CHAI(Policy):
    """CHAI, clustered head attention: heads that attended alike at first share the attention of one of them.

    The attention weights of the first `tokens` tokens say which heads of a layer are alike: each row's heads are
    clustered (K-means on what is left of the weights without their mean, at length 1: by correlation). From then on
    only the head next to a cluster's centre scores keys, for all of them, and the others' keys are dropped; every head
    keeps its values. In a batch with padding keys are dropped once all rows have so many tokens.
    Differs from the paper in that query heads with one key head in common (there are none there) are clustered
    together, and in that the number of clusters is given; there each layer's is found beforehand, at the elbow of the
    clustering error.

    clusters: heads of each layer that keep their keys, or a list with one number a layer; default half of them.
    tokens: first tokens by which heads are compared.
    """

    serves_caps = True

    values_apart = "drops keys of heads that keep their values"

    lossless = False

    def __init__(self, clusters: int | list[int] | None = None, tokens: int = 5) -> None:
        for name, value in (("clusters", clusters), ("tokens", tokens)):
            for each in value if isinstance(value, list) else [value]:
                if each is not None:
                    check_whole(**{name: (each, 1)})
        self.clusters, self.tokens = clusters, tokens

    @property
    def chunk_invariant(self) -> bool:
        """See `Policy.chunk_invariant`: what changes a token's answer is its place alone."""
        return True

    @property
    def needs(self) -> str:
        """See `Policy.needs`."""
        return f"the first {self.tokens} queries"

    def count(self, layer: KVLayer) -> int:
        """Clusters of this layer."""
        if self.clusters is None:
            return layer.kv_heads // 2
        return self.clusters[layer.index] if isinstance(self.clusters, list) else self.clusters

    def check(self, layers: list[KVLayer]) -> None:
        """See `Policy.check`."""
        if isinstance(self.clusters, list) and len(self.clusters) != len(layers):
            raise InputError(f"clusters: expected one number for each of the {len(layers)} layers, got {self.clusters}")
        for layer in layers:
            if layer.kv_heads == 1:
                raise InputError(f"chai: layer {layer.index} has one key head, so there is none to drop; take quantize")
            if self.count(layer) >= layer.kv_heads:
                raise InputError(
                    f"clusters: expected fewer than the {layer.kv_heads} key heads of layer {layer.index}, got "
                    f"{self.count(layer)}; take {layer.kv_heads - 1}"
                )

    def convert(self, layer: KVLayer, state: KVState) -> State:
        """See `Policy.convert`."""
        if state.length:
            raise InputError(
                "CHAI compares heads by the first queries, and a state does not hold those; attach it before reading"
            )
        early = state.keys.new_zeros(len(state.start), self.tokens, layer.heads, layer.key_dim)
        return ClusteredState(state, early=early)

    def attend(
        self,
        layer: KVLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: State | None,
        mask: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, State | None]:
        """See `Policy.attend`."""
        state = self._continued(ClusteredState, layer, k, v, state)
        if state.early is not None:
            return self._attend_early(layer, q, k, v, state, mask, keep_state)
        assert state.cluster is not None
        assert state.head is not None
        kv = state.kv.append(_of_heads(k, state.head), v, mask)
        y = clustered_attention(layer, q, kv, state.cluster, state.head)
        return y, dataclasses.replace(state, kv=kv, length=kv.length) if keep_state else None

    def _attend_early(
        self, layer: KVLayer, q: Tensor, k: Tensor, v: Tensor, state: ClusteredState, mask: Tensor | None, keep: bool
    ) -> tuple[Tensor, State | None]:
        """While some row has not had its first tokens; each token is answered by its own place in its row."""
        assert state.early is not None
        before, kv = state.kv.length, state.kv.append(k, v, mask)
        places = torch.arange(before, kv.length, device=q.device) - kv.start[:, None]
        last = int(kv.start.max()) if kv.padded else 0  # where the last row starts
        here = places.where((places >= 0) & (places < self.tokens), self.tokens)
        early = pad(state.early, (0, 0, 0, 0, 0, 1))
        early = early.scatter(1, here[:, :, None, None].expand(q.shape), q)[:, : self.tokens].contiguous()
        whole = min(q.shape[1], max(0, last + self.tokens - before))  # so many tokens are early in some row
        all_k, all_v = kv.cached()
        y = q.new_zeros(*q.shape[:3], layer.value_dim)
        if whole:
            first_k, first_v = (x[:, : before + whole].transpose(1, 2) for x in (all_k, all_v))
            at = (torch.arange(before + whole, device=q.device) - kv.start[:, None])[:, None]
            y[:, :whole] = attend_cached(
                q[:, :whole], first_k, first_v, scale=layer.scale, visible=at[:, 0] >= 0 if kv.padded else None,
                slopes=layer.slopes, cap=layer.cap, q_position=places[:, :whole],
                k_position=at.expand(-1, layer.kv_heads, -1),
            )  # fmt: skip
        cluster = head = None
        if kv.length >= self.tokens:
            cluster, head = self._clusters(layer, early, all_k, kv.start)
            late = places >= self.tokens
            if whole < q.shape[1] or (kv.padded and bool(late.any())):
                shared = clustered_attention(layer, q, kv, cluster, head, head_keys=_of_heads(all_k, head))
                y = torch.where(late[:, :, None, None], shared, y)
        if not keep:
            return y, None
        if last + self.tokens > kv.length:
            return y, ClusteredState(kv, early=early, length=kv.length)
        assert cluster is not None
        assert head is not None
        fewer = k.new_empty(len(k), head.shape[1], 0, layer.key_dim)
        kept = KVState(fewer, v.transpose(1, 2)[:, :, :0], kv.start, kv.padded)
        kept = kept.append(_of_heads(all_k, head), all_v)
        return y, ClusteredState(kept, cluster, head, length=kv.length)

    def _clusters(self, layer: KVLayer, early: Tensor, keys: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Each head's cluster [B, Hkv] and each cluster's head [B, C], by the first queries; any for open rows."""
        slots = (start[:, None] + torch.arange(self.tokens, device=start.device)).clamp_max(keys.shape[1] - 1)
        first = keys.gather(1, slots[:, :, None, None].expand(-1, -1, *keys.shape[2:])).transpose(1, 2)
        at = torch.arange(self.tokens, device=start.device)
        weights = attention_rows(
            early, first, scale=layer.scale, slopes=layer.slopes, cap=layer.cap, q_position=at[None],
            k_position=at[None, None].expand(-1, layer.kv_heads, -1),
        )  # fmt: skip
        return alike(weights.unflatten(1, (layer.kv_heads, -1)).flatten(2), self.count(layer))


def alike(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Clusters of vectors that correlate: x [B, H, F] -> each one's cluster [B, H], and each cluster's vector [B, C].

    K-means from the vector farthest from the mean and, again and again, the one farthest from those chosen; of each
    cluster the vector next to its centre stands for it.
    """
    x = normalize(x - x.mean(-1, keepdim=True), dim=-1)
    chosen = _least(-(x - x.mean(1, keepdim=True)).norm(dim=-1), 1)[:, None]
    for _ in range(count - 1):
        chosen = torch.cat((chosen, _least(-_distances(x, _picked(x, chosen)).amin(-1), 1)[:, None]), 1)
    centres = _picked(x, chosen)
    for _ in range(ROUNDS):
        member = one_hot(_least(_distances(x, centres), 2), count).to(x.dtype)
        sizes = member.sum(1)[..., None]
        centres = torch.where(sizes > 0, member.mT @ x / sizes.clamp_min(1), centres)
    distance = _distances(x, centres)
    cluster = _least(distance, 2)
    return cluster, _least(distance.masked_fill(one_hot(cluster, count) == 0, 4.0), 1)  # none is further than 2


def _picked(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, F] at index [B, C]: [B, C, F]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """[B, H, F], [B, C, F] -> [B, H, C], the same for equal vectors wherever they stand."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _least(x: Tensor, dim: int) -> Tensor:
    """Where x, of magnitude up to 4, is least; the first of such, and rounding must not choose among equals."""
    order = torch.arange(x.shape[dim], device=x.device).view(*(-1 if i == dim else 1 for i in range(x.ndim)))
    return ((x.double() * 2**12).round() + order / x.shape[dim] / 2).argmin(dim)


def clustered_attention(
    layer: KVLayer, q: Tensor, kv: KVState, cluster: Tensor, head: Tensor, head_keys: Tensor | None = None
) -> Tensor:
    """Causal attention in which each key head has the weights of its cluster's head, on its own values.

    q: [B, T, H, D], of the last T tokens of kv. cluster: [B, Hkv]. head: [B, C]. head_keys: [B, N, C, D], the keys of
    these heads, where kv has those of all. Rows of weights are made block by block: memory O(N).

    Returns [B, T, H, V].
    """
    keys, values = kv.cached()
    keys, values = (keys if head_keys is None else head_keys).transpose(1, 2), values.transpose(1, 2)
    batch, length, total = len(q), q.shape[1], kv.length
    group = layer.heads // layer.kv_heads
    rows = _of_heads((q * layer.scale).unflatten(2, (layer.kv_heads, group)).flatten(3), head)
    rows = rows.unflatten(3, (group, -1)).permute(0, 2, 3, 1, 4)  # [B, C, G, T, D]
    slopes = None if layer.slopes is None else layer.slopes.to(q.device, q.dtype).view(layer.kv_heads, group)[head]
    block, outputs = min(length, max(16, SCORES // max(1, batch * layer.heads * total))), []
    for first in range(0, length, block):
        last = min(first + block, length)
        stop = total - length + last
        scores = capped(rows[..., first:last, :].flatten(2, 3) @ keys[:, :, :stop].mT, layer.cap)
        scores = scores.unflatten(2, (group, -1))
        away = torch.arange(stop - (last - first), stop, device=q.device)[:, None]
        away = away - torch.arange(stop, device=q.device)
        if slopes is not None:
            scores = scores - slopes[..., None, None] * away
        seen = (away >= 0)[None]
        if kv.padded:
            seen = seen & (torch.arange(stop, device=q.device) >= kv.start[:, None, None])
        weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
        weights = weights.nan_to_num(0.0) if kv.padded else weights
        weights = weights.gather(1, cluster[:, :, None, None, None].expand(-1, -1, *weights.shape[2:]))
        outputs.append((weights.flatten(2, 3) @ values[:, :, :stop]).unflatten(2, (group, -1)))
    return torch.cat(outputs, 3).flatten(1, 2).transpose(1, 2)


def _of_heads(x: Tensor, head: Tensor) -> Tensor:
    """x [B, T, H, D] of the heads [B, C]: [B, T, C, D]."""
    return x.gather(2, head[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
