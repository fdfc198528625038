"""Eviction: how a policy that drops tokens keeps to its budget; what it drops is one method, `score`."""

from __future__ import annotations

import copy
import dataclasses
import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from contextlab.errors import InputError, check_whole
from contextlab.ops.kv import KVLayer, attend_cached, attention_with_mass
from contextlab.policies.core.base import Policy, in_own_places
from contextlab.policies.core.budget import Amount, Budget
from contextlab.policies.core.holders import Dense, Holder
from contextlab.policies.core.ranking import in_order
from contextlab.policies.core.slots import KeptState, Slots, gathered, places_after, read_on, room_for, tokens_in_slots
from contextlab.policies.eviction.limits import Limited
from contextlab.policies.eviction.seen import Seen
from contextlab.state import KVState, State


@dataclass(eq=False)
class EvictionPolicy(Limited):
    """Base of the policies that keep the tokens of highest importance; a new one defines `score`.

    The first `sinks` tokens of each row and the last `window` are always kept. Whenever a piece was read, and while
    decoding whenever all slots are taken, the least important tokens are dropped; in decoding `every` slots are made
    free at once, so that memory is moved once in as many tokens (1: token by token, as most papers define it).

    budget: what may be kept, as `Budget.of` reads it; "10%", "512tok", "64MB". While a part of the full cache does not
        hold what is protected and one token more, as at the start of every sequence, those are kept all the same.
    sinks: first tokens of each row that are never dropped.
    window: last tokens that are never dropped.
    every: slots made free at a time while decoding; default an eighth of the slots that are not protected.
    pyramid: None divides the budget evenly between layers; p >= 1 gives the last layer 1/p of the average, the first
        as much more, and those between evenly less (PyramidKV, 2406.02069). Each layer has what is protected and one
        token more; what of a part or of bytes a layer cannot use, as it holds all that was read, the others have.
    reposition: whether tokens take the positions that they have among those held, as in StreamingLLM, instead of
        their true ones; needs rotary positions.
    """

    only_scores = True  # a subclass that does more than score says that it does not
    serves_sinks = serves_caps = True  # and so does one that attends by itself

    budget: Amount = None
    sinks: int = 4
    window: int = 32
    every: int | None = None
    pyramid: float | None = None
    reposition: bool = False

    def __post_init__(self) -> None:
        every = {} if self.every is None else {"every": (self.every, 1)}
        check_whole(sinks=(self.sinks, 0), window=(self.window, 1), **every)
        if self.pyramid is not None and not self.pyramid >= 1:
            raise InputError(f"pyramid: expected at least 1 (1: each layer keeps the same), got {self.pyramid!r}")
        self.budget = self.allowed = Budget.of(self.budget)
        self.holder: Holder = Dense()

    def mark(self, layer: KVLayer, q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        """The numbers [B, Hkv, T] of new tokens, where the policy `marks` them.

        q: [B, T, H, D], k: [B, T, Hkv, D], v: [B, T, Hkv, V]. at: [B or 1, T] int64, by how many steps they are
        rotated.
        """
        raise NotImplementedError(f"{type(self).__name__} gives tokens no numbers")

    def marked(self, layer: KVLayer, q: Tensor, slots: Slots, state: State, places: Tensor) -> Tensor:
        """`mark` of the tokens that were put into slots last: q [B, T, H, D] of them, in float32.

        state: before them. places: [B, T] int64, theirs in their rows.
        """
        new = slice(slots.used - q.shape[1], slots.used)
        k, v = (slots[name][:, :, new].transpose(1, 2) for name in ("keys", "values"))
        at = places if layer.by_row else torch.arange(state.length, slots.length, device=q.device)[None]
        with torch.no_grad():
            return self.mark(layer, q, k, v, at).to(torch.float32)

    @property
    def turns(self) -> bool:
        """See `Policy.turns`: to the places among what is held."""
        return self.reposition

    @property
    def pre_attention(self) -> bool:
        """Whether tokens are judged by the new token's query before it is answered; that query is not held."""
        return False

    @property
    def chunk_invariant(self) -> bool:
        """See `Policy.chunk_invariant`: a piece is answered in full before anything is dropped."""
        return self.allowed.everything and self.lossless

    @property
    def lossless(self) -> bool:
        """See `Policy.lossless`: that of the storage."""
        return self.holder.lossless

    def with_budget(self, budget: Amount) -> EvictionPolicy:
        """See `Policy.with_budget`."""
        other = copy.copy(self)
        other.budget = other.allowed = Budget.of(budget)
        return other

    def __or__(self, other: Policy) -> Policy:
        """See `Policy.__or__`; both policies stay as they are."""
        left, right = type(self).__name__, type(other).__name__
        if not isinstance(self.holder, Dense):
            raise InputError(f"{left} | {right}: {left} stores its tokens in another way already; leave one out")
        if other.storage is None:
            raise InputError(f"{left} | {right}: {right} does not store what another policy keeps; quantize and fp8 do")
        both = copy.copy(self)
        both.holder = other.storage
        return both

    @abstractmethod
    def score(self, seen: Seen) -> Tensor:
        """The importance [B, Hkv, N] of each token held; the highest are kept. Infinite values are allowed."""

    @property
    def forgetting(self) -> float:
        """Factor by which accumulated attention fades with each query; 1 never forgets (`accumulates` only)."""
        return 1.0

    @property
    def needs(self) -> str:
        """See `Policy.needs`."""
        last = "the last query" if self.observe == 1 else f"the last {self.observe} queries"
        queries = last if self.observe else "the new query" * self.pre_attention
        return " and ".join(filter(None, ("the attention of all queries" if self.accumulates else "", queries)))

    def remember(
        self, layer: KVLayer, notes: dict[str, Tensor], q: Tensor, places: Tensor, length: int
    ) -> dict[str, Tensor]:
        """What to hold beside the tokens, each tensor [B, ...], once the queries q [B, T, H, D] were read.

        notes: what it returned last, empty at first; they must stay as they are. places: [B, T] int64, of the
            queries' tokens in their rows, negative at padding. length: tokens read before them.
        """
        return notes

    def check(self, layers: list[KVLayer]) -> None:
        """See `Policy.check`."""
        self.holder.check(layers)
        if self.allowed.kind == "tokens":
            given = int(self.allowed.amount)
            if given <= self.protected:
                raise InputError(
                    f"budget: {given} tokens do not hold the {self.protected} protected ones (sinks {self.sinks} + "
                    f"window {self.window}) and one more; raise it to {self.protected + 1}tok or lower window"
                )
        for layer in layers:
            if self.reposition and layer.turn is None:
                raise InputError("reposition: the model has no rotary positions to change; leave it out")
            if (self.accumulates or self.marks) and layer.slopes is not None:
                raise InputError(f"{type(self).__name__}: does not add up attention that has ALiBi's bias; use snapkv")

    def empty(self, layer: KVLayer, k: Tensor, v: Tensor) -> KeptState:
        """A state that has read nothing, for k [B, T, Hkv, D] and v [B, T, Hkv, V]."""
        batch, _, kv_heads, dim = k.shape
        places = torch.zeros(batch, kv_heads, 0, dtype=torch.int32, device=k.device)
        none = {"keys": k.transpose(1, 2)[:, :, :0], "values": v.transpose(1, 2)[:, :, :0], "position": places}
        return KeptState(
            self.holder.store(layer, none, 0, 0),
            torch.zeros(batch, dtype=torch.int64, device=k.device),
            k.new_zeros(batch, kv_heads, 0, dtype=torch.float32) if self.accumulates or self.marks else None,
            k.new_zeros(batch, 0, layer.heads, dim) if self.observe else None,
            torch.zeros(batch, kv_heads, dtype=torch.int64, device=k.device) if self.reposition else None,
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
        state = self._continued(KeptState, layer, k, v, state)
        batch, count = q.shape[:2]
        start, padded, length = read_on(state, mask, count)
        limit = self.slots(layer, length, batch, k.dtype, count == 1)
        if padded and not self.lossless:
            q, k = in_own_places(layer, q, start), in_own_places(layer, k, start)
        if count == 1 and state.slots.used + 1 > limit:
            judged = dataclasses.replace(state, queries=q) if self.pre_attention else state
            state = self._evict(layer, judged, limit, self._target(limit))
        elif state.slots.room > limit >= state.slots.used:  # what was lent is given back
            state = dataclasses.replace(state, slots=state.slots.within(limit))
        if state.shift is not None and layer.turn is not None:
            steps = -state.shift[:, None]  # [B, 1, Hkv]
            q, k = layer.turn(q, steps.repeat_interleave(layer.heads // layer.kv_heads, 2)), layer.turn(k, steps)
        places = places_after(state.length, count, start, padded)
        new = tokens_in_slots(k, v, places)
        used = state.slots.used + count
        room = room_for(used, limit)
        if count == 1:
            slots = seen = state.slots.append(new, room)
        else:  # a piece is answered from what it holds itself, in full, before anything of it is dropped
            all_of = (
                {name: torch.cat((state.slots[name], x), 2) for name, x in new.items()} if state.slots.used else new
            )
            seen = Slots(all_of, used, length=length)
            slots = state.slots.append(new, room) if keep_state and used <= limit else seen
        y, mass = self._answer(layer, q, seen, state, places, padded)
        if not keep_state:
            return y, None
        queries = state.queries
        if self.pre_attention:
            queries = q[:, -1:]
        elif queries is not None:
            before = queries[:, max(0, queries.shape[1] + count - self.observe) :]
            queries = torch.cat((before, q[:, -self.observe :]), 1)
        notes = self.remember(layer, state.notes, q, places, state.length)
        after = KeptState(slots, start, mass, queries, state.shift, notes, padded, length=length)
        after = self._evict(layer, after, limit) if used > limit else after
        return y, dataclasses.replace(after, queries=None) if self.pre_attention else after

    def _answer(
        self, layer: KVLayer, q: Tensor, slots: Slots, state: KeptState, places: Tensor, padded: bool
    ) -> tuple[Tensor, Tensor | None]:
        keys, values = slots["keys"], slots["values"]
        visible = slots["position"][:, 0] >= 0 if padded else None
        if not self.accumulates:
            positions = slots["position"] if layer.slopes is not None else None
            y = attend_cached(
                q, keys, values, scale=layer.scale, visible=visible, slopes=layer.slopes, sink=layer.sink,
                cap=layer.cap, q_position=places, k_position=positions,
            )  # fmt: skip
            if not self.marks:
                return y, None
            assert state.mass is not None
            return y, torch.cat((state.mass, self.marked(layer, q, slots, state, places)), 2)
        count, fade = q.shape[1], self.forgetting
        weight = torch.ones(count, device=q.device)
        if fade < 1:
            weight = fade ** torch.arange(count - 1, -1, -1, device=q.device, dtype=torch.float32)
        y, got = attention_with_mass(
            q, keys, values, scale=layer.scale, weight=weight, visible=visible, sink=layer.sink, cap=layer.cap
        )
        mass = layer.per_kv_head(got).to(torch.float32)
        if state.mass is not None and state.mass.shape[2]:
            mass[..., : state.mass.shape[2]] += state.mass * fade**count
        return y, mass

    def _target(self, limit: int) -> int:
        """Tokens kept when slots run out while decoding."""
        free = limit - self.protected
        return limit - min(free, max(1, free // 8) if self.every is None else self.every)

    def _evict(self, layer: KVLayer, state: KeptState, limit: int, full: int | None = None) -> KeptState:
        """Only the most important tokens of each head, in the order of their places, in `limit` slots.

        full: how many a row keeps that has no slot left; default limit.
        """
        index, left = self.kept(layer, state, limit, full)
        kept = {name: gathered(state.slots[name], index) for name in ("keys", "values", "position")}
        mass = None if state.mass is None else gathered(state.mass, index)
        kept, notes = self.merged(layer, state, index, left, kept)
        if state.padded:
            dropped = torch.arange(index.shape[2], device=index.device) < index.shape[2] - left[:, None, None]
            kept["position"] = kept["position"].masked_fill(dropped, -1)
            mass = None if mass is None else mass.masked_fill(dropped, 0.0)
        shift = state.shift
        if shift is not None and layer.turn is not None:
            # Tokens held always stand at 0, 1 .. without a gap, whatever their true places; so shall these.
            before = (state.positions[:, 0] >= 0).sum(1)  # tokens of each row
            ranks = torch.arange(index.shape[2], device=index.device) - (index.shape[2] - left)[:, None, None]
            steps = ranks - (index - (state.slots.used - before)[:, None, None])
            kept["keys"] = layer.turn(kept["keys"].transpose(1, 2), steps.transpose(1, 2)).transpose(1, 2)
            shift = shift + (before - left)[:, None]
        slots = self.holder.store(layer, kept, limit, state.length)
        return dataclasses.replace(state, slots=slots, mass=mass, shift=shift, notes=notes)

    def merged(
        self, layer: KVLayer, state: KeptState, index: Tensor, left: Tensor, kept: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Put what is left of the dropped tokens into those that are kept; by default nothing is.

        state: before the eviction. index [B, Hkv, n], left [B]: see `kept`.
        kept: "keys", "values", "position" of the kept tokens, each [B, Hkv, n, ...].

        Returns `kept`, changed or not, and the notes to go on with; what it is given must stay as it is.
        """
        return kept, state.notes

    def kept(self, layer: KVLayer, state: KeptState, limit: int, full: int | None = None) -> tuple[Tensor, Tensor]:
        """The slots [B, Hkv, n] int64 of the tokens to keep, rising, and how many [B] of them, the last, hold one.

        Rows are judged alone: one that has fewer than `limit` tokens keeps all that it has, whatever the others do.
        """
        slots = state.slots
        positions = slots["position"].long()
        with torch.no_grad():
            importance = self.score(self.seen(layer, state))
            read = (state.length - state.start)[:, None, None]
            importance = importance.masked_fill((positions < self.sinks) | (positions >= read - self.window), math.inf)
            importance = importance.masked_fill(positions < 0, -math.inf)  # slots without a token come last
            have = (positions[:, 0] >= 0).sum(1)
            left = torch.where(have < limit, have, limit if full is None else full)
            keep = int(left.max()) if state.padded else min(limit if full is None else full, slots.used)
            chosen = in_order(importance, keep)
            if state.padded:  # a row's first `left` in order of importance; the rest goes in front
                chosen = chosen.masked_fill(torch.arange(keep, device=chosen.device) >= left[:, None, None], -1)
            return chosen.sort(2).values.clamp_min(0), left

    def seen(self, layer: KVLayer, state: KeptState) -> Seen:
        """What `score` judges the tokens of a state by."""
        slots, keys = state.slots, state.slots["keys"]
        return Seen(
            keys, layer.values(keys, slots["values"]), slots["position"].long(), state.queries, state.mass,
            state.length, layer, state.notes, state.visible,
        )  # fmt: skip

    def convert(self, layer: KVLayer, state: KVState) -> State:
        """See `Policy.convert`."""
        if state.length and self.needs:
            raise InputError(
                f"{type(self).__name__} judges tokens by the queries that read them, and a state does not hold those; "
                "attach the policy before reading"
            )
        keys, values = state.cached()
        empty = self.empty(layer, keys, values)
        if not state.length:
            return empty
        if state.padded and not self.lossless:
            keys = in_own_places(layer, keys, state.start)
        batch, used = keys.shape[:2]
        tokens = tokens_in_slots(keys, values, torch.arange(used, device=keys.device) - state.start[:, None])
        limit = self.slots(layer, used, batch, keys.dtype)
        slots = self.holder.store(layer, tokens, room_for(used, limit), used) if used <= limit else Slots(
            tokens, used, length=used
        )  # fmt: skip
        kept = dataclasses.replace(empty, slots=slots, start=state.start, padded=state.padded, length=used)
        return self._evict(layer, kept, limit) if used > limit else kept
