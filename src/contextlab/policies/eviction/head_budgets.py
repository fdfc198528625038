"""Budgets that are divided between the heads of a layer by what each needs, with nothing stored for the rest."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from contextlab.errors import InputError, check_whole
from contextlab.ops.kv import KVLayer, attend_cached, attention_with_mass
from contextlab.ops.paged import attend_paged, picked
from contextlab.policies.core.base import Policy
from contextlab.policies.core.budget import Amount
from contextlab.policies.core.ranking import in_order
from contextlab.policies.core.slots import Slots, places_after, read_on, room_for, tokens_in_slots
from contextlab.policies.eviction.base import EvictionPolicy
from contextlab.policies.eviction.borrowed import Borrowing, score_of
from contextlab.policies.eviction.paged import Paged, PagedState, places_in_pages
from contextlab.policies.eviction.seen import Seen
from contextlab.registry import register
from contextlab.state import KVState, State

LARGE = 1e30
"""What an infinite importance counts among finite ones."""


@register(
    "policy",
    "ada_kv",
    family="head budgets",
    papers=("2407.11550",),
    cases=({}, {"of": "h2o", "every": 1, "floor": 0.5}, {"of": "key_norm", "page": 4}, {"of": "tova", "floor": 0.0}),
)
class AdaKV(Borrowing):
    """Ada-KV: the heads of a layer share one budget, and the tokens of highest importance over all heads are kept.

    Any policy that is a score gives the importance. Attention scores add up to one in every head, so a head that
    attends to few tokens keeps few. The memory of dropped tokens is free: heads store what they keep in pages.
    Differs from the paper in that budgets are divided by the page, by the mean importance of the tokens in it, and
    while decoding as well; page=1 divides them as the paper does.

    budget: what may be kept: "10%", "512tok" (a head's, on average), "64MB".
    of: the policy whose score it is, by name or made already; snapkv as in the paper.
    options: further options of that policy, such as {kernel: 3}.
    floor: the part of a head's even share that it has at least; 0 for none.
    page: tokens in a page; default at most 64 and so few that a head's even share has 16 pages.
    sinks: first tokens of each row that no head drops; default that policy's.
    window: last tokens that no head drops; default that policy's.
    every: slots of a head made free at a time while decoding; default an eighth. The paper compresses the prompt only.
    """

    only_scores = False
    serves_sinks = False

    def __init__(
        self,
        budget: Amount = None,
        of: str | EvictionPolicy = "snapkv",
        options: dict[str, Any] | None = None,
        floor: float = 0.2,
        page: int | None = None,
        sinks: int | None = None,
        window: int | None = None,
        every: int | None = None,
    ) -> None:
        score = score_of(of, options or {}, sinks, window)
        super().__init__(budget, score.sinks, score.window, every, score.pyramid)
        if isinstance(floor, bool) or not 0 <= floor <= 1:
            raise InputError(f"floor: expected a part from 0 to 1, got {floor!r}; 1 divides the budget evenly")
        if page is not None:
            check_whole(page=(page, 1))
        self.of, self.floor, self.page = score, floor, page
        self.holder = Paged(self._least_page)

    @property
    def protected(self) -> int:
        """See `EvictionPolicy.protected`, in whole pages."""
        return -(-(self.sinks + self.window) // (self.page or 1)) * (self.page or 1)

    def __or__(self, other: Policy) -> Policy:
        """See `Policy.__or__`: refused."""
        right = type(other).__name__
        raise InputError(
            f"AdaKV | {right}: heads of different lengths cannot be stored otherwise; put snapkv on the left"
        )

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
        state = self._continued(PagedState, layer, k, v, state)
        batch, count = q.shape[:2]
        start, padded, length = read_on(state, mask, count)
        limit = self.slots(layer, length, batch, k.dtype, count == 1)
        if count == 1 and state.paged + state.tail.used + 1 > limit:
            judged = dataclasses.replace(state, queries=q) if self.pre_attention else state
            state = self._packed(layer, judged, limit, self._target(limit))
        elif state.paged + state.tail.room > limit >= state.paged + state.tail.used:  # what was lent is given back
            state = dataclasses.replace(state, tail=state.tail.within(limit - state.paged))
        places = places_after(state.length, count, start, padded)
        new = tokens_in_slots(k, v, places)
        used, tail = state.tail.used + count, state.tail
        fits = state.paged + used <= limit
        room = room_for(used, max(limit - state.paged, 0))
        if count == 1 or (keep_state and fits):
            tail = tail.append(new, room)
        else:
            tail = Slots({name: torch.cat((tail[name], x), 2) for name, x in new.items()}, used, length=length)
        y, mass = self._weighed(layer, q, tail, state, places, padded)
        if not keep_state:
            return y, None
        queries = state.queries
        if self.pre_attention:
            queries = q[:, -1:]
        elif self.observe:
            seen = q if queries is None else torch.cat((queries, q), 1)
            queries = seen[:, -self.observe :].clone(memory_format=torch.contiguous_format)
        notes = self.remember(layer, state.notes, q, places, state.length)
        after = PagedState(
            state.pages, state.owner, tail, start, mass, queries, notes, padded, length=length,
        )  # fmt: skip
        after = after if fits else self._packed(layer, after, limit, limit)
        return y, dataclasses.replace(after, queries=None) if self.pre_attention else after

    def _weighed(
        self, layer: KVLayer, q: Tensor, tail: Slots, state: PagedState, places: Tensor, padded: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The answer [B, T, H, V], and the attention that tokens got, for policies that ask for it."""
        count, fade = q.shape[1], self.forgetting
        visible = tail["position"][:, 0] >= 0 if padded else None
        weight = None
        if self.accumulates:
            weight = fade ** torch.arange(count - 1, -1, -1, device=q.device, dtype=torch.float32)
        own = tail["keys"], tail["values"]
        far, near = None, None
        if state.paged:
            at = state.pages["position"]
            y, far, near = attend_paged(
                q, state.pages["keys"], state.pages["values"], state.owner, *own, scale=layer.scale, visible=visible,
                page_visible=at >= 0 if padded else None, slopes=layer.slopes, cap=layer.cap, q_position=places,
                page_position=at, k_position=tail["position"], weight=weight,
            )  # fmt: skip
        elif weight is None:
            y = attend_cached(
                q, *own, scale=layer.scale, visible=visible, slopes=layer.slopes, cap=layer.cap, q_position=places,
                k_position=tail["position"],
            )  # fmt: skip
        else:
            y, near = attention_with_mass(q, *own, scale=layer.scale, weight=weight, visible=visible, cap=layer.cap)
            near = layer.per_kv_head(near)
        if self.marks:
            new = self.marked(layer, q, tail, state, places)
            return y, {"pages": state.mass["pages"], "tail": torch.cat((state.mass["tail"], new), 2)}
        if weight is None or near is None:
            return y, {}
        mass = {"pages": state.mass["pages"] * fade**count, "tail": near.to(torch.float32)}
        if far is not None:
            mass["pages"] = mass["pages"] + far.to(torch.float32)
        mass["tail"][..., : state.tail.used] += state.mass["tail"] * fade**count
        return y, mass

    def _dense(self, state: PagedState, kv_heads: int) -> dict[str, Tensor]:
        """All that is held, each [B, Hkv, N, ...], the empty slots of the heads that hold less in front."""
        tail = {name: state.tail[name] for name in state.tail.values}
        if state.mass:
            tail["mass"] = state.mass["tail"]
        if not state.paged:
            return tail
        pages = {**state.pages, **({"mass": state.mass["pages"]} if state.mass else {})}
        count, size = pages["position"].shape[1:]
        own = torch.nn.functional.one_hot(state.owner.long(), kv_heads).sum(1) * size  # [B, Hkv] slots
        longest = int(own.max())
        slot = torch.arange(longest, device=own.device) - (longest - own)[..., None]  # in the head's own part
        index = (slot.clamp_min(0) + (own.cumsum(1) - own)[..., None]).clamp_max(count * size - 1).flatten(1)
        whole = {name: picked(x.flatten(1, 2), index).unflatten(1, (kv_heads, -1)) for name, x in pages.items()}
        whole["position"] = whole["position"].masked_fill(slot < 0, -1)
        if state.mass:
            whole["mass"] = whole["mass"].masked_fill(slot < 0, 0.0)
        return {name: torch.cat((x, tail[name]), 2) for name, x in whole.items()}

    def _packed(self, layer: KVLayer, state: PagedState, limit: int, full: int) -> PagedState:
        """Only the most important tokens, in pages; a row that has fewer than `limit` a head keeps all that it has.

        full: slots that a head keeps, on average, in rows that drop tokens.
        """
        dense = self._dense(state, layer.kv_heads)
        mass = dense.pop("mass", None)
        positions = dense["position"].long()
        kv_heads, slots = positions.shape[1:]
        visible = positions >= 0
        some = state.padded or slots > state.paged + state.tail.used  # some slot may be empty
        with torch.no_grad():
            shown = visible if some else None
            seen = (positions, state.queries, mass, state.length, layer, state.notes, shown)
            values = layer.values(dense["keys"], dense["values"])
            importance = self.score(Seen(dense["keys"], values, *seen)).to(torch.float64)
            read = (state.length - state.start)[:, None, None]
            firm = (positions < self.sinks) | (positions >= read - self.window)
            importance = importance.clamp(-LARGE, LARGE).masked_fill(firm, math.inf).masked_fill(~visible, -math.inf)
            have = visible.sum((1, 2)) // kv_heads
            drops = have >= limit
            keeps = state.padded and not bool(drops.all())
            size = state.pages["position"].shape[2] if keeps and state.paged else self._page_size(self._target(limit))
            whole = full // size * size  # slots in pages
            if keeps and bool(((have < read[:, 0, 0]) & ~drops).any()):
                whole = max(whole, state.paged)  # such a row cannot have fewer pages than it has
            rest = min(max(full - whole, 0), self.window)  # of the last tokens, which no head drops: in the tail
            take, spare = self._division(importance, drops, have, whole, size, rest)
            index, owner = places_in_pages(take, kv_heads * whole // size, size)
        empty = index < 0
        index = index.clamp_min(0)
        pages = {}
        for name, x in {**dense, **({} if mass is None else {"mass": mass})}.items():
            pages[name] = picked(x.flatten(1, 2), index).unflatten(1, (-1, size))
        pages["position"] = pages["position"].masked_fill(empty.unflatten(1, (-1, size)), -1)
        later = int(spare.max()) if keeps else rest  # slots of the tail, the same for all rows
        tail = {name: x[:, :, slots - later :] for name, x in dense.items()}
        out = torch.arange(later, 0, -1, device=spare.device) > spare[:, None, None]
        tail["position"] = tail["position"].masked_fill(out, -1)
        room = room_for(later, limit - whole)
        masses = {}
        if mass is not None:
            masses["pages"] = pages.pop("mass").masked_fill(empty.unflatten(1, (-1, size)), 0.0)
            masses["tail"] = mass[:, :, slots - later :].masked_fill(out, 0.0)
        return dataclasses.replace(
            state, pages=pages, owner=owner.to(torch.int16), tail=Slots.of(tail, room, state.length), mass=masses,
        )  # fmt: skip

    def _page_size(self, slots: int) -> int:
        """Tokens in a page where a head has so many slots on average."""
        if self.page is not None:
            return self.page
        size = 64
        while size > 1 and (size * 16 > slots or -(-self.protected // size) > slots // size):
            size //= 2
        return size

    def _least_page(self, limit: int) -> int:
        """Tokens in the smallest pages that are held where a head may have so many slots: some may be older."""
        if self.page is not None:
            return self.page
        return max(1, self._page_size(self._target(limit)) // 2) if limit > self.protected else 1

    def _division(
        self, importance: Tensor, drops: Tensor, have: Tensor, whole: int, size: int, rest: int
    ) -> tuple[Tensor, Tensor]:
        """Which slots [B, Hkv, N] bool go into pages, and how many [B] of each row's last stay in the tail.

        rest: how many do in rows that drop tokens, and at least in the others.
        """
        _, kv_heads, slots = importance.shape
        if rest:
            last = torch.arange(slots, 0, -1, device=importance.device) <= rest
            importance = importance.masked_fill(last & drops[:, None, None], -math.inf)
        order = in_order(importance, slots)
        rank = torch.empty_like(order).scatter_(2, order, torch.arange(slots, device=order.device).expand_as(order))
        page = torch.arange(slots // size, device=order.device)
        best = importance.gather(2, order)[..., : len(page) * size].unflatten(2, (-1, size))
        worth = best.clamp(-LARGE, LARGE).mean(3)  # falls with the page, so that each head's first ones are chosen
        least = max(-(-(self.sinks + self.window - rest) // size), int(self.floor * whole) // size)
        own = (importance > -math.inf).sum(2, keepdim=True) // size  # pages that a head can fill
        worth = worth.masked_fill(page < least, math.inf).masked_fill(page >= own, -math.inf)
        by_page = worth.transpose(1, 2).flatten(1)  # so that heads of equal worth have as many pages
        chosen = by_page.argsort(dim=1, descending=True, stable=True)[:, : kv_heads * whole // size]
        count = torch.nn.functional.one_hot(chosen % kv_heads, kv_heads).sum(1)
        spare = (have - whole).clamp_min(rest).masked_fill(drops, rest)
        last = torch.arange(slots, 0, -1, device=order.device) <= spare[:, None, None]
        all_but_last = (importance > -math.inf) & ~last
        return torch.where(drops[:, None, None], rank < count[..., None] * size, True) & all_but_last, spare

    def convert(self, layer: KVLayer, state: KVState) -> PagedState:
        """See `Policy.convert`."""
        if state.length and self.needs:
            raise InputError(
                f"AdaKV of {type(self.of).__name__} judges tokens by the queries that read them, and a state does not "
                "hold those; attach the policy before reading"
            )
        keys, values = state.cached()
        batch, used = keys.shape[:2]
        places = torch.arange(used, device=keys.device) - state.start[:, None]
        tokens = tokens_in_slots(keys, values, places)
        limit = self.slots(layer, max(used, 1), batch, keys.dtype)
        tail = Slots.of(tokens, room_for(used, limit), used) if used <= limit else Slots(tokens, used, length=used)
        pages = {name: x.new_empty(batch, 0, 1, *x.shape[3:]) for name, x in tokens.items()}
        owner = torch.zeros(batch, 0, dtype=torch.int16, device=keys.device)
        mass = {}
        if self.accumulates or self.marks:
            mass = {"pages": keys.new_zeros(batch, 0, 1, dtype=torch.float32)}
            mass["tail"] = keys.new_zeros(batch, layer.kv_heads, used, dtype=torch.float32)
        after = PagedState(pages, owner, tail, state.start, mass, padded=state.padded, length=used)
        return after if used <= limit else self._packed(layer, after, limit, limit)
