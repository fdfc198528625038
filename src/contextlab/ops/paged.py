"""Attention over pages of tokens: heads that hold different numbers of tokens, without padding them to the longest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from contextlab.ops.kv import SCORES, values_of
from contextlab.ops.softmax import capped


def attend_paged(
    q: Tensor,
    page_keys: Tensor,
    page_values: Tensor,
    owner: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    page_visible: Tensor | None = None,
    visible: Tensor | None = None,
    slopes: Tensor | None = None,
    cap: float | None = None,
    q_position: Tensor | None = None,
    page_position: Tensor | None = None,
    k_position: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Softmax attention of the last T tokens over pages that each belong to one head, and over later tokens.

    A page is answered by its own head's queries alone, so the work is that of the tokens held; the pages of a head
    then meet in one softmax.

    q: [B, T, H, D]. page_keys: [B, P, S, D], page_values: [B, P, S, V], all before the first query.
    owner: [B, P] integers, the key head of each page.
    k: [B, Hkv, N, D], v: [B, Hkv, N, V]: tokens that every head holds; the last T slots are the queries' own.
    page_visible: [B, P, S] bool and visible: [B, N] bool, False at slots that hold no token; None for all True.
    slopes: [H] of ALiBi; then q_position [B, T], page_position [B, P, S] and k_position [B, Hkv, N] tell how far apart
        tokens stand.
    cap: see `KVLayer`.
    weight: [T], by which each query's attention counts in the mass; None for no mass.

    Returns [B, T, H, V], zeros where a query sees nothing; and, with `weight`, the attention that each slot of the
    pages got from the query heads that share its head, [B, P, S], and each later token, [B, Hkv, N].
    """
    batch, length, heads, dim = q.shape
    kv_heads, later = k.shape[1:3]
    page_values, v = values_of(page_keys, page_values), values_of(k, v)
    shared, (pages, size), owner = heads // kv_heads, page_keys.shape[1:3], owner.long()
    per_query = batch * max(pages * shared * max(size, dim), heads * later)
    block = min(length, max(1, SCORES // max(1, per_query)))
    rows = (q * scale).transpose(1, 2).unflatten(1, (kv_heads, shared))
    page_mass = q.new_zeros(batch, pages, size) if weight is not None else None
    mass = q.new_zeros(batch, kv_heads, later) if weight is not None else None
    outputs = []
    for first in range(0, length, block):
        last = min(first + block, length)
        count, stop = last - first, later - length + last
        x = rows[..., first:last, :].flatten(2, 3)  # [B, Hkv, shared * count, D]
        near, far = capped(x @ k[:, :, :stop].mT, cap), capped(picked(x, owner) @ page_keys.mT, cap)
        if slopes is not None:
            assert q_position is not None
            assert page_position is not None
            assert k_position is not None
            slope = slopes.to(q).view(1, kv_heads, shared, 1).expand(batch, -1, -1, count).flatten(2)
            at = q_position[:, None, first:last].repeat(1, 1, shared)[..., None]
            near = near + slope[..., None] * (k_position[:, :, None, :stop] - at)
            far = far + picked(slope, owner)[..., None] * (page_position[:, :, None] - at)
        if count > 1:
            future = torch.ones(count, count, dtype=torch.bool, device=q.device).triu(1).repeat(shared, 1)
            future = torch.nn.functional.pad(future, (stop - count, 0))
            near = near.masked_fill(future, -math.inf)
        if visible is not None:
            near = near.masked_fill(~visible[:, None, None, :stop], -math.inf)
        if page_visible is not None:
            far = far.masked_fill(~page_visible[:, :, None], -math.inf)
        index = owner[..., None].expand(-1, -1, x.shape[2])
        with torch.no_grad():
            highest = near.amax(-1).scatter_reduce(1, index, far.amax(-1), "amax")
            highest = highest.masked_fill(highest == -math.inf, 0.0)
        near, far = (near - highest[..., None]).exp(), (far - picked(highest, owner)[..., None]).exp()
        total = near.sum(-1).scatter_add(1, index, far.sum(-1))
        total = total.masked_fill(total == 0, 1.0)
        y = (near @ v[:, :, :stop]).scatter_add(1, index[..., None].expand(*index.shape, v.shape[3]), far @ page_values)
        outputs.append((y / total[..., None]).unflatten(2, (shared, count)))
        if mass is not None and page_mass is not None and weight is not None:
            part = weight[first:last].to(q).repeat(shared) / total  # [B, Hkv, shared * count]
            mass[..., :stop] += (part[..., None, :] @ near).squeeze(2)
            page_mass += (picked(part, owner)[..., None, :] @ far).squeeze(2)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 3)
    return y.flatten(1, 2).transpose(1, 2), page_mass, mass


def picked(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, ...] at index [B, n] int64: [B, n, ...]; of pages, say, by the head of each."""
    return x.gather(1, index.reshape(*index.shape, *(1 for _ in x.shape[2:])).expand(*index.shape, *x.shape[2:]))


def naive_attend_paged(
    q: Tensor,
    page_keys: Tensor,
    page_values: Tensor,
    owner: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    page_visible: Tensor | None = None,
) -> Tensor:
    """What defines `attend_paged`: each row and head alone, all that it holds in one matrix.

    Arguments as there. Returns [B, T, H, V].
    """
    length, shared = q.shape[1], q.shape[2] // k.shape[1]
    visible = torch.ones(page_keys.shape[:3], dtype=torch.bool) if page_visible is None else page_visible
    rows = []
    for b in range(len(q)):
        heads = []
        for h in range(q.shape[2]):
            seen = visible[b] & (owner[b] == h // shared)[:, None]
            keys = torch.cat((page_keys[b][seen], k[b, h // shared]))
            values = torch.cat((page_values[b][seen], v[b, h // shared]))
            future = torch.ones(length, len(keys), dtype=torch.bool).triu(len(keys) - length + 1)
            scores = (q[b, :, h] @ keys.mT * scale).masked_fill(future, -math.inf)
            heads.append(scores.softmax(-1) @ values)
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows)
