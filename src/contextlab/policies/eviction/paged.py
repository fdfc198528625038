"""Heads that hold different numbers of tokens: their state in pages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from contextlab.ops.kv import KVLayer
from contextlab.policies.core.holders import Dense, largest_fitting
from contextlab.policies.core.slots import Slots
from contextlab.state import State, tensor_bytes


@dataclass
class PagedState(State):
    """What one layer keeps where heads hold different numbers of tokens.

    Tokens that were chosen lie in pages, each of one head; those read since lie in slots that every head has. In a
    head's pages tokens stand in the order of their places, empty slots, if any, in front.

    pages: "keys" [B, P, S, D] (rotary positions applied), "values" [B, P, S, V], "position" int32 [B, P, S], each
        token's place in its row, -1 where a slot holds none.
    owner: [B, P] int16, the key head of each page, rising.
    tail: the same of the tokens read since, [B, Hkv, room, ...].
    start: [B] int64, the left-padding tokens of each row.
    mass: the attention that each token got so far, float32, of "pages" [B, P, S] and "tail" [B, Hkv, used]; empty
        for policies that do not ask for it.
    queries, notes, padded: see `KeptState`.
    """

    pages: dict[str, Tensor]
    owner: Tensor
    tail: Slots
    start: Tensor
    mass: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    queries: Tensor | None = None
    notes: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    padded: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def paged(self) -> int:
        """Slots that a head has in pages, on average."""
        pages, size = self.pages["position"].shape[1:]
        return pages * size // self.tail.values["position"].shape[1]

    def places(self) -> list[list[list[int]]]:
        """The places of the tokens that each row and head holds, for people to look at."""
        found = []
        for row, owner in enumerate(self.owner.tolist()):
            heads = self.tail["position"][row].tolist()
            for page in reversed(range(len(owner))):
                heads[owner[page]] = self.pages["position"][row, page].tolist() + heads[owner[page]]
            found.append([[place for place in head if place >= 0] for head in heads])
        return found


class Paged(Dense):
    """Keys and values as the model made them, in pages: what a store of the tokens of all heads takes.

    size: the fewest tokens of a page where heads have so many slots, on average.
    """

    def __init__(self, size: Callable[[int], int]) -> None:
        self.size = size

    def nbytes(self, slots: int, layer: KVLayer, batch: int, dtype: torch.dtype) -> int:
        """See `Holder.nbytes`: with the owner of each page."""
        pages = -(-slots // self.size(slots))
        return super().nbytes(slots, layer, batch, dtype) + tensor_bytes(
            batch, layer.kv_heads, pages, dtype=torch.int16
        )

    def fitting(self, allowed: float, each: int, most: int, layer: KVLayer, batch: int, dtype: torch.dtype) -> int:
        """See `Holder.fitting`."""
        return largest_fitting(lambda slots: self.nbytes(slots, layer, batch, dtype) + slots * each, allowed, most)


def places_in_pages(take: Tensor, pages: int, size: int) -> tuple[Tensor, Tensor]:
    """Where slots go: take [B, Hkv, N] bool, which slots go into `pages` pages of `size`.

    Returns for each place of the pages [B, P * S] int64 the slot, counted over all heads, that it holds, -1 for none;
    and the head [B, P] int64 of each page. The empty places of a head stand in front of its tokens, and pages that no
    head needs are the first head's, in front.
    """
    batch, kv_heads, slots = take.shape
    count = take.sum(2)
    own = -(-count // size)
    own[:, 0] += pages - own.sum(1)
    ends = own.cumsum(1)
    first = (ends * size - count)[..., None]  # a head's tokens fill its last places
    goal = torch.where(take, first + take.cumsum(2) - 1, pages * size).flatten(1)
    index = take.new_full((batch, pages * size + 1), -1, dtype=torch.int64)
    index.scatter_(1, goal, torch.arange(kv_heads * slots, device=take.device).expand(batch, -1))
    at = torch.arange(pages, device=take.device).expand(batch, -1).contiguous()
    return index[:, :-1], torch.searchsorted(ends, at, right=True)
