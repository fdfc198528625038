"""The states that policies leave: tokens in slots that are written one after the other and gathered when too many."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from contextlab.state import KVState, State, frozen, tensor_bytes


@dataclass
class Slots(State):
    """Named values of the tokens that are held, in slots: each tensor [B, Hkv, room, ...], the first `used` in use.

    Without gradients tokens are written in place behind those held, so that reading one costs O(1); states that share
    a buffer (one continues the other) share a mark of what is written, and one that finds more written than it holds
    copies first. Nothing is ever written over, so older states stay valid.

    used: slots in use, the same for every row and head; a row that has fewer tokens has invalid ones in front.
    """

    values: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    used: int = dataclasses.field(default=0, metadata={"static": True})

    def __post_init__(self) -> None:
        self._written: list[int] | None = None  # see KVState

    def __getitem__(self, name: str) -> Tensor:
        """The values held, [B, Hkv, used, ...], a view."""
        return self.values[name][:, :, : self.used]

    @property
    def room(self) -> int:
        """Slots that there are."""
        return next(iter(self.values.values())).shape[2]

    def append(self, new: dict[str, Tensor], room: int) -> Slots:
        """With further tokens' values, each [B, Hkv, T, ...]; this state stays valid. room: of new slots, if needed."""
        count = next(iter(new.values())).shape[2]
        used = self.used + count
        room = max(room, used)
        if torch.is_grad_enabled():
            return Slots.of({name: torch.cat((self[name], x), 2) for name, x in new.items()}, room, self.length + count)
        mark, values = self._written, self.values
        if mark is None or mark[0] > self.used or self.room < used or any(frozen(x) for x in values.values()):
            values, mark = {name: _filled(self[name], room) for name in new}, [self.used]
        for name, x in new.items():
            values[name].narrow(2, self.used, count).copy_(x)
        mark[0] = used
        after = Slots(values, used, length=self.length + count)
        after._written = mark
        return after

    def within(self, room: int) -> Slots:
        """The same tokens in no more than so many slots, at least the `used` ones; this state stays valid."""
        return self if self.room <= room else Slots.of({name: self[name] for name in self.values}, room, self.length)

    @classmethod
    def of(cls, values: dict[str, Tensor], room: int, length: int) -> Slots:
        """Fresh slots that hold `values`, each [B, Hkv, n, ...], with room for at least n."""
        used = next(iter(values.values())).shape[2]
        slots = cls({name: _filled(x, max(room, used)) for name, x in values.items()}, used, length=length)
        slots._written = [used]
        return slots


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """x [B, Hkv, N, ...] at the slots index [B, Hkv, n]: [B, Hkv, n, ...]."""
    rest = x.shape[3:]
    return x.gather(2, index.reshape(*index.shape, *(1 for _ in rest)).expand(*index.shape, *rest))


def _filled(x: Tensor, room: int) -> Tensor:
    """x [B, Hkv, n, ...] in a fresh buffer of `room` slots."""
    if x.shape[2] == room:
        return x.clone(memory_format=torch.contiguous_format)
    if torch.is_grad_enabled() and x.requires_grad:
        return torch.cat((x, x.new_zeros(*x.shape[:2], room - x.shape[2], *x.shape[3:])), 2)
    buffer = x.new_zeros(*x.shape[:2], room, *x.shape[3:])
    buffer[:, :, : x.shape[2]] = x
    return buffer


@dataclass
class KeptState(State):
    """What an eviction policy keeps of one layer.

    slots: "keys" [B, Hkv, room, D] (rotary positions applied), "values" [B, Hkv, room, V] and "position" int32
        [B, Hkv, room], each token's place in its row, -1 where a slot holds none.
    start: [B] int64, the left-padding tokens of each row.
    mass: [B, Hkv, used] float32, the attention that each token got so far; only for policies that ask for it.
    queries: [B, n, H, D], the last ones; only for policies that ask for them.
    shift: [B, Hkv] int64, steps by which new tokens are turned back, where positions are those in the state.
    notes: what the policy remembers beside the tokens, each [B, ...].
    padded: whether any piece came with a mask.
    """

    slots: Slots
    start: Tensor
    mass: Tensor | None = None
    queries: Tensor | None = None
    shift: Tensor | None = None
    notes: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    padded: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def visible(self) -> Tensor | None:
        """[B, used] bool, where a slot holds a token; None when nothing is padded. The same for all heads."""
        return self.slots["position"][:, 0] >= 0 if self.padded else None

    @property
    def positions(self) -> Tensor:
        """[B, Hkv, used] int32: which tokens are held, by their places in their rows; -1 for none."""
        return self.slots["position"]


def slot_nbytes(batch: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one slot of all heads: key, value and position."""
    return tensor_bytes(batch, kv_heads, key_dim + value_dim, dtype=dtype) + tensor_bytes(
        batch, kv_heads, dtype=torch.int32
    )


def read_on(state: Any, mask: Tensor | None, count: int) -> tuple[Tensor, bool, int]:
    """Of a state that reads `count` tokens more: the padding of each row [B], whether there is any, the length.

    state: with `start` and `padded`, as a KeptState has them. mask: [B, count] bool of the new tokens, or None.
    """
    start = state.start if mask is None else state.start + (~mask).sum(1)
    return start, state.padded or mask is not None, state.length + count


def places_after(read: int, count: int, start: Tensor, padded: bool) -> Tensor:
    """[B, count] int64, the places in their rows of the tokens that follow `read` others, negative at padding.

    start: [B] int64, the padding of each row, all zeros unless `padded`.
    """
    if padded:
        return torch.arange(read, read + count, device=start.device) - start[:, None]
    if count > 1 or torch.compiler.is_compiling():
        return torch.arange(read, read + count, device=start.device).expand(len(start), -1)
    return _one_place(read, len(start), start.device, torch.is_inference_mode_enabled())


@lru_cache(maxsize=8)  # all layers of a decoded token want the same
def _one_place(place: int, batch: int, device: torch.device, inference: bool) -> Tensor:
    """[B, 1] int64; nobody may change it.

    inference: whether inference mode is on; what was made in it cannot be used by autograd.
    """
    return torch.full((batch, 1), place, device=device)


def tokens_in_slots(k: Tensor, v: Tensor, places: Tensor) -> dict[str, Tensor]:
    """The "keys", "values", "position" that slots hold, of k [B, T, Hkv, D], v [B, T, Hkv, V] and places [B, T].

    places: the tokens' in their rows, negative at padding.
    """
    position = places.to(torch.int32).clamp_min_(-1).unsqueeze(1).expand(-1, k.shape[2], -1)
    return {"keys": k.transpose(1, 2), "values": v.transpose(1, 2), "position": position}


def room_for(used: int, limit: int | None) -> int:
    """Slots to make for `used` tokens: they grow by a quarter, and never beyond the limit."""
    room = KVState.capacity(used)
    return room if limit is None else max(used, min(room, limit))
