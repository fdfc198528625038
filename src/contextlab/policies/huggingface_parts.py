"""Attention modules of `transformers` that attend several times in a forward, by the same weights to other values.

Differential attention (2410.05258), as transformers writes it, cuts the heads of values into n parts and calls
attention n times; in each, all query and key heads attend to the values of one part. So a key head is read with the
values of n heads. The n key heads that share their values are one for a policy: their keys in a row, their values in a
row, and queries that are zero where another head's key stands. What is held is what the model itself holds, each number
once, and one answer has all n.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from contextlab.errors import InputError

Turn = Callable[[Tensor, Tensor], Tensor]


def parts_of(name: str, calls: list[tuple[Tensor, Tensor, Tensor]], values: Tensor | None) -> int:
    """Into how many parts a module cuts its heads: by the query, key and value [B, H, T, D] of each call of attention.

    values: [B, Hkv, T, V], those of the tokens, before they were cut. Raises InputError where the calls differ in more
    than their values.
    """
    count = len(calls)
    if count < 2:
        return 1
    (query, key, _), heads = calls[0], 0 if values is None else values.shape[1]
    same = all(torch.equal(q, query) and torch.equal(k, key) for q, k, _ in calls)
    if not same or values is None or heads % count or key.shape[1] != heads:
        raise InputError(
            f"{name} calls attention more than once in a forward, with other queries or keys, so no policy can serve it"
        )
    for part, (_, _, value) in enumerate(calls):
        check_part(name, value, values, part, count)
    return count


def check_part(name: str, value: Tensor, values: Tensor, part: int, count: int) -> None:
    """Raises InputError unless value [B, Hkv, T, V] has the heads of a part of `values`, again and again."""
    last, own = value[:, :, -1], values.chunk(count, 1)[part][:, :, -1]
    if last.shape[1] != values.shape[1] or not torch.equal(last, own.repeat(1, count, 1)):
        raise InputError(f"{name} calls attention more than once in a forward, so no policy can serve it")


def in_a_row(x: Tensor, count: int) -> Tensor:
    """Keys or values x [B, Hkv, T, D] of heads that share their values, as one: [B, Hkv / n, T, n D]."""
    batch, heads, length, _ = x.shape
    return x.view(batch, count, heads // count, length, -1).permute(0, 2, 3, 1, 4).flatten(3)


def beside_zeros(query: Tensor, kv_heads: int, count: int) -> Tensor:
    """Queries [B, H, T, D] for such keys, of `kv_heads` heads: [B, H, T, n D], those of a key head in a row."""
    batch, _, length, dim = query.shape
    split = query.view(batch, count, kv_heads, -1, length, dim)
    wide = query.new_zeros(batch, kv_heads, count, split.shape[3], length, count, dim)
    for part in range(count):
        wide[:, :, part, :, :, part] = split[:, part]
    return wide.flatten(5).flatten(1, 3)


def answers(y: Tensor, kv_heads: int, count: int) -> list[Tensor]:
    """What each call is answered, [B, T, H, V], of the answer [B, T, H, n V] to `beside_zeros`."""
    batch, length, heads, _ = y.shape
    split = y.view(batch, length, kv_heads, count, -1, count, y.shape[3] // count)
    ordered = split.permute(5, 0, 1, 3, 2, 4, 6)  # [n, B, T, n, Hkv, shared, V]
    return list(ordered.reshape(count, batch, length, heads, -1).unbind())


def each_turned(turn: Turn | None, count: int) -> Turn | None:
    """`KVLayer.turn` of keys in a row."""
    if turn is None or count == 1:
        return turn

    def turned(x: Tensor, steps: Tensor) -> Tensor:
        many = steps.repeat_interleave(count, 2) if steps.shape[2] > 1 else steps
        return turn(x.unflatten(3, (count, -1)).flatten(2, 3), many).view_as(x)

    return turned
