"""Summaries of pages: what is kept of each so that a query can choose among them without reading them."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from contextlab.ops.kv import KVLayer
from contextlab.policies.core.base import Policy, in_own_places
from contextlab.policies.reading.fetching import fetched
from contextlab.state import KVState, State, tensor_bytes


@dataclass
class ReadState(State):
    """All that was read, and summaries of its pages by which the next token chooses what it reads.

    kv: every key and value; on the CPU, whatever the model's device, when `offloaded`.
    summary: named values of each complete page or segment, each [B, Hkv, room, ...] on the model's device; page i of
        a row holds its tokens i * page .., or those that "order" [B, Hkv, room, page] int32 names.
    query: [B, H, D], the last token's; only where pages are chosen ahead.
    read_tokens, read_nbytes: tokens of a row and bytes (pages of all rows, and summaries) that the last token read.
    """

    kv: KVState
    summary: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    query: Tensor | None = None
    offloaded: bool = dataclasses.field(default=False, metadata={"static": True})
    read_tokens: int = dataclasses.field(default=0, metadata={"static": True})
    read_nbytes: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def offloaded_nbytes(self) -> int:
        """Bytes in the CPU's memory, fetched when they are read; by their role where the model is there, too."""
        return self.kv.nbytes if self.offloaded else 0

    @property
    def resident_nbytes(self) -> int:
        """Bytes that stay on the model's device."""
        return self.nbytes - self.offloaded_nbytes


class Summarising(Policy):
    """A policy that keeps a summary of each page; `SelectivePolicy` reads what it chooses by them."""

    page: int
    """Tokens in a page."""
    vectors: ClassVar[int] = 1
    """Vectors of a key's size in a page's summary."""
    of_segments: ClassVar[tuple[str, ...]] = ()
    """Names of the summaries that a segment has one of; the others, each of its pages."""

    @abstractmethod
    def summarise(self, keys: Tensor) -> dict[str, Tensor]:
        """Summaries of segments: keys [B, Hkv, S, segment, D] -> named values, each [B, Hkv, S or pages, ...].

        "order" [B, Hkv, pages, page] int32, if it is among them, says which tokens of its segment a page holds.
        """

    @property
    def segment(self) -> int:
        """Tokens that are summarised at once: whole pages. Those of an open segment are read."""
        return self.page

    def summary_nbytes(self, layer: KVLayer, tokens: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that are read to choose among so many tokens' pages."""
        return tensor_bytes(batch, layer.kv_heads, tokens // self.page, self.vectors, layer.key_dim, dtype=dtype)

    def order_nbytes(self, layer: KVLayer, tokens: int, batch: int = 1) -> int:
        """Bytes that are read to find so many tokens of the chosen pages."""
        return 0

    @torch.no_grad()
    def _room(self, summary: dict[str, Tensor], like: Tensor, capacity: int) -> dict[str, Tensor]:
        """Fresh buffers of summaries for `capacity` tokens and a segment more; like: [B, Hkv, 0, D]."""
        segments = capacity // self.segment + 1
        if not summary:
            summary = self.summarise(like.detach().unflatten(2, (0, self.segment)))
        fresh = {}
        for name, x in summary.items():
            each = 1 if name in self.of_segments else self.segment // self.page
            fresh[name] = x.new_zeros(*x.shape[:2], segments * each, *x.shape[3:])
            fresh[name][:, :, : x.shape[2]] = x
        return fresh

    @torch.no_grad()
    def _summarise(self, layer: KVLayer, summary: dict[str, Tensor], kv: KVState, before: int) -> None:
        """Write the summaries of what is complete and was not when only `before` tokens were read."""
        if not summary:
            return
        batch, kv_heads, capacity, _ = kv.keys.shape
        size, pages = self.segment, self.segment // self.page
        device = next(iter(summary.values())).device
        if not kv.padded:
            first, last = before // size, kv.length // size
            if last == first:
                return
            new = kv.keys[:, :, first * size : last * size].to(device)
            at = torch.arange(first, last, device=device).expand(batch, -1)
        else:
            # Rows count from their own first token. Each gets as many segments as one may have completed; the
            # summary of one that is not complete is never read, and written again when it is.
            done = (before - kv.start).clamp_min(0) // size
            at = done[:, None] + torch.arange((kv.length - before) // size + 1, device=done.device)
            slots = (kv.start[:, None, None] + at[..., None] * size + torch.arange(size, device=done.device)).flatten(1)
            new = fetched(kv.keys, slots.clamp_max(capacity - 1)[:, None].expand(-1, kv_heads, -1), device)
            new, at = self._from_start(layer, new.transpose(1, 2), kv).transpose(1, 2), at.to(device)
        for name, x in self.summarise(new.unflatten(2, (-1, size))).items():
            each = x.shape[2] // at.shape[1]  # a value of each page, or one of the segment
            rows = (at[..., None] * each + torch.arange(each, device=device)).flatten(1)
            if name == "order":
                x = x + (rows // pages * size)[:, None, :, None].to(x)
            index = rows.reshape(batch, 1, -1, *(1 for _ in x.shape[3:])).expand(x.shape)
            summary[name].scatter_(2, index, x)

    def _from_start(self, layer: KVLayer, x: Tensor, kv: KVState) -> Tensor:
        """x [B, T, H, D] in its rows' own places, so that a page's summary does not depend on the padding."""
        return in_own_places(layer, x, kv.start.to(x.device)) if kv.padded else x

    def _summary(self, state: ReadState, among: int) -> dict[str, Tensor]:
        """Of the first `among` pages, whole segments."""
        segments = among * self.page // self.segment
        room = (state.kv.keys.shape[2] // self.segment) + 1
        return {name: x[:, :, : segments * (x.shape[2] // room)] for name, x in state.summary.items()}
