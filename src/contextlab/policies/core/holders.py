"""How kept tokens are stored: the contract, and the plain form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from contextlab.ops.kv import KVLayer
from contextlab.policies.core.slots import Slots, slot_nbytes


class Holder(Protocol):
    """How kept tokens are stored, and what that takes; `Dense` is the plain form."""

    @property
    def lossless(self) -> bool:
        """Whether what is stored is read back as it was."""

    def check(self, layers: list[KVLayer]) -> None:
        """Raises InputError when it cannot store these layers' tokens."""

    def store(self, layer: KVLayer, values: dict[str, Tensor], room: int, length: int) -> Slots:
        """Fresh slots with these tokens: "keys", "values", "position", each [B, Hkv, n, ...]; see `Slots.of`."""

    def nbytes(self, slots: int, layer: KVLayer, batch: int, dtype: torch.dtype) -> int:
        """The most bytes that a store with room for so many tokens takes."""

    def fitting(self, allowed: float, each: int, most: int, layer: KVLayer, batch: int, dtype: torch.dtype) -> int:
        """The largest `slots` up to `most` with nbytes(slots) + slots * each <= allowed; 0 where none is."""


class Dense:
    """Keys and values as the model made them."""

    lossless = True

    def check(self, layers: list[KVLayer]) -> None:
        """See `Holder.check`: it can store all."""

    def store(self, layer: KVLayer, values: dict[str, Tensor], room: int, length: int) -> Slots:
        """See `Holder.store`: values each [B, Hkv, n, ...]."""
        return Slots.of(values, room, length)

    def nbytes(self, slots: int, layer: KVLayer, batch: int, dtype: torch.dtype) -> int:
        """See `Holder.nbytes`."""
        return slots * slot_nbytes(batch, layer.kv_heads, layer.key_dim, layer.value_dim, dtype)

    def fitting(self, allowed: float, each: int, most: int, layer: KVLayer, batch: int, dtype: torch.dtype) -> int:
        """See `Holder.fitting`."""
        return min(max(int(allowed // (self.nbytes(1, layer, batch, dtype) + each)), 0), most)


def largest_fitting(nbytes: Callable[[int], int], allowed: float, most: int) -> int:
    """The largest count up to `most` with nbytes(count) <= allowed, 0 where none is; nbytes rises nearly evenly."""
    # A line through two sizes tells nearly where.
    one, two = (nbytes(n * 2**20) for n in (1, 2))
    low = min(max(0, int((allowed - 2 * one + two) / ((two - one) / 2**20)) - 1), most)
    if nbytes(low) > allowed:
        low = 0
    high, width = most, 1
    while low + width <= high and nbytes(low + width) <= allowed:
        low, width = low + width, 2 * width
    high = min(high, low + width - 1)
    while low < high:
        middle = (low + high + 1) // 2
        if nbytes(middle) <= allowed:
            low = middle
        else:
            high = middle - 1
    return low
