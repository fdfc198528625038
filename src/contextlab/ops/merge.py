"""Attention over parts of the tokens with its log-sum-exp (LSE), and the exact merging of parts, whatever the cut."""

from __future__ import annotations

import torch
from torch import Tensor

from contextlab.ops.kv import SCORES
from contextlab.ops.softmax import capped


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    visible: Tensor | None = None,
    slopes: Tensor | None = None,
    cap: float | None = None,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over some of the tokens, with what is needed to add the others: see `merge_attention`.

    One pass over blocks of queries; the memory beyond the results is one block's, O(N).

    q: [B, T, H, D]. k: [B, Hkv, N, D], v: [B, Hkv, N, V].
    causal: whether the last T slots are the queries' own, and each sees those up to its own; else each sees all.
    visible: [B, N] bool, False at slots that hold no token; None for all True.
    slopes: [H] of ALiBi; then q_position [B or 1, T] and k_position [B or 1, N] tell how far apart tokens stand.
    cap: see `KVLayer`.

    Returns the answers [B, T, H, V] and their LSE, the logarithm of the sum of exponentiated scores [B, T, H]: zeros
    and -inf where a query sees nothing.
    """
    batch, length, heads, _ = q.shape
    kv_heads, n_keys = k.shape[1:3]
    if not n_keys:
        return q.new_zeros(batch, length, heads, v.shape[-1]), q.new_full((batch, length, heads), float("-inf"))
    shared = heads // kv_heads
    block = min(length, max(16, SCORES // max(1, batch * heads * n_keys)))
    q, outputs, sums = (q * scale).transpose(1, 2).unflatten(1, (kv_heads, shared)), [], []
    for first in range(0, length, block):
        last = min(first + block, length)
        stop = n_keys - length + last if causal else n_keys
        rows = q[..., first:last, :].flatten(2, 3)  # the query heads of one key head are as many queries on it
        scores = capped(rows @ k[:, :, :stop].mT, cap).unflatten(2, (shared, last - first))
        if slopes is not None:
            assert q_position is not None
            assert k_position is not None
            away = q_position[:, first:last, None] - k_position[:, None, :stop]
            scores = scores - away[:, None, None] * slopes.to(scores).view(kv_heads, shared, 1, 1)
        if causal and last - first > 1:
            future = torch.ones(last - first, last - first, dtype=torch.bool, device=q.device).triu(1)
            own = scores[..., stop - (last - first) :].masked_fill(future, float("-inf"))
            scores = torch.cat((scores[..., : stop - (last - first)], own), -1)
        if visible is not None:
            scores = scores.masked_fill(~visible[:, None, None, None, :stop], float("-inf"))
        # One exponential serves both results; where a query sees nothing the highest score is -inf, and all are zeros.
        highest = scores.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
        p = (scores - highest).exp()
        total = p.sum(-1, keepdim=True)
        y = (p.flatten(2, 3) @ v[:, :, :stop]).unflatten(2, (shared, last - first))
        outputs.append(y / total.clamp_min(torch.finfo(total.dtype).tiny))
        sums.append((highest + total.log()).squeeze(-1))
    y, logs = torch.cat(outputs, 3), torch.cat(sums, 3)
    return y.flatten(1, 2).transpose(1, 2), logs.flatten(1, 2).transpose(1, 2)


def merge_attention(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention over all parts, each an answer [..., V] and its LSE [...] from `attention_with_lse`.

    Each part counts by its share of the sum of all exponentiated scores; so the result is that of one softmax. Returns
    [..., V], zeros where a query sees nothing.
    """
    share = torch.stack([total for _, total in parts]).softmax(0).nan_to_num(0.0)
    return torch.stack([y * part[..., None] for (y, _), part in zip(parts, share, strict=True)]).sum(0)
