"""Which pages a token may choose among, and how what it chose is fetched and answered."""

from __future__ import annotations

import torch
from torch import Tensor

from contextlab.ops.kv import KVLayer, attend_cached
from contextlab.state import KVState


def attend_kv(layer: KVLayer, q: Tensor, kv: KVState, new: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The answer [B, T, H, V] of the last tokens, q [B, T, H, D], from everything that was read.

    new: their keys and values, where nothing was read before them.
    """
    keys, values = (x.to(q.device) for x in kv.cached()) if new is None else new
    places = kv.positions()
    places = torch.arange(kv.length)[None] if places is None else places
    places = places.to(q.device)
    return attend_cached(
        q, keys.transpose(1, 2), values.transpose(1, 2), scale=layer.scale, slopes=layer.slopes, cap=layer.cap,
        visible=places >= 0 if kv.padded else None, q_position=places[:, -q.shape[1] :],
        k_position=places[:, None].expand(-1, layer.kv_heads, -1),
    )  # fmt: skip


def candidates(read: int, window: int, segment: int, page: int) -> tuple[int, int]:
    """Of `read` tokens: the pages of whole segments before the last `window`, and the first token in none of them."""
    first = max(0, read - window) // segment * segment
    return first // page, first


def row_candidates(read: Tensor, window: int, segment: int, page: int) -> tuple[Tensor, Tensor]:
    """`candidates` of each row: read [B]."""
    first = (read - window).clamp_min(0) // segment * segment
    return first // page, first


def fetched(buffer: Tensor, slots: Tensor, device: torch.device) -> Tensor:
    """buffer [B, Hkv, N, D] at slots [B, Hkv, n] int64: [B, Hkv, n, D] on `device`; copies no more than that."""
    batch, heads, room, dim = buffer.shape
    if not dim:
        return buffer.new_empty(*slots.shape, 0, device=device)
    slots = slots.to(buffer.device)
    rows = torch.arange(batch * heads, device=buffer.device)[:, None] * room + slots.flatten(0, 1)
    return buffer.reshape(-1, dim).index_select(0, rows.flatten()).view(batch, heads, -1, dim).to(device)
