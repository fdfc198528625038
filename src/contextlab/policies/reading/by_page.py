"""Selective reading of pages of neighbouring tokens: by bounds of their scores, or by their mean key."""

from __future__ import annotations

from torch import Tensor

from contextlab.policies.reading.selective import SelectivePolicy
from contextlab.registry import register

SMALL = {"page": 4}


@register("policy", "quest", family="selective", papers=("2406.10774",), cases=(SMALL, {"page": 4, "ahead": True}))
class Quest(SelectivePolicy):
    """Quest: pages are chosen by an upper bound of the query's score with any of their keys.

    A page's summary is the least and the greatest value of each channel of its keys. The paper chooses for each query
    head; here heads that share a key head choose together.

    budget: what one token may read: "10%" of all bytes, "512tok", "64MB"; see `SelectivePolicy`.
    window: last tokens that are always read; the paper reads the open page, 1 comes nearest.
    page: tokens in a page; default 16 as in the paper, or more where the summaries would take over half of a budget
        in per cent.
    sinks: first tokens that are always read; the paper has none.
    skip: first layers that read everything; 2 in the paper.
    ahead: choose by the query of the token before.
    offload: keep keys and values in the CPU's memory and fetch what is read.
    """

    vectors = 2

    def summarise(self, keys: Tensor) -> dict[str, Tensor]:
        """See `SelectivePolicy.summarise`: "low" and "high" [B, Hkv, P, D]."""
        return {"low": keys.amin(3), "high": keys.amax(3)}  # a segment is a page

    def relevance(self, q: Tensor, summary: dict[str, Tensor]) -> Tensor:
        """See `SelectivePolicy.relevance`: the sum over channels of max(q * low, q * high)."""
        return q.clamp_min(0) @ summary["high"].mT + q.clamp_max(0) @ summary["low"].mT


@register("policy", "block_topk", family="selective", papers=("2502.13189",), cases=(SMALL, {"page": 4, "sinks": 2}))
class BlockTopK(SelectivePolicy):
    """Blocks of tokens chosen by the query's product with the mean of their keys (MoBA's gate).

    MoBA trains with it and chooses for the prompt's tokens as well; here it serves any model, while decoding.

    budget: what one token may read: "10%" of all bytes, "512tok", "64MB"; see `SelectivePolicy`.
    window: last tokens that are always read.
    page: tokens in a block; default 16, or more where the means would take over half of a budget in per cent.
    sinks: first tokens that are always read.
    skip: first layers that read everything.
    ahead: choose by the query of the token before.
    offload: keep keys and values in the CPU's memory and fetch what is read.
    """

    def summarise(self, keys: Tensor) -> dict[str, Tensor]:
        """See `SelectivePolicy.summarise`: "mean" [B, Hkv, P, D]."""
        return {"mean": keys.mean(3)}

    def relevance(self, q: Tensor, summary: dict[str, Tensor]) -> Tensor:
        """See `SelectivePolicy.relevance`: the score of the mean key."""
        return q @ summary["mean"].mT
