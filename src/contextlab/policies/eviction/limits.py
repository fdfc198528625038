"""How many tokens each layer may hold under a budget, by the bytes that they and all beside them take."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NoReturn

import torch

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.policies.core.base import Policy
from contextlab.policies.core.budget import OPEN, Budget
from contextlab.policies.core.division import divided, rounded_down
from contextlab.policies.core.holders import Holder
from contextlab.state import tensor_bytes


def _full_nbytes(layer: KVLayer, length: int, batch: int, dtype: torch.dtype) -> int:
    """Bytes of all keys and values of so many tokens."""
    return length * tensor_bytes(batch, layer.kv_heads, layer.key_dim + layer.value_dim, dtype=dtype)


class Limited(Policy):
    """A policy that holds so many tokens a layer as its budget allows; `EvictionPolicy` says what its options mean.

    A subclass says what it holds beside the tokens (`observe`, `accumulates`, `marks`, `notes_nbytes`): it counts.
    """

    allowed: Budget
    holder: Holder
    sinks: int
    window: int
    pyramid: float | None
    reposition: bool
    _parts: tuple[tuple[Any, ...], dict[int, int]] | None = None

    @property
    def observe(self) -> int:
        """Last queries that `score` wants to see, with their attention weights; they are held and counted."""
        return 0

    @property
    def accumulates(self) -> bool:
        """Whether `score` wants the attention that each token got from all queries so far (`Seen.mass`)."""
        return False

    @property
    def marks(self) -> bool:
        """Whether a number is given to each token when it is read (`mark`), and held with it (`Seen.mass`)."""
        return False

    def notes_nbytes(self, layer: KVLayer, batch: int, dtype: torch.dtype) -> int:
        """Bytes of what `remember` returns."""
        return 0

    @property
    def protected(self) -> int:
        """Tokens of each row that are never dropped."""
        return self.sinks + self.window

    def slots(self, layer: KVLayer, length: int, batch: int, dtype: torch.dtype, decoding: bool = False) -> int:
        """The most tokens a row that this layer may hold once `length` were read.

        decoding: whether the last was read alone: a layer that holds all is then given a little room to grow.
        """
        if self.allowed.everything:
            return OPEN
        if self.pyramid is not None or (self.allowed.kind == "bytes" and layer.unlike):
            peers = layer.peers or tuple(dataclasses.replace(layer, index=i) for i in range(layer.count))
            return self._divided(peers, length, batch, dtype, decoding)[layer.index]
        if self.allowed.kind == "tokens":
            return int(self.allowed.amount)
        if self.allowed.kind == "ratio":
            allowed = self.allowed.amount * _full_nbytes(layer, length, batch, dtype)
        else:
            allowed = self.allowed.amount / layer.states
        fixed, each = self._beside(layer, batch, dtype)
        low = self.holder.fitting(allowed - fixed, each, length + 1, layer, batch, dtype)
        least = self.protected + 1
        if low < least and self.allowed.kind == "bytes" and length >= least:
            self._refuse(batch, layer.states * self._nbytes(least, layer, batch, dtype))
        return max(low, least)

    def _divided(
        self, peers: tuple[KVLayer, ...], length: int, batch: int, dtype: torch.dtype, decoding: bool
    ) -> dict[int, int]:
        """`slots` of each of the layers, by its index.

        A layer has at least what is protected and one token more. Of a part, or of bytes, it has at most all that was
        read, and the others have what it cannot use; they give it back as more is read.
        """
        asked = (peers, self.allowed, self.holder, length, batch, dtype, decoding)
        if self._parts is not None and self._parts[0][0] is peers and self._parts[0][1:] == asked[1:]:
            return self._parts[1]  # all layers ask for the same in turn
        step = 1 << max(0, (length // 32).bit_length() - 1) if decoding else 1  # room to grow, by about a thirtieth
        most = -(-length // step) * step
        least = min(self.protected + 1, most)
        weights = [self._share(layer) for layer in peers]
        total = self.allowed.amount * len(peers)
        if self.allowed.kind == "tokens":  # whatever was read: a row's own tokens do not depend on its padding
            count = len(peers)
            parts = divided(total, weights, [self.protected + 1] * count, [OPEN] * count)
            whole = rounded_down(parts, int(total), [OPEN] * count)
        else:
            if self.allowed.kind == "ratio":
                total = self.allowed.amount * sum(_full_nbytes(layer, length, batch, dtype) for layer in peers)
            else:
                total /= peers[0].states
            needed = [self._nbytes(least, layer, batch, dtype) for layer in peers]
            if self.allowed.kind == "bytes" and sum(needed) > total and length > self.protected:
                self._refuse(batch, sum(needed) * peers[0].states / len(peers))
            parts = divided(total, weights, needed, [self._nbytes(most, layer, batch, dtype) for layer in peers])
            whole = []
            for layer, part in zip(peers, parts, strict=True):
                fixed, each = self._beside(layer, batch, dtype)
                whole.append(max(least, self.holder.fitting(part - fixed, each, most, layer, batch, dtype)))
        slots = {layer.index: count for layer, count in zip(peers, whole, strict=True)}
        self._parts = asked, slots
        return slots

    def _beside(self, layer: KVLayer, batch: int, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes of a layer that its holder does not count: whatever it holds, and for each slot."""
        fixed = tensor_bytes(batch, dtype=torch.int64) + self.notes_nbytes(layer, batch, dtype)
        if self.observe:
            fixed += tensor_bytes(batch, self.observe, layer.heads, layer.key_dim, dtype=dtype)
        if self.reposition:
            fixed += tensor_bytes(batch, layer.kv_heads, dtype=torch.int64)
        each = tensor_bytes(batch, layer.kv_heads, dtype=torch.float32) if self.accumulates or self.marks else 0
        return fixed, each

    def _nbytes(self, slots: int, layer: KVLayer, batch: int, dtype: torch.dtype) -> int:
        """Bytes of a layer with so many slots."""
        fixed, each = self._beside(layer, batch, dtype)
        return fixed + self.holder.nbytes(slots, layer, batch, dtype) + slots * each

    def _refuse(self, batch: int, needed: float) -> NoReturn:
        raise InputError(
            f"budget: {self.allowed} does not hold the {self.protected} protected tokens (sinks {self.sinks} + "
            f"window {self.window}) of {batch} rows and one more; it takes {math.ceil(needed)}B or a smaller window"
        )

    def _share(self, layer: KVLayer) -> float:
        """What this layer is to get, compared with the others."""
        if self.pyramid is None or layer.count == 1:
            return 1.0
        last = 1 / self.pyramid
        return 2 - last - (2 - 2 * last) * layer.index / (layer.count - 1)
