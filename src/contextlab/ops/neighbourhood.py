"""Neighbourhood attention: every query sees the same number of nearest keys (2204.07143; in one dimension)."""

from __future__ import annotations

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.softmax import attend, check_shapes

CHUNK = 256  # queries at once


def neighbourhood_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, dilation: int = 1, start: Tensor | None = None
) -> Tensor:
    """Each query sees the `window` keys around it; at the ends of a sequence the window is shifted inwards.

    With a dilation d the tokens are parted by their place modulo d, and each part is a sequence of its own
    (2209.15001). A sequence, or part, of fewer tokens than the window is seen whole.

    q: [B, T, H, D]. k: [B, T, Hkv, D], Hkv divides H. v: [B, T, Hkv, V]. start: [B] int64, left-padding tokens of each
    row, or None. Returns [B, T, H, V]; zeros at padding.
    """
    check_shapes(q, k, v)
    for name, value in (("window", window), ("dilation", dilation)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    length = q.shape[1]
    first = torch.zeros(1, dtype=torch.int64, device=q.device) if start is None else start
    place = torch.arange(length, device=q.device) - first[:, None]  # [B or 1, T]
    part, index = place % dilation, place.div(dilation, rounding_mode="floor")
    size = (length - first[:, None] - part + dilation - 1).div(dilation, rounding_mode="floor")  # of each one's part
    low = torch.minimum(index - window // 2, size - window).clamp_min(0)
    outputs = []
    for begin in range(0, max(length, 1), CHUNK):
        rows = slice(begin, min(begin + CHUNK, length))
        reach = dilation * window
        near = slice(max(0, min(begin, length - reach) - reach), min(length, rows.stop + reach))
        if start is not None:  # a row's first token may stand anywhere
            near = slice(0, length)
        keys, lowest = index[:, None, None, near], low[:, None, rows, None]
        sees = (keys >= lowest) & (keys < lowest + window) & (part[:, None, None, near] == part[:, None, rows, None])
        sees = sees & (place[:, None, None, near] >= 0) & (place[:, None, rows, None] >= 0)
        outputs.append(attend(q[:, rows], k[:, near], v[:, near], None, sees))
    return torch.cat(outputs, 1)
