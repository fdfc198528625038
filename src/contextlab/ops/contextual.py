"""Contextual position encoding: positions that count what a query cares about (2405.18719)."""

from __future__ import annotations

import torch
from torch import Tensor

from contextlab.ops.linear import working_dtype
from contextlab.ops.softmax import check_shapes, resolve_positions

CHUNK = 256  # queries at once


def cope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    embedding: Tensor,
    *,
    scale: float | None = None,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention with contextual positions.

    The score of key j for query i is s_ij + q_i e(p_ij), s_ij = scale q_i k_j, p_ij = sum over j <= l <= i of
    sigmoid(s_il), at most P - 1, and e linear between the embeddings of the whole numbers.

    q: [B, Tq, H, D]. k: [B, Tk, Hkv, D], in order of position, Hkv divides H. v: [B, Tk, Hkv, V].
    embedding: [P, D], of the positions 0 to P - 1. scale: D ** -0.5 by default. q_position, k_position: see
    `softmax_attention`. Returns [B, Tq, H, V]; zeros for queries that see no key.
    """
    check_shapes(q, k, v)
    q_at, k_at = resolve_positions(q, k, q_position, k_position)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shared = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(shared, 2) if shared > 1 else x for x in (k, v))
    outputs, work = [], working_dtype(q.dtype)  # sums of gates outgrow the digits of a half precision
    for first in range(0, max(q.shape[1], 1), CHUNK):
        part, at = q[:, first : first + CHUNK], q_at[:, first : first + CHUNK]
        sees = (k_at[:, None, None] >= 0) & (k_at[:, None, None] <= at[:, None, :, None])
        scores = torch.einsum("bqhd,bkhd->bhqk", part, k).to(work) * scale
        gates = scores.sigmoid().masked_fill(~sees, 0.0)
        place = gates.flip(-1).cumsum(-1).flip(-1).clamp_max(len(embedding) - 1)
        low = place.detach().floor()
        known = torch.einsum("bqhd,pd->bhqp", part, embedding).to(work)
        below = known.gather(-1, low.long())
        above = known.gather(-1, (low.long() + 1).clamp_max(len(embedding) - 1))
        scores = scores + below + (place - low) * (above - below)
        weights = scores.masked_fill(~sees, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~sees, 0.0)
        outputs.append(torch.einsum("bhqk,bkhv->bqhv", weights.to(v.dtype), v))
    return torch.cat(outputs, 1)


def naive_cope_attention(q: Tensor, k: Tensor, v: Tensor, embedding: Tensor) -> Tensor:
    """What defines `cope_attention`, query by query, for whole sequences. Returns [B, T, H, V]."""
    rows, shared, last = [], q.shape[2] // k.shape[2], len(embedding) - 1
    for b, i, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys, query = k[b, : i + 1, h // shared], q[b, i, h]
        scores = keys @ query * q.shape[-1] ** -0.5
        bias = []
        for j in range(i + 1):
            place = min(scores[j:].sigmoid().sum().item(), last)
            low = int(place)
            between = embedding[low] * (1 - place + low) + embedding[min(low + 1, last)] * (place - low)
            bias.append(between @ query)
        rows.append((scores + torch.stack(bias)).softmax(0) @ v[b, : i + 1, h // shared])
    return torch.stack(rows).view(*q.shape[:3], v.shape[-1])
