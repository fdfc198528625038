"""Selective reading by an index of the keys: exact, a tree of similar keys, or keys in few dimensions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from contextlab.errors import InputError, check_whole
from contextlab.ops.kv import KVLayer
from contextlab.policies.core.budget import Amount
from contextlab.policies.reading.fetching import fetched
from contextlab.policies.reading.selective import ReadState, SelectivePolicy
from contextlab.registry import register
from contextlab.state import KVState, tensor_bytes


@register("policy", "topk", family="selective", papers=("2106.06899",), cases=({"window": 4},))
class TopK(SelectivePolicy):
    """Exact top-k attention while decoding: each token reads the tokens whose keys fit its query best.

    All keys are read to find them, so a budget in bytes must hold these. The difference from it is what the indexes of
    other policies lose. The paper takes the best of each query head; here heads that share a key head choose together.

    budget: what one token may read: "512tok", or "64MB" or "60%" with all keys counted; see `SelectivePolicy`.
    window: last tokens that are always read.
    skip: first layers that read everything.
    """

    def __init__(self, budget: Amount = None, window: int = 16, skip: int = 0) -> None:
        super().__init__(budget, window, page=1, skip=skip)

    def summarise(self, keys: Tensor) -> dict[str, Tensor]:
        """See `SelectivePolicy.summarise`: nothing, the keys are read themselves."""
        return {}

    def relevance(self, q: Tensor, summary: dict[str, Tensor]) -> Tensor:
        """See `SelectivePolicy.relevance`: the scores."""
        return q @ summary["keys"].mT

    def _summary(self, state: ReadState, among: int) -> dict[str, Tensor]:
        keys = state.kv.keys[:, :, :among]
        if state.kv.padded:
            slots = state.kv.start[:, None] + torch.arange(among, device=keys.device)
            slots = slots.clamp_max(state.length - 1)[:, None].expand(-1, keys.shape[1], -1)
            keys = fetched(state.kv.keys, slots, keys.device)
        return {"keys": keys}

    def _from_start(self, layer: KVLayer, x: Tensor, kv: KVState) -> Tensor:
        return x  # the keys are compared as they are held

    def _remedy(self, part: float) -> str:
        return "give it in tokens, as in 512tok, or take another policy"


@register(
    "policy",
    "retrieval",
    family="selective",
    papers=("2409.10516", "2405.02842"),
    cases=({"page": 4, "levels": 1, "window": 4}, {"page": 2, "levels": 2, "window": 4, "bound": "ball"}),
)
class Retrieval(SelectivePolicy):
    """Retrieval from a tree of similar keys: pages hold neighbours in key space, not in the text.

    Each segment of page * 2^levels tokens is halved `levels` times at the median of its keys' projection on their
    main direction; the leaves are the pages, found by their mean key. The scheme is that of RetrievalAttention and
    IceFormer, the last tokens and the nearest keys of an index; their indexes, a graph linked by the prompt's queries
    and prioritized DCI, differ. Approximate: a key far from its leaf's mean is missed.

    budget: what one token may read: "10%" of all bytes, "512tok", "64MB"; see `SelectivePolicy`.
    window: last tokens that are always read.
    page: tokens in a leaf; default 16, or more where the means would take over half of a budget in per cent.
    levels: halvings of a segment; the tokens of an open segment are all read.
    bound: judge a leaf by its mean key (mean), or by the most that a key in the ball around it may score (ball).
    skip: first layers that read everything.
    ahead: choose by the query of the token before.
    offload: keep keys and values in the CPU's memory and fetch what is read.
    """

    def __init__(
        self,
        budget: Amount = None,
        window: int = 16,
        page: int | None = None,
        levels: int = 3,
        bound: Literal["mean", "ball"] = "mean",
        skip: int = 0,
        ahead: bool = False,
        offload: bool = False,
    ) -> None:
        check_whole(levels=(levels, 1))
        if levels > 16:
            raise InputError(f"levels: expected at most 16, got {levels}")
        if bound not in ("mean", "ball"):
            raise InputError(f"bound: expected mean or ball, got {bound!r}")
        super().__init__(budget, window, page, 0, skip, ahead, offload)
        self.levels, self.bound = levels, bound

    @property
    def segment(self) -> int:
        """See `SelectivePolicy.segment`: the tokens of one tree."""
        return self.page << self.levels

    def summary_nbytes(self, layer: KVLayer, tokens: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `SelectivePolicy.summary_nbytes`: the means, and the balls' radii."""
        numbers = layer.key_dim + int(self.bound == "ball")
        return tensor_bytes(batch, layer.kv_heads, tokens // self.page, numbers, dtype=dtype)

    def order_nbytes(self, layer: KVLayer, tokens: int, batch: int = 1) -> int:
        """See `SelectivePolicy.order_nbytes`: a whole number of 32 bits a token."""
        return tensor_bytes(batch, layer.kv_heads, tokens, dtype=torch.int32)

    def summarise(self, keys: Tensor) -> dict[str, Tensor]:
        """See `SelectivePolicy.summarise`: "mean" [B, Hkv, P, D], "order", and "radius" [B, Hkv, P] for balls."""
        order = halved(keys, self.levels)
        leaves = keys.gather(3, order[..., None].expand(keys.shape)).unflatten(3, (-1, self.page)).flatten(2, 3)
        mean = leaves.mean(3)
        found = {"mean": mean, "order": order.int().unflatten(3, (-1, self.page)).flatten(2, 3)}
        if self.bound == "ball":
            found["radius"] = (leaves - mean[..., None, :]).norm(dim=-1).amax(-1)
        return found

    def relevance(self, q: Tensor, summary: dict[str, Tensor]) -> Tensor:
        """See `SelectivePolicy.relevance`: the mean key's score, with balls and the radius times the query's length."""
        score = q @ summary["mean"].mT
        if self.bound == "ball":
            score = score + q.norm(dim=-1, keepdim=True) * summary["radius"][:, :, None]
        return score


@register(
    "policy",
    "low_rank_keys",
    family="selective",
    papers=("2406.02542", "2406.19707"),
    cases=({"rank": 2, "segment": 8, "window": 4}, {"rank": 1, "segment": 8, "window": 4, "ahead": True}),
)
class LowRankKeys(SelectivePolicy):
    """Tokens chosen by their keys in few dimensions, those that hold most of them (Loki, InfiniGen).

    The keys of each segment are held once more in the basis of their `rank` largest singular values; a query's
    estimated scores with these choose tokens, whose keys and values are then read in full. Loki takes one basis for all
    texts, found beforehand; InfiniGen takes columns of the layer's weights, turned beforehand, and the input of the
    layer before to choose ahead: here the query of the token before does with ahead=True. Both take a threshold or a
    number of tokens; here it is the budget.

    budget: what one token may read: "10%" of all bytes, "512tok", "64MB"; see `SelectivePolicy`.
    rank: dimensions in which keys are compared.
    segment: tokens whose keys share a basis; those of an open segment are all read.
    window: last tokens that are always read.
    skip: first layers that read everything.
    ahead: choose by the query of the token before.
    offload: keep keys and values in the CPU's memory and fetch what is read.
    """

    of_segments = ("basis",)

    def __init__(
        self,
        budget: Amount = None,
        rank: int = 4,
        segment: int = 256,
        window: int = 16,
        skip: int = 0,
        ahead: bool = False,
        offload: bool = False,
    ) -> None:
        check_whole(rank=(rank, 1), segment=(segment, 1))
        if rank > segment:
            raise InputError(f"rank: {rank} dimensions for {segment} keys; take at most {segment}")
        super().__init__(budget, window, 1, 0, skip, ahead, offload)
        self.rank, self._segment = rank, segment

    @property
    def segment(self) -> int:
        """See `SelectivePolicy.segment`."""
        return self._segment

    def check(self, layers: list[KVLayer]) -> None:
        """See `Policy.check`."""
        least = min(layer.key_dim for layer in layers)
        if self.rank > least:
            raise InputError(f"rank: expected at most {least}, the size of a key, got {self.rank}")
        super().check(layers)

    def summary_nbytes(self, layer: KVLayer, tokens: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `SelectivePolicy.summary_nbytes`: coordinates of every token, and the bases."""
        numbers = tokens + tokens // self.segment * layer.key_dim
        return tensor_bytes(batch, layer.kv_heads, numbers, self.rank, dtype=dtype)

    def summarise(self, keys: Tensor) -> dict[str, Tensor]:
        """See `SelectivePolicy.summarise`: "basis" [B, Hkv, S, D, rank], "low" [B, Hkv, S * segment, rank]."""
        wide = keys if keys.dtype == torch.float64 else keys.float()
        basis = torch.linalg.eigh(wide.mT @ wide).eigenvectors[..., -self.rank :]
        return {"basis": basis.to(keys.dtype), "low": (wide @ basis).to(keys.dtype).flatten(2, 3)}

    def relevance(self, q: Tensor, summary: dict[str, Tensor]) -> Tensor:
        """See `SelectivePolicy.relevance`: the scores of the keys' parts in the basis."""
        low = q[:, :, None] @ summary["basis"]  # [B, Hkv, S, G, rank]
        return (low @ summary["low"].unflatten(2, (-1, self.segment)).mT).transpose(2, 3).flatten(3)

    def _remedy(self, part: float) -> str:
        return "lower rank or raise segment"


def halved(x: Tensor, levels: int) -> Tensor:
    """An order [..., N] int64 of vectors [..., N, D] in which neighbours are alike: N / 2^levels to a leaf.

    Each part is halved at the median of its vectors' projection on their main direction, found by power iteration
    from the vector farthest from the mean; so the leaves do not depend on how the vectors are rotated.
    """
    order = torch.arange(x.shape[-2], device=x.device).expand(x.shape[:-1])
    if not x.numel():
        return order
    for level in range(levels):
        parts = x.gather(-2, order[..., None].expand(x.shape)).unflatten(-2, (1 << level, -1))
        parts = parts - parts.mean(-2, keepdim=True)
        parts = parts if parts.dtype == torch.float64 else parts.float()
        farthest = parts.norm(dim=-1).argmax(-1)[..., None, None].expand(*parts.shape[:-2], 1, parts.shape[-1])
        axis = parts.gather(-2, farthest)
        for _ in range(4):
            axis = torch.nn.functional.normalize((axis @ parts.mT) @ parts, dim=-1)
        ranks = (parts @ axis.mT).squeeze(-1).argsort(dim=-1, stable=True)
        order = order.unflatten(-1, (1 << level, -1)).gather(-1, ranks).flatten(-2)
    return order
