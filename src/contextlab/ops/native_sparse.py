"""Native sparse attention (NSA): compressed blocks, the best blocks in full and a window, joined by gates.

The definition goes query by query, in the paper's own sums. The form that runs goes through the queries chunk by chunk,
as those of `ops.sparse` do: every score of a chunk is computed, so that on a CPU sparsity saves no operations.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from contextlab.errors import InputError, nearest_divisor
from contextlab.ops.softmax import attend, resolve_positions, softmax_attention
from contextlab.ops.sparse import best_blocks, blocks_seen, causal_mask, chunks, masked_softmax, scores_of

Count = TypeVar("Count", int, Tensor)


def complete_blocks(tokens: Count, size: int, stride: int) -> Count:
    """Compressed blocks that `tokens` tokens complete (2502.11089, eq. 7): block i holds `size` from i stride on.

    tokens: a number or int64 [...]. Returns the same.
    """
    if isinstance(tokens, Tensor):
        return (tokens - size).div(stride, rounding_mode="floor").add(1).clamp_min(0)
    return max(0, (tokens - size) // stride + 1)


def check_blocks(
    block: int, top_k: int, window: int, size: int, stride: int, initial_blocks: int, local_blocks: int
) -> None:
    """Raises InputError unless the sizes of `native_sparse_attention` fit together."""
    for name, value in (("block", block), ("top_k", top_k), ("window", window), ("local_blocks", local_blocks)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if initial_blocks < 0:
        raise InputError(f"initial_blocks must be at least 0, got {initial_blocks}")
    if not 1 <= size <= block:
        raise InputError(f"compress_block must be from 1 to block ({block}), got {size}")
    if stride < 1 or size % stride or block % stride:
        fits = nearest_divisor(size, max(stride, 1))
        fits = fits if block % fits == 0 else 1
        raise InputError(
            f"compress_stride {stride} does not divide compress_block {size} and block {block}; one that does is {fits}"
        )
    if top_k < initial_blocks + local_blocks:
        raise InputError(
            f"top_k {top_k}: a query reads {initial_blocks} initial and {local_blocks} local blocks whatever they "
            f"hold; expected at least {initial_blocks + local_blocks}"
        )


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    compressed: tuple[Tensor, Tensor],
    near: tuple[Tensor, Tensor],
    block: int,
    top_k: int,
    window: int,
    compress_block: int,
    compress_stride: int,
    initial_blocks: int = 1,
    local_blocks: int = 2,
    scale: float | None = None,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
    near_position: Tensor | None = None,
) -> Tensor:
    """NSA: three branches, each with its own keys and values, and their sum by gates (2502.11089, eqs. 5 to 12).

    The compressed branch sees the compressed blocks that are complete. Their weights, summed over the overlapping
    blocks of `block` tokens (eq. 9) and over the query heads of a key head (eq. 10), choose the `top_k` blocks that
    are read in full, the first and the last ones always among them. The near branch sees a window.

    Indices of eq. 9 count from 1: what a block of the choice gets is the weight of each compressed block times the
    strides that both have in common. A compressed block that is not complete weighs nothing.

    q: [B, Tq, H, D]. k: [B, Tk, Hkv, D], v: [B, Tk, Hkv, V]: of the branch that reads blocks in full.
    gates: [B, Tq, H, 3] of the compressed, the chosen and the near tokens.
    compressed: keys [B, N, Hkv, D] and values [B, N, Hkv, V]; block i stands for the row's tokens i compress_stride to
        i compress_stride + compress_block - 1.
    near: keys [B, Tn, Hkv, D] and values [B, Tn, Hkv, V] of the last tokens, the last window + Tq - 1 at least.
    block: l', tokens of a block that is chosen. top_k: n, blocks that a query reads.
    window: w, tokens that the near branch sees, the query's own counted.
    compress_block: l, at most block. compress_stride: d, a divisor of both.
    initial_blocks: blocks from a row's first on that every query reads. local_blocks: blocks up to and with the
        query's own that it reads. Both count in top_k.
    scale: of the scores; default D ** -0.5.
    q_position: [B or 1, Tq], k_position: [B or 1, Tk], near_position: [B or 1, Tn] int64, all or none: places in the
        rows, negative at padding. By default keys count from 0 and the queries, and near keys, are the last.

    Returns [B, Tq, H, V].
    """
    check_blocks(block, top_k, window, compress_block, compress_stride, initial_blocks, local_blocks)
    q_at, k_at = resolve_positions(q, k, q_position, k_position)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shared = q.shape[2] // k.shape[2]
    keys, values = compressed
    count = keys.shape[1]
    of_keys = k_at.div(block, rounding_mode="floor").clamp_min(0)
    numbers = torch.arange(max(1, -(-k.shape[1] // block)), device=q.device)
    overlap = _overlap(count, len(numbers), block, compress_block, compress_stride, q.device)
    near_at = None if q_position is None else q_at
    outputs = []
    for queries in chunks(q.shape[1]):
        at = q_at[:, None, queries, None]
        done = torch.arange(count, device=q.device) < complete_blocks(at + 1, compress_block, compress_stride)
        weights = masked_softmax(scores_of(q[:, queries] * scale, keys), done)
        with torch.no_grad():  # which blocks are read is a choice: no gradient goes through it
            importance = weights.unflatten(1, (-1, shared)).sum(2) @ overlap.to(weights.dtype)
            own = at.div(block, rounding_mode="floor")
            always = (numbers < initial_blocks) | (numbers > own - local_blocks)
            chosen = best_blocks(importance, always, own, top_k)
            seen = blocks_seen(chosen, of_keys).repeat_interleave(shared, 1) & causal_mask(q_at[:, queries], k_at)
        far = torch.einsum("bhqn,bnhv->bqhv", weights.to(values.dtype), values.repeat_interleave(shared, 2))
        full = attend(q[:, queries], k, v, scale, seen)
        outputs.append(far * gates[:, queries, :, 0, None] + full * gates[:, queries, :, 1, None])
    local = softmax_attention(q, *near, scale=scale, window=window, q_position=near_at, k_position=near_position)
    return torch.cat(outputs, 1) + local * gates[..., 2, None]


def naive_native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    compressed: tuple[Tensor, Tensor],
    near: tuple[Tensor, Tensor],
    block: int,
    top_k: int,
    window: int,
    compress_block: int,
    compress_stride: int,
    initial_blocks: int = 1,
    local_blocks: int = 2,
    scale: float | None = None,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
    near_position: Tensor | None = None,
) -> Tensor:
    """What defines `native_sparse_attention`, query by query.

    q: [B, Tq, H, D]. k: [B, Tk, Hkv, D], v: [B, Tk, Hkv, V]. gates: [B, Tq, H, 3]. Others as there.
    Returns [B, Tq, H, V].
    """
    q_at, k_at = resolve_positions(q, k, q_position, k_position)
    near_at = k_at[:, k.shape[1] - near[0].shape[1] :] if near_position is None else near_position
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shared, (far_k, far_v), (near_k, near_v) = q.shape[2] // k.shape[2], compressed, near
    y = q.new_zeros(*q.shape[:3], v.shape[-1])
    for b, i, g in torch.cartesian_prod(*(torch.arange(n) for n in (*q.shape[:2], k.shape[2]))).tolist():
        at, keys_at, close_at = int(q_at[b % len(q_at), i]), k_at[b % len(k_at)], near_at[b % len(near_at)]
        if at < 0:
            continue  # padding
        heads = range(g * shared, (g + 1) * shared)
        own, done = at // block, complete_blocks(at + 1, compress_block, compress_stride)
        p = {h: (far_k[b, :done, g] @ q[b, i, h] * scale).softmax(0) for h in heads}
        importance = q.new_zeros(own + 1)
        for j in range(own + 1):  # eq. 9, whose block j + 1 this is
            for m in range(block // compress_stride):
                for n in range(compress_block // compress_stride):
                    c = block // compress_stride * (j + 1) - m - n - 1
                    if 0 <= c < done:
                        importance[j] += sum(p[h][c] for h in heads)
        always = {j for j in range(own + 1) if j < initial_blocks or j > own - local_blocks}
        ranked = [j for j in importance.argsort(descending=True).tolist() if j not in always]
        blocks = [*always, *ranked[: top_k - len(always)]]
        read = (keys_at >= 0) & (keys_at <= at) & torch.isin(keys_at // block, torch.tensor(blocks))
        close = (close_at >= 0) & (close_at <= at) & (close_at > at - window)
        for h in heads:
            for gate, weights, values in (
                (0, p[h], far_v[b, :done, g]),
                (1, (k[b, read, g] @ q[b, i, h] * scale).softmax(0), v[b, read, g]),
                (2, (near_k[b, close, g] @ q[b, i, h] * scale).softmax(0), near_v[b, close, g]),
            ):
                y[b, i, h] += gates[b, i, h, gate] * (weights @ values)
    return y


def _overlap(count: int, blocks: int, block: int, size: int, stride: int, device: torch.device) -> Tensor:
    """[count, blocks]: the strides that compressed block i and block j have in common, how often eq. 9 adds i to j."""
    first = torch.arange(count, device=device)[:, None] * stride
    start = torch.arange(blocks, device=device) * block
    common = torch.minimum(first + size, start + block) - torch.maximum(first, start)
    return common.clamp_min(0) // stride
