"""Attention over the tokens that a KV state holds, and how much attention each of them gets."""

from __future__ import annotations

import torch
from torch import Tensor

from contextlab.ops.dense import product
from contextlab.ops.kv_layer import KVLayer as KVLayer
from contextlab.ops.kv_layer import values_of as values_of
from contextlab.ops.precision import working_dtype
from contextlab.ops.softmax import attend, beside_sink, capped, softmax_attention

SCORES = 2**20
"""Attention scores that are made at once where their sum is wanted: 4 MB stay in a core's cache.

To measure this and the next three again: `python benchmarks/policies.py --policy h2o`.
"""
IN_CACHE = 2**20
"""Scores of one head that are made at once on a CPU."""
WIDTHS = 512
"""Blocks are as wide as a multiple of this: oneDNN makes a kernel for each width, and keeps some hundred."""
BY_HEAD = 2**18
"""Scores of a head from which on heads are taken one by one on a CPU: fewer take less time together."""


def attend_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    visible: Tensor | None = None,
    slopes: Tensor | None = None,
    sink: Tensor | None = None,
    cap: float | None = None,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    """Softmax attention of the last T tokens over all that are in a cache; each sees the slots up to its own.

    q: [B, T, H, D]. k: [B, Hkv, N, D], v: [B, Hkv, N, V]: the last T slots are the queries' own. Where V is 0, here
        and in what follows, the keys are the values.
    visible: [B, N] bool, False at slots that hold no token; None for all True.
    slopes: [H] of ALiBi; then q_position [B or 1, T] and k_position [B, Hkv, N] tell how far apart tokens stand.
    sink: [H], and cap, see `KVLayer`.

    Returns [B, T, H, V]; zeros where a query sees nothing.
    """
    length, n_keys = q.shape[1], k.shape[2]
    k, v = k.transpose(1, 2), values_of(k, v).transpose(1, 2)
    if slopes is None and sink is None and visible is None and length == 1:
        return attend(q, k, v, scale, cap=cap)
    if slopes is None:
        if visible is None:
            return softmax_attention(q, k, v, scale=scale, sink=sink, cap=cap)
        slots = torch.arange(n_keys, device=q.device)
        return softmax_attention(
            q, k, v, scale=scale, sink=sink, cap=cap, q_position=slots[None, n_keys - length :],
            k_position=slots.where(visible, -1),
        )  # fmt: skip
    assert q_position is not None
    assert k_position is not None
    outputs, shared = [], q.shape[2] // k.shape[2]
    for first in range(0, length, 256):  # no bias is larger than [B, H, 256, N]
        last = min(first + 256, length)
        seen = _seen(n_keys - length + first, last - first, n_keys, q.device)
        seen = seen if visible is None else seen & visible[:, None, None, :]
        distance = q_position[:, None, first:last, None] - k_position[:, :, None, :]
        bias = distance.repeat_interleave(shared, 1) * -slopes.to(q.device, q.dtype)[:, None, None]
        bias = bias.masked_fill(~seen, float("-inf"))
        all_k, all_v, bias = (k, v, bias) if sink is None else beside_sink(k, v, bias, sink, q.dtype)
        outputs.append(attend(q[:, first:last], all_k, all_v, scale, bias, cap=cap))
    return torch.cat(outputs, 1)


def _weights(scores: Tensor, sink: Tensor | None) -> Tensor:
    """Softmax over the last dimension of scores [B, H, ...] or [B, Hkv, H / Hkv, ...], beside sinks [H]."""
    if sink is None:
        return scores.softmax(-1)
    heads = scores.shape[1:2] if scores.shape[1] == len(sink) else scores.shape[1:3]
    column = sink.to(scores).view(*heads, *(1 for _ in scores.shape[1 + len(heads) :]))
    return torch.cat((column.expand(*scores.shape[:-1], 1), scores), -1).softmax(-1)[..., 1:]


def naive_attention_with_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    weight: Tensor,
    visible: Tensor | None = None,
    sink: Tensor | None = None,
    cap: float | None = None,
    share: float | None = None,
    latest: bool = False,
) -> tuple[Tensor, Tensor]:
    """What defines `attention_with_mass`: the whole matrix of attention weights.

    Arguments as there. Returns the outputs [B, T, H, V] and the mass [B, H, N].
    """
    length, n_keys, shared, v = q.shape[1], k.shape[2], q.shape[2] // k.shape[1], values_of(k, v)
    scores = capped(q.transpose(1, 2) @ k.repeat_interleave(shared, 1).mT * scale, cap)
    seen = _seen(n_keys - length, length, n_keys, q.device)
    seen = seen if visible is None else seen & visible[:, None, None, :]
    p = _weights(scores.masked_fill(~seen, float("-inf")), sink).nan_to_num(0.0)
    y = (p @ v.repeat_interleave(shared, 1)).transpose(1, 2)
    each = (p if share is None else (p >= share).to(p)) * weight[:, None]
    return y, each.amax(2) if latest else each.sum(2)


def attention_with_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    weight: Tensor,
    visible: Tensor | None = None,
    sink: Tensor | None = None,
    cap: float | None = None,
    share: float | None = None,
    latest: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention as `attend_cached`, and the attention that each cached token got from all queries (H2O, 2306.14048).

    One pass over blocks of queries: whole rows of the attention matrix are made, used for both and dropped, so the
    memory beyond the results is one block's, O(N).

    q: [B, T, H, D]. k: [B, Hkv, N, D], v: [B, Hkv, N, V]: the last T slots are the queries' own.
    weight: [T], by which each query's attention counts.
    visible: [B, N] bool, False at slots that hold no token; None for all True.
    sink: [H], and cap, see `KVLayer`.
    share: None sums the attention itself; else each query counts for the tokens that get this share of it or more.
    latest: whether the largest of the weighted numbers is taken in place of their sum; weights must not be negative.

    Returns [B, T, H, V] and the mass [B, H, N], in float32 at least; zeros of both where a query sees nothing.
    """
    v = values_of(k, v)
    plain = q.device.type == "cpu" and not torch.is_grad_enabled() and sink is None
    if plain and q.shape[1] * k.shape[2] >= BY_HEAD:
        return _mass_by_head(q, k, v, scale, weight, visible, cap, share, latest)
    if q.shape[1] == 1:
        return _mass_of_one(q, k, v, scale, weight, visible, sink, cap, share)
    batch, length, heads, _ = q.shape
    kv_heads, n_keys = k.shape[1:3]
    block = min(length, max(16, SCORES // max(1, batch * heads * n_keys)))
    exact = working_dtype(q.dtype)  # counts outgrow the digits of a half precision
    mass, weight = q.new_zeros(batch, kv_heads, heads // kv_heads, n_keys, dtype=exact), weight.to(exact)
    q, outputs = (q * scale).transpose(1, 2).unflatten(1, (kv_heads, -1)), []
    for first in range(0, length, block):
        last = min(first + block, length)
        stop = n_keys - length + last
        rows = q[..., first:last, :].flatten(2, 3)  # the query heads of one key head are as many queries on it
        scores = capped(rows @ k[:, :, :stop].mT, cap).unflatten(2, (-1, last - first))
        future = torch.ones(last - first, last - first, dtype=torch.bool, device=q.device).triu(1)
        scores[..., stop - (last - first) :].masked_fill_(future, float("-inf"))
        if visible is not None:
            scores = scores.masked_fill(~visible[:, None, None, None, :stop], float("-inf"))
        p = _weights(scores, sink)
        if visible is not None:
            p = p.nan_to_num(0.0)
        outputs.append((p.flatten(2, 3) @ v[:, :, :stop]).unflatten(2, (-1, last - first)))
        p = (p if share is None else p >= share).to(exact)
        if latest:
            found = (p * weight[first:last, None]).amax(-2)
            mass[..., :stop] = torch.maximum(mass[..., :stop], found)
        else:
            mass[..., :stop] += weight[first:last] @ p
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 3)
    return y.flatten(1, 2).transpose(1, 2), mass.flatten(1, 2)


def _mass_of_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    weight: Tensor,
    visible: Tensor | None,
    sink: Tensor | None,
    cap: float | None,
    share: float | None,
) -> tuple[Tensor, Tensor]:
    """`attention_with_mass` of a single query, in as few operations as it takes."""
    batch, _, heads, dim = q.shape
    rows = (q * scale).reshape(batch, k.shape[1], -1, dim)
    scores = capped(rows @ k.mT, cap)
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    p = _weights(scores, sink)
    if visible is not None:
        p = p.nan_to_num(0.0)
    y = (p @ v).reshape(batch, 1, heads, v.shape[-1])
    exact = working_dtype(q.dtype)
    return y, ((p if share is None else p >= share) * weight.to(exact)).flatten(1, 2)


def _mass_by_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    weight: Tensor,
    visible: Tensor | None,
    cap: float | None,
    share: float | None,
    latest: bool,
) -> tuple[Tensor, Tensor]:
    """`attention_with_mass` one head at a time, in blocks of memory that stay in the cache."""
    batch, length, heads, _ = q.shape
    n_keys, shared = k.shape[2], heads // k.shape[1]
    block = min(length, max(32, IN_CACHE // n_keys))
    exact = working_dtype(q.dtype)
    y, mass = q.new_empty(batch, heads, length, v.shape[-1]), q.new_zeros(batch, heads, n_keys, dtype=exact)
    q, weight = (q * scale).transpose(1, 2), weight.to(exact)
    future = torch.ones(block, block + WIDTHS, dtype=torch.bool).triu(1)
    for row in range(batch):
        hidden = None if visible is None else ~visible[row]
        for head in range(heads):
            queries, keys, values = (
                x.contiguous() for x in (q[row, head], k[row, head // shared], v[row, head // shared])
            )
            for first in range(0, length, block):
                last = min(first + block, length)
                rows, own = last - first, n_keys - length + first
                stop = min(n_keys, -(-(own + rows) // WIDTHS) * WIDTHS)
                p = product(queries[first:last], keys[:stop])
                if cap is not None:
                    p.div_(cap).tanh_().mul_(cap)
                p[:, own:].masked_fill_(future[:rows, : stop - own], float("-inf"))
                if hidden is not None:
                    p.masked_fill_(hidden[:stop], float("-inf"))
                torch.softmax(p, -1, out=p)
                if hidden is not None:
                    p.nan_to_num_(0.0)
                y[row, head, first:last] = product(p, values[:stop].T)
                if share is not None:
                    torch.ge(p, share, out=p)
                p = p.to(exact)
                if latest:
                    found = p.mul_(weight[first:last, None]).amax(0)
                    torch.maximum(mass[row, head, :stop], found, out=mass[row, head, :stop])
                else:
                    mass[row, head, :stop].addmv_(p.T, weight[first:last])
    return y.transpose(1, 2), mass


def attention_rows(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    visible: Tensor | None = None,
    slopes: Tensor | None = None,
    sink: Tensor | None = None,
    cap: float | None = None,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    """The attention weights of a few queries: q [B, T, H, D], k [B, Hkv, N, D] -> [B, H, T, N].

    The last T slots are the queries' own; slopes, sink, cap and positions as for `attend_cached`.
    visible: [B, N] or [B, Hkv, N] bool, False at slots that hold no token; None for all True.
    """
    length, n_keys = q.shape[1], k.shape[2]
    rows = (q * scale).transpose(1, 2).unflatten(1, (k.shape[1], -1))
    scores = capped(rows.flatten(2, 3) @ k.mT, cap).unflatten(2, rows.shape[2:4]).flatten(1, 2)
    if slopes is not None and q_position is not None and k_position is not None:
        distance = (q_position[:, None, :, None] - k_position[:, :, None, :]).repeat_interleave(rows.shape[2], 1)
        scores = scores - distance * slopes.to(q.device, q.dtype)[:, None, None]
    seen = _seen(n_keys - length, length, n_keys, q.device)
    if visible is not None:
        by_head = visible[:, None] if visible.ndim == 2 else visible.repeat_interleave(rows.shape[2], 1)
        seen = seen & by_head[:, :, None]
    return _weights(scores.masked_fill(~seen, float("-inf")), sink).nan_to_num(0.0)


def _seen(first: int, rows: int, n_keys: int, device: torch.device) -> Tensor:
    """[rows, N] bool: slots up to each query's own, which are first, first + 1 .."""
    return torch.arange(n_keys, device=device) <= torch.arange(first, first + rows, device=device)[:, None]
