"""Selective reading: everything is kept, and each decoded token reads a few pages of it, chosen by its query."""

from __future__ import annotations

import copy
import dataclasses
import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from contextlab.errors import InputError, check_whole
from contextlab.ops.kv import KVLayer, values_of
from contextlab.ops.softmax import attend, capped
from contextlab.policies.core.base import Policy
from contextlab.policies.core.budget import OPEN, Amount, Budget
from contextlab.policies.core.ranking import best
from contextlab.policies.reading.fetching import attend_kv, candidates, fetched, row_candidates
from contextlab.policies.reading.summaries import ReadState, Summarising
from contextlab.state import KVState, State, tensor_bytes


class SelectivePolicy(Summarising):
    """Base of the policies that keep every token and read a few pages of them for each decoded token.

    Pages of `page` neighbouring tokens are summarised once they are complete; a query chooses the pages of highest
    `relevance` by the summaries and reads these and the latest tokens. The query heads that share a key head read the
    same pages: a page counts as much as for the head that wants it most, compared with that head's best page.
    A piece of several tokens reads everything, as do the prompts of the papers; the budget is for decoding.

    budget: what one token may read: "512tok" (summaries not counted), "10%" (of the bytes of all keys and values) or
        "64MB" (by all layers and rows together), these two with the summaries. A context so short that the latest
        tokens take all of a part is read in these only.
    window: last tokens that are always read.
    page: tokens in a page; default 16, or more where the summaries would take over half of a budget in per cent.
    sinks: first tokens that are always read.
    skip: first layers that are left alone and read everything.
    ahead: choose the pages by the query of the token before, as one must who fetches them ahead of time; here they
        are fetched when they are read.
    offload: keep keys and values in the CPU's memory and fetch what is read; summaries stay on the model's device.
    """

    serves_caps = True

    bounds = "read"
    kind: ClassVar[type[ReadState]] = ReadState
    """The class of its states."""

    def __init__(
        self,
        budget: Amount = None,
        window: int = 16,
        page: int | None = None,
        sinks: int = 0,
        skip: int = 0,
        ahead: bool = False,
        offload: bool = False,
    ) -> None:
        self.budget = Budget.of(budget)
        self.given_page = page
        self.page = self._page_size()
        check_whole(window=(window, 1), page=(self.page, 1), sinks=(sinks, 0), skip=(skip, 0))
        self.window, self.sinks, self.skip = window, sinks, skip
        self.ahead, self.offload = ahead, offload

    def _page_size(self) -> int:
        """Tokens in a page: as given, or as many as the budget allows."""
        if self.given_page is not None:
            return self.given_page
        page = 16
        while self.budget.kind == "ratio" and self.vectors / (2 * page) > self.budget.amount / 2:
            page *= 2
        return page

    def with_budget(self, budget: Amount) -> SelectivePolicy:
        """See `Policy.with_budget`; where no page was given, its size follows the budget."""
        other = copy.copy(self)
        other.budget = Budget.of(budget)
        other.page = other._page_size()
        return other

    def bytes_read(self, state: State) -> int:
        """See `Policy.bytes_read`."""
        return state.read_nbytes if isinstance(state, ReadState) else 0

    @property
    def chunk_invariant(self) -> bool:
        """See `Policy.chunk_invariant`: pieces of several tokens read everything, single tokens do not."""
        return self.budget.everything

    @abstractmethod
    def relevance(self, q: Tensor, summary: dict[str, Tensor]) -> Tensor:
        """What queries want: q [B, Hkv, G, D], summaries as from `summarise` -> estimated scores [B, Hkv, G, pages]."""

    @property
    def _sink_pages(self) -> int:
        return -(-self.sinks // self.page)

    @property
    def latest(self) -> int:
        """The most tokens that are read because they are the latest: the window, and what has no summary yet."""
        return self.window + self.segment - 1 + int(self.ahead)

    def at(self, layer: KVLayer) -> Policy | None:
        """See `Policy.at`."""
        return None if layer.index < self.skip else self

    def check(self, layers: list[KVLayer]) -> None:
        """See `Policy.check`."""
        last = max(layer.index for layer in layers)
        if self.skip > last:
            raise InputError(f"skip: {self.skip} leaves none of the {len(layers)} layers; lower it to {last}")
        least = self.latest + max(self.page, self._sink_pages * self.page)
        if self.budget.kind == "tokens" and self.budget.amount < least:
            raise InputError(
                f"budget: {self.budget} does not hold the {self.latest} latest tokens (window {self.window} and an "
                f"open segment of {self.segment}) and a page; raise it to {least}tok or lower page"
            )
        for layer in layers:
            part = self.summary_nbytes(layer, self.segment) / self.token_nbytes(layer, self.segment)
            if self.budget.kind == "ratio" and part >= self.budget.amount:
                raise InputError(
                    f"budget: to choose the pages takes {100 * part:.3g}% of all keys and values, which is not below "
                    f"{self.budget}; {self._remedy(part)}"
                )

    def _remedy(self, part: float) -> str:
        return f"raise page to {math.ceil(2 * self.page * part / self.budget.amount)}"

    def token_nbytes(self, layer: KVLayer, tokens: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of so many tokens' keys and values."""
        return tensor_bytes(batch, layer.kv_heads, tokens, layer.key_dim + layer.value_dim, dtype=dtype)

    def tokens(self, layer: KVLayer, length: int, batch: int, dtype: torch.dtype) -> int:
        """The most tokens of a row that the last of `length` may read."""
        if self.budget.everything:
            return OPEN
        if self.budget.kind == "tokens":
            return int(self.budget.amount)
        each = self.token_nbytes(layer, 1, batch, dtype) + self.order_nbytes(layer, 1, batch)
        summaries = self.summary_nbytes(layer, length, batch, dtype)
        if self.budget.kind == "ratio":  # where the context is short, the latest tokens at least
            return int(self.budget.amount * length * each - summaries) // each
        served = (layer.count - self.skip) * layer.times
        fits = int(self.budget.amount / served - summaries) // each
        least = self.latest + self.page
        if fits < min(least, length):
            raise InputError(
                f"budget: {self.budget} is too small for {length} tokens in {batch} rows: a token reads page summaries "
                f"and {least} tokens; raise it to {served * (summaries + least * each)}B"
            )
        return fits

    def attend(
        self,
        layer: KVLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: State | None,
        mask: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, State | None]:
        """See `Policy.attend`."""
        state = self._continued(self.kind, layer, k, v, state)
        after = self._extended(layer, state, q, k, v, mask)
        pages = None
        if q.shape[1] == 1:
            pages = self._pages(layer, q[:, 0] if state.query is None else state.query, after)
        if pages is None:
            y = attend_kv(layer, q, after.kv, None if state.length else (k, v))
            tokens, summaries = after.length, 0
        else:
            y, tokens = self._read(layer, q, after, pages)
            among = self._candidates(after.length)[1]
            summaries = self.summary_nbytes(layer, among, len(q), k.dtype)
            summaries += self.order_nbytes(layer, pages.shape[2] * self.page, len(q))
        if not keep_state:
            return y, None
        read = self.token_nbytes(layer, tokens, len(q), k.dtype) + summaries
        query = q[:, -1].detach().clone() if self.ahead else None
        return y, dataclasses.replace(after, query=query, read_tokens=tokens, read_nbytes=read)

    def convert(self, layer: KVLayer, state: KVState) -> ReadState:
        """See `Policy.convert`."""
        after = ReadState(state.to("cpu") if self.offload else state, offloaded=self.offload, length=state.length)
        if self.budget.everything:
            return after
        batch, kv_heads, _, dim = state.keys.shape
        summary = self._room({}, state.keys.new_empty(batch, kv_heads, 0, dim), state.keys.shape[2])
        self._summarise(layer, summary, state, 0)
        return dataclasses.replace(after, summary=summary)

    def _extended(
        self, layer: KVLayer, state: ReadState, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> ReadState:
        """With the new tokens and the summaries of the pages that they complete."""
        before = state.kv
        if self.offload and not before.keys.is_cpu:  # someone moved the state
            before = before.to("cpu")
        if self.offload:
            after = before.append(k.cpu(), v.cpu(), None if mask is None else mask.cpu())
        else:
            after = before.append(k, v, mask)
        summary = state.summary
        if not self.budget.everything:
            if after.keys is not before.keys:  # what the old buffers' other holders may write stays theirs
                summary = self._room(summary, k.transpose(1, 2)[:, :, :0], after.keys.shape[2])
            self._summarise(layer, summary, after, state.length)
        return dataclasses.replace(state, kv=after, summary=summary, length=after.length)

    def _candidates(self, length: int) -> tuple[int, int]:
        """The pages among which the last of `length` tokens chooses, and the first token that it reads anyway."""
        return candidates(length - int(self.ahead), self.window, self.segment, self.page)

    def _pages(self, layer: KVLayer, query: Tensor, state: ReadState) -> Tensor | None:
        """The pages [B, Hkv, n] that a token reads, -1 for none; None for all. query: [B, H, D]."""
        limit = self.tokens(layer, state.length, len(query), query.dtype)
        among, _ = self._candidates(state.length)
        count = max(0, (limit - self.latest) // self.page)
        if among <= count:
            return None
        with torch.no_grad():
            query = self._from_start(layer, query[:, None], state.kv)[:, 0]
            grouped = (query * layer.scale).unflatten(1, (layer.kv_heads, -1))
            scores = capped(self.relevance(grouped, self._summary(state, among)), layer.cap)
            page, pages = self.page, torch.arange(among, device=query.device)
            own = None
            if state.kv.padded:
                read = state.length - state.kv.start.to(query.device)
                own = pages >= row_candidates(read - int(self.ahead), self.window, self.segment, page)[0][:, None]
                scores = scores.masked_fill(own[:, None, None], -math.inf)
            if layer.slopes is not None:  # rows differ by a constant
                per = self.segment // page
                away = (among // per - 1 - pages // per) * self.segment  # as near as a page's last token may be
                bias = away * layer.slopes.to(scores)[:, None]
                scores = scores - bias.unflatten(0, (layer.kv_heads, -1))
            wanted = scores[:, :, 0]
            if scores.shape[2] > 1:
                wanted = (scores - scores.amax(-1, keepdim=True)).amax(2)
            wanted[..., : self._sink_pages] = math.inf
            if own is not None:
                wanted = wanted.masked_fill(own[:, None], -math.inf)
            chosen = best(wanted, count)
            return chosen if own is None else chosen.masked_fill(wanted.gather(-1, chosen) == -math.inf, -1)

    def _chosen(self, state: ReadState, pages: Tensor, count: int = 1) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the last `count` tokens read: some pages [B, Hkv, n], -1 for none, and the latest tokens.

        Returns the tokens' slots in the buffers and their places in their rows, both [B, Hkv, N] int64, and where
        these hold a token [B, Hkv, N] bool, None for all True.
        """
        batch, kv_heads, _ = pages.shape
        device, page = pages.device, self.page
        chosen = pages.clamp_min(0)
        if "order" in state.summary:
            index = chosen[..., None].expand(-1, -1, -1, page)
            at = state.summary["order"].gather(2, index).long()
        else:
            at = chosen[..., None] * page + torch.arange(page, device=device)
        if not state.kv.padded:
            first = self._candidates(state.length - count + 1)[1]
            tail = torch.arange(first, state.length, device=device).expand(batch, kv_heads, -1)
            places = torch.cat((at.flatten(2), tail), 2)
            return places, places, None
        start = state.kv.start.to(device)
        read = state.length - start
        begin = row_candidates(read - count + 1 - int(self.ahead), self.window, self.segment, page)[1][:, None]
        tail = (begin + torch.arange(self.latest + count - 1, device=device))[:, None].expand(-1, kv_heads, -1)
        valid = (pages >= 0).repeat_interleave(page, 2)
        seen = torch.cat((valid, tail < read[:, None, None]), 2)
        places = torch.cat((at.flatten(2), tail), 2)
        return (places + start[:, None, None]).clamp_max(state.length - 1), places, seen

    def _read(self, layer: KVLayer, q: Tensor, state: ReadState, pages: Tensor) -> tuple[Tensor, int]:
        """The answer [B, 1, H, V] of one token from some pages and the latest tokens, and how many tokens it read."""
        slots, places, seen = self._chosen(state, pages)
        kv_heads, device = pages.shape[1], pages.device
        keys, values = fetched(state.kv.keys, slots, q.device), fetched(state.kv.values, slots, q.device)
        values = values_of(keys, values)
        bias = seen[:, :, None] if seen is not None else None
        shared = layer.heads // layer.kv_heads
        if layer.slopes is not None:
            last = (
                state.length - 1
                if not state.kv.padded
                else (state.length - 1 - state.kv.start.to(device))[:, None, None]
            )
            slope = layer.slopes.to(q).unflatten(0, (kv_heads, shared))[:, :, None]
            tilt = (places - last)[:, :, None] * slope
            bias = tilt if bias is None else tilt.masked_fill(~bias, -math.inf)
        heads = q[:, 0].unflatten(1, (kv_heads, shared)).transpose(1, 2)  # as many queries on each key head
        y = attend(heads, keys.transpose(1, 2), values.transpose(1, 2), layer.scale, bias, cap=layer.cap)
        return y.transpose(1, 2).flatten(1, 2)[:, None], slots.shape[2]
