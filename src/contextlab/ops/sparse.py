"""Softmax attention to a part of the keys that depends on their content: best keys, best blocks, clusters, landmarks.

Each op has its definition query by query beside it. The form that runs goes through the queries chunk by chunk, finds
what each sees and hands the mask to PyTorch's SDPA: memory is linear in the number of keys, but every score of a chunk
is computed, so that on a CPU the operations saved by sparsity are not. Positions serve as in `softmax_attention`: keys
at negative ones are padding, and blocks are counted from each row's own first token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.precision import working_dtype
from contextlab.ops.softmax import attend, check_shapes, resolve_positions

CHUNK = 256  # queries at once


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    top_k: int,
    *,
    scale: float | None = None,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    """Each query sees its `top_k` best keys among those at its own position and before (2106.06899, 1912.11637).

    q: [B, Tq, H, D]. k: [B, Tk, Hkv, D], Hkv divides H. v: [B, Tk, Hkv, V]. q_position, k_position: see
    `softmax_attention`. Keys that tie with the last that is seen are seen, too. Returns [B, Tq, H, V].
    """
    _at_least_one(top_k=top_k)

    def sees(queries: slice, causal: Tensor) -> Tensor:
        scores = scores_of(q[:, queries], k).masked_fill(~causal, -torch.inf)
        least = scores.topk(min(top_k, k.shape[1]), -1).values[..., -1:]
        return causal & (scores >= least)

    return _masked(q, k, v, scale, q_position, k_position, sees)


def block_topk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    top_k: int,
    *,
    scale: float | None = None,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    """Each query sees its own block and the best of the blocks before, `top_k` in all (MoBA, 2502.13189).

    A block is as good as the product of the query and the mean of the block's keys.

    q: [B, Tq, H, D]. k: [B, Tk, Hkv, D]. v: [B, Tk, Hkv, V]. block: tokens of a block. Others as for `topk_attention`.
    Returns [B, Tq, H, V].
    """
    _at_least_one(block=block, top_k=top_k)
    q_at, k_at = resolve_positions(q, k, q_position, k_position)
    means = block_means(k, k_at, block)
    numbers = torch.arange(means.shape[1], device=q.device)
    of_keys = k_at.div(block, rounding_mode="floor").clamp_min(0)

    def sees(queries: slice, causal: Tensor) -> Tensor:
        own = q_at[:, None, queries, None].div(block, rounding_mode="floor")
        chosen = best_blocks(scores_of(q[:, queries], means), numbers == own, own, top_k)
        return causal & blocks_seen(chosen, of_keys)

    return _masked(q, k, v, scale, q_at, k_at, sees)


def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_cluster: Tensor,
    k_cluster: Tensor,
    *,
    scale: float | None = None,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    """Each query sees the keys of its own cluster at its own position and before (2003.05997).

    The paper lets every cluster keep its nearest tokens of the whole sequence, which looks ahead; here a token belongs
    to its own nearest cluster, and a query always sees itself.

    q_cluster: [B, Tq, H] int64, k_cluster: [B, Tk, H] int64. Others and result as for `topk_attention`.
    """
    q_at, k_at = resolve_positions(q, k, q_position, k_position)

    def sees(queries: slice, causal: Tensor) -> Tensor:
        same = q_cluster[:, queries].transpose(1, 2).unsqueeze(-1) == k_cluster.transpose(1, 2).unsqueeze(-2)
        return causal & (same | (q_at[:, None, queries, None] == k_at[:, None, None]))

    return _masked(q, k, v, scale, q_at, k_at, sees)


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    block: int,
    top_k: int | None = None,
    *,
    scale: float | None = None,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    """Grouped softmax: a past block gets the weight of its landmark, its tokens share it (2305.16300).

    The query's own block competes token by token with the landmarks of the complete blocks before it.

    landmarks: [B, blocks, Hkv, D], the key of each block's landmark; block n holds positions n block to
        (n + 1) block - 1. top_k: past blocks that a query reads, those with the best landmarks; None for all.
    Others and result as for `topk_attention`.
    """
    _at_least_one(block=block, **({} if top_k is None else {"top_k": top_k}))
    q_at, k_at = resolve_positions(q, k, q_position, k_position)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shared = q.shape[2] // k.shape[2]
    values = v.repeat_interleave(shared, 2)
    of_keys = k_at.div(block, rounding_mode="floor").clamp_min(0)  # [B or 1, Tk]
    numbers = torch.arange(landmarks.shape[1], device=q.device)
    outputs = []
    for queries in chunks(q.shape[1]):
        own = q_at[:, None, queries, None].div(block, rounding_mode="floor")
        causal = causal_mask(q_at[:, queries], k_at)
        mine = causal & (of_keys[:, None, None] == own)
        scores = scores_of(q[:, queries], k) * scale
        blocks = scores_of(q[:, queries], landmarks) * scale
        read = numbers < own
        if top_k is not None and top_k < blocks.shape[-1]:
            ranked = blocks.masked_fill(~read, -torch.inf)
            read = read & (ranked >= ranked.topk(top_k, -1).values[..., -1:])
        read = read.expand_as(blocks)
        grouped = masked_softmax(torch.cat((scores, blocks), -1), torch.cat((mine.expand_as(scores), read), -1))
        near, far = grouped.split((k.shape[1], blocks.shape[-1]), -1)
        index = of_keys[:, None, None].expand(*scores.shape)
        # Softmax within each block: the largest score and the sum of its block come back to every key.
        past = scores.masked_fill(~causal, -torch.inf)
        top = torch.full_like(blocks, -torch.inf).scatter_reduce(-1, index, past.detach(), "amax").gather(-1, index)
        raised = (past - top.clamp_min(torch.finfo(past.dtype).min)).exp()
        total = torch.zeros_like(blocks).scatter_add(-1, index, raised).gather(-1, index)
        within = raised / total.masked_fill(total == 0, 1.0)
        weights = near + (within * far.gather(-1, index)).masked_fill(mine, 0.0)
        outputs.append(torch.einsum("bhqk,bkhv->bqhv", weights.to(values.dtype), values))
    return torch.cat(outputs, 1)


def naive_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weigh: Callable[[int, int, int, Tensor, Tensor], Tensor],
    *,
    scale: float | None = None,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    """What defines the ops above, query by query: o = sum of weights x values over the keys before.

    weigh(b, i, h, keys, scores): the weights of the keys (their places in k, causal ones only, in order of position)
    for query i of head h in row b, given their scaled scores. Returns [B, Tq, H, V].
    """
    q_at, k_at = resolve_positions(q, k, q_position, k_position)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shared = q.shape[2] // k.shape[2]
    rows = []
    for b, i, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        at, keys_at = q_at[b % len(q_at), i], k_at[b % len(k_at)]
        keys = torch.nonzero((keys_at >= 0) & (keys_at <= at)).flatten()
        scores = k[b, keys, h // shared] @ q[b, i, h] * scale
        weights = weigh(b, i, h, keys, scores) if len(keys) else scores  # padding sees nothing
        rows.append(weights @ v[b, keys, h // shared])
    return torch.stack(rows).view(*q.shape[:3], v.shape[-1])


def block_means(x: Tensor, at: Tensor, block: int) -> Tensor:
    """Means over blocks of positions: x [B, T, H, D], at [B or 1, T] -> [B, blocks, H, D]; of the tokens there are.

    Tokens at negative positions belong to no block; a block without tokens has the mean zero.
    """
    count = max(1, -(-x.shape[1] // block))
    number = torch.where(at < 0, count, at.div(block, rounding_mode="floor")).expand(len(x), -1)
    index = number[..., None, None].expand_as(x)
    wide = x.to(working_dtype(x.dtype))  # half precision counts to 2048, bfloat16 to 256
    sums = wide.new_zeros(len(x), count + 1, *x.shape[2:]).scatter_add(1, index, wide)[:, :-1]
    sizes = wide.new_zeros(len(x), count + 1).scatter_add(1, number, wide.new_ones(number.shape))[:, :-1]
    return (sums / sizes.clamp_min(1)[..., None, None]).to(x.dtype)


def best_blocks(scores: Tensor, always: Tensor, own: Tensor, top_k: int) -> Tensor:
    """Which blocks each query reads: those of `always` and the best of the others up to its own, `top_k` in all.

    scores: [B, H, Tq, blocks]. always: bool, broadcasts to them. own: [B or 1, 1, Tq, 1], the query's own block.
    Returns [B, H, Tq, blocks] bool.
    """
    sight = torch.arange(scores.shape[-1], device=scores.device) <= own
    ranked = scores.masked_fill(always, torch.inf).masked_fill(~sight, -torch.inf)
    best = ranked.topk(min(top_k, scores.shape[-1]), -1).indices
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, best, True) & sight


def blocks_seen(chosen: Tensor, of_keys: Tensor) -> Tensor:
    """Which keys of the blocks of_keys [B or 1, Tk] are seen: chosen [B, H, Tq, blocks] bool -> [B, H, Tq, Tk]."""
    index = of_keys[:, None, None].expand(*chosen.shape[:-1], -1)
    return chosen.gather(-1, index)


def masked_softmax(scores: Tensor, sees: Tensor) -> Tensor:
    """Softmax of scores [..., N] over what is seen, a bool each; zeros, and no gradient, where nothing is."""
    return scores.masked_fill(~sees, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~sees, 0.0)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    """q [B, Tq, H, D] . k [B, Tk, Hkv, D] -> [B, H, Tq, Tk], float32 at least; heads that share a key head in a row."""
    shared = q.shape[2] // k.shape[2]
    q, k = (x.to(working_dtype(x.dtype)) for x in (q, k))  # float16 holds no sum above 65504
    return torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(shared, 2) if shared > 1 else k)


def causal_mask(q_at: Tensor, k_at: Tensor) -> Tensor:
    """Keys of a row up to the query's own place: [B or 1, Tq], [B or 1, Tk] -> [B or 1, 1, Tq, Tk] bool."""
    return (k_at[:, None, None] >= 0) & (k_at[:, None, None] <= q_at[:, None, :, None])


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    q_position: Tensor | None,
    k_position: Tensor | None,
    sees: Callable[[slice, Tensor], Tensor],
) -> Tensor:
    """Attention under the mask `sees(queries, causal)` [B, H, Tq, Tk], chunk by chunk of the queries."""
    check_shapes(q, k, v)
    q_at, k_at = resolve_positions(q, k, q_position, k_position)
    parts = []
    for queries in chunks(q.shape[1]):
        with torch.no_grad():  # which keys are seen is a choice: no gradient goes through it
            mask = sees(queries, causal_mask(q_at[:, queries], k_at))
        parts.append(attend(q[:, queries], k, v, scale, mask))
    return torch.cat(parts, 1)


def chunks(length: int) -> list[slice]:
    """The stretches of `length` queries that are answered at once."""
    return [slice(first, min(first + CHUNK, length)) for first in range(0, max(length, 1), CHUNK)]


def _at_least_one(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
