"""Slots that are means of neighbouring tokens: what dynamic memory compression holds, how it is read and grows."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from contextlab.ops.kv import KVLayer
from contextlab.ops.paged import picked
from contextlab.ops.precision import working_dtype
from contextlab.ops.softmax import attend, capped
from contextlab.policies.core.budget import OPEN
from contextlab.policies.core.slots import Slots, room_for
from contextlab.state import State


@dataclass
class MergedState(State):
    """What one layer holds where tokens were merged: heads hold different numbers of slots.

    A slot is the weighted mean of neighbouring tokens of one head, and stands where the last of them stood.

    pool: the slots that no token joins any more, of all heads in one list: "keys" [B, 1, room, D] (rotary positions
        applied), "values" [B, 1, room, V], "position" int32 [B, 1, room], -1 where there is none, "weight" (the
        tokens' sum of weights), "logit" float32 (by how much the gate preferred to merge the slot's first token with
        the slot before), "owner" int16 (the key head).
    last: the slot of each head that the next token may join, the same values but "owner", each [B, Hkv, ...].
    start: [B] int64, the left-padding tokens of each row.
    padded: whether any piece came with a mask.
    """

    pool: Slots
    last: dict[str, Tensor]
    start: Tensor
    padded: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def counts(self) -> Tensor:
        """[B, Hkv] int64, how many slots each head holds."""
        kv_heads = self.last["position"].shape[1]
        of_head = one_hot(self.pool["owner"][:, 0].long(), kv_heads) * (self.pool["position"][:, 0, :, None] >= 0)
        return of_head.sum(1) + (self.last["position"] >= 0)


def partial_means(layer: KVLayer, keys: Tensor, values: Tensor, logit: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The last slot's key and value after each token, where tokens join it in part (Section 3.2, partial accumulation).

    With b_t = sigmoid(logit_t), s_t = b_t s_{t-1} + w_t x_t and z_t = b_t z_{t-1} + w_t the slot is s_t / z_t; as a
    matrix, x_j counts w_j b_{j+1} ... b_t in slot t. Keys are turned to where token t stands.

    keys: [B, Hkv, T, D], rotated, from the first token on. values: [B, Hkv, T, V]. logit, weight: [B, Hkv, T].

    Returns both, in the shapes given; the memory is O(T^2).
    """
    step = torch.arange(keys.shape[2], device=keys.device)
    stays = logsigmoid(logit.double()).cumsum(2)
    future = step > step[:, None]
    part = (stays[..., :, None] - stays[..., None, :]).masked_fill(future, -math.inf).exp() * weight[..., None, :]
    part = part / part.sum(3, keepdim=True)
    mean = part.to(values.dtype) @ torch.cat((turned(layer, keys, -step), values), 3)
    mean_keys, mean_values = mean.split((keys.shape[3], values.shape[3]), 3)
    return turned(layer, mean_keys, step), mean_values


def turned(layer: KVLayer, x: Tensor, step: Tensor) -> Tensor:
    """x [B, Hkv, T, D] turned by step [T] further."""
    return x if layer.turn is None else layer.turn(x.transpose(1, 2), step[None, :, None]).transpose(1, 2)


def empty(k: Tensor, v: Tensor) -> MergedState:
    """A state that has read nothing, for k [B, T, Hkv, D] and v [B, T, Hkv, V]."""
    batch, _, heads, _ = k.shape
    wide = working_dtype(k.dtype)  # in 16 bits the sum of weights would soon not grow
    last = {
        "keys": k.new_zeros(batch, heads, k.shape[3]),
        "values": v.new_zeros(batch, heads, v.shape[3]),
        "position": torch.full((batch, heads), -1, dtype=torch.int32, device=k.device),
        "weight": k.new_ones(batch, heads, dtype=wide),
        "logit": k.new_zeros(batch, heads, dtype=torch.float32),
    }
    pool = {name: x[:, None, :0] for name, x in last.items()}
    pool["owner"] = torch.zeros(batch, 1, 0, dtype=torch.int16, device=k.device)
    start = torch.zeros(batch, dtype=torch.int64, device=k.device)
    return MergedState(Slots.of(pool, 0, 0), last, start)


def rightmost(where: Tensor) -> tuple[Tensor, Tensor]:
    """The places [B, n] int64 of what is True in [B, N], in order and at the right; and which of them are for none."""
    count = where.sum(1)
    width = int(count.max()) if where.shape[1] else 0
    index = where.to(torch.uint8).argsort(dim=1, stable=True)[:, where.shape[1] - width :]
    return index, torch.arange(width, device=where.device) < (width - count)[:, None]


def pushed(pool: Slots, slots: dict[str, Tensor], closed: Tensor, limit: int, length: int) -> Slots:
    """The pool with those of the slots [B, Hkv, T + 1, ...] that were closed: [B, Hkv, T] bool."""
    index, empty = rightmost(closed.flatten(1))
    if not index.shape[1]:
        after = dataclasses.replace(pool, length=length)
        after._written = pool._written
        return after
    new = {name: picked(x[:, :, :-1].flatten(1, 2), index)[:, None] for name, x in slots.items()}
    new["position"] = new["position"].masked_fill(empty[:, None], -1)
    new["owner"] = (index // closed.shape[2]).to(torch.int16)[:, None]
    if pool.used + index.shape[1] > pool.room:  # it is copied anyway: without the gaps of rows that pushed less
        index, empty = rightmost(pool["position"][:, 0] >= 0)
        moved = {name: picked(pool[name][:, 0], index)[:, None] for name in pool.values}
        moved["position"] = moved["position"].masked_fill(empty[:, None], -1)
        pool = Slots(moved, index.shape[1])
    after = pool.append(new, room_for(pool.used + new["position"].shape[2], limit))
    after.length = length
    return after


def by_head(pool: Slots, kv_heads: int) -> dict[str, Tensor]:
    """Keys, values and positions of a pool, [B, Hkv, n, ...]: the empty slots of heads that hold less in front."""
    owner = pool["owner"][:, 0].long().masked_fill(pool["position"][:, 0] < 0, -1)
    mine = owner[:, None] == torch.arange(kv_heads, device=owner.device)[:, None]  # [B, Hkv, P]
    index, empty = rightmost(mine.flatten(0, 1))
    index, empty = index.unflatten(0, (-1, kv_heads)), empty.unflatten(0, (-1, kv_heads))
    slots = {
        name: picked(pool[name][:, 0], index.flatten(1)).unflatten(1, (kv_heads, -1))
        for name in ("keys", "values", "position")
    }
    slots["position"] = slots["position"].masked_fill(empty, -1)
    return slots


def answer_one(layer: KVLayer, q: Tensor, state: MergedState, places: Tensor) -> Tensor:
    """The answer [B, 1, H, V] to one token, whose slots are the last ones of the state.

    All heads score the whole pool and are masked after: more work, but of one matrix product, and many times as fast
    as each head's own slots picked from it.
    """
    kv_heads, pool, last = layer.kv_heads, state.pool, state.last
    x = (q[:, 0] * layer.scale).unflatten(1, (kv_heads, -1))  # [B, Hkv, shared, D]
    near = capped(x @ last["keys"][..., None], layer.cap)
    far = capped(x.flatten(1, 2) @ pool["keys"][:, 0].mT, layer.cap)
    position, owner = pool["position"], pool["owner"]
    if layer.slopes is not None:
        slope = layer.slopes.to(x)[:, None]
        near = near + slope.unflatten(0, (kv_heads, -1)) * (
            last["position"][..., None, None] - places[:, -1, None, None, None]
        )
        far = far + slope * (position - places[:, -1, None, None])
    hidden = (owner != torch.arange(kv_heads, device=q.device)[:, None]) | (position < 0)
    scores = torch.cat((far.unflatten(1, (kv_heads, -1)).masked_fill(hidden[:, :, None], -math.inf), near), 3)
    far, near = scores.softmax(3).split((pool.used, 1), 3)
    y = (far.flatten(1, 2) @ pool["values"][:, 0]).unflatten(1, (kv_heads, -1)) + near * last["values"][:, :, None]
    return y.flatten(1, 2)[:, None]


def attend_biased(
    layer: KVLayer, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, places: Tensor, position: Tensor
) -> Tensor:
    """Causal attention where each key has a bias for all queries but its own.

    q: [B, T, H, D]. keys: [B, Hkv, N, D], values: [B, Hkv, N, V]: the last T are the queries' own.
    bias: [B, Hkv, N], added to the scores. places: [B or 1, T] and position: [B or 1, Hkv or 1, N], for ALiBi.

    Returns [B, T, H, V]. In blocks of queries, so that no bias is larger than [B, H, 256, N].
    """
    count, total = q.shape[1], keys.shape[2]
    shared = layer.heads // layer.kv_heads
    keys, values, slot = keys.transpose(1, 2), values.transpose(1, 2), torch.arange(total, device=q.device)
    outputs = []
    for first in range(0, count, 256):
        few = slice(first, min(first + 256, count))
        stop = total - count + few.stop  # what comes later is seen by none of them
        own = slot[total - count :][few, None]
        scores = bias[:, :, None, :stop].masked_fill(slot[:stop] == own, 0.0).masked_fill(slot[:stop] > own, -math.inf)
        scores = scores.repeat_interleave(shared, 1)
        if layer.slopes is not None:
            distance = places[:, None, few, None] - position[:, :, None, :stop]
            by_head = distance if distance.shape[1] == 1 else distance.repeat_interleave(shared, 1)
            scores = scores - by_head * layer.slopes.to(q.device, q.dtype)[:, None, None]
        outputs.append(attend(q[:, few], keys[:, :stop], values[:, :stop], layer.scale, scores, cap=layer.cap))
    return torch.cat(outputs, 1)


def slots_after(
    layer: KVLayer, k: Tensor, v: Tensor, state: MergedState, places: Tensor, logit: Tensor, weight: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The last slot as it is before and after each new token, [B, Hkv, T + 1, ...], and which of them are new ones.

    places: [B, T + 1], in their rows, of the token before and the new ones. logit, weight: [B, Hkv, T], what the gate
        says of each new token.
    """
    count, last = k.shape[1], state.last
    keys = torch.cat((last["keys"][:, :, None], k.transpose(1, 2)), 2)
    values = torch.cat((last["values"][:, :, None], v.transpose(1, 2)), 2)
    weight = torch.cat((last["weight"][..., None], weight), 2)
    logit = torch.cat((last["logit"][..., None], logit.to(torch.float32)), 2)
    step = torch.arange(count + 1, device=k.device)
    at = places[:, None].expand_as(logit)
    opens = (logit > 0).logical_not() | (at <= 0)
    opens = torch.cat((torch.ones_like(opens[..., :1]), opens[..., 1:]), 2)
    begin = torch.where(opens, step, 0).cummax(2).values  # where the slot that each token is in begins
    # Sums over a slot are differences of sums over all, in float64 so that nothing is lost.
    unrotated = turned(layer, keys, -step)
    sums = torch.cat((unrotated * weight[..., None], values * weight[..., None], weight[..., None]), 3).double()
    sums = torch.nn.functional.pad(sums.cumsum(2), (0, 0, 1, 0))
    before = sums.gather(2, begin[..., None].expand(*begin.shape, sums.shape[3]))
    total = sums[:, :, 1:] - before
    mean_keys, mean_values, total = total.split((k.shape[3], v.shape[3], 1), 3)
    alone = (begin == step)[..., None]
    mean_keys = turned(layer, (mean_keys / total).to(k.dtype), step)
    slots = {
        "keys": torch.where(alone, keys, mean_keys),
        "values": torch.where(alone, values, (mean_values / total).to(v.dtype)),
        "position": at.clamp_min(-1).to(torch.int32),
        "weight": torch.where(alone, weight[..., None], total.to(weight.dtype)).squeeze(3),
        "logit": logit.gather(2, begin),
    }
    return slots, opens


def answer_piece(
    layer: KVLayer, q: Tensor, pool: Slots, slots: dict[str, Tensor], closed: Tensor, places: Tensor
) -> Tensor:
    """The answer [B, T, H, V] to a piece: each token sees the slots closed before it, and its own as it then is."""
    keys, values, position = slots["keys"], slots["values"], slots["position"]
    seen = torch.nn.functional.pad(closed, (0, 1))  # the last slot is seen by its own query alone
    if pool.used:
        earlier = by_head(pool, layer.kv_heads)
        keys, values = torch.cat((earlier["keys"], keys), 2), torch.cat((earlier["values"], values), 2)
        seen = torch.cat((earlier["position"] >= 0, seen), 2)
        position = torch.cat((earlier["position"], position), 2)
    bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -math.inf)
    return attend_biased(layer, q, keys, values, bias, places[:, 1:], position)


def reduced(layer: KVLayer, state: MergedState, limit: int, target: int) -> MergedState:
    """With the merges made that the gates came closest to, so that no row has more slots in its pool than `limit`.

    target: slots in the pool of a row that had more.
    """
    kv_heads = layer.kv_heads
    slots = {name: state.pool[name][:, 0] for name in state.pool.values}
    owner = torch.arange(kv_heads, device=state.start.device, dtype=torch.int16).expand(len(state.start), -1)
    slots = {name: torch.cat((x, {**state.last, "owner": owner}[name]), 1) for name, x in slots.items()}
    # By head and place, empty slots first.
    key = slots["owner"].long() * OPEN + slots["position"]
    order = key.masked_fill(slots["position"] < 0, -1).argsort(dim=1, stable=True)
    slots = {name: picked(x, order) for name, x in slots.items()}
    real = slots["position"] >= 0
    heads, have = (state.last["position"] >= 0).sum(1), real.sum(1)
    excess = torch.where(have - heads > limit, have - heads - target, 0)
    joins = torch.zeros_like(real)  # may it join the slot before?
    joins[:, 1:] = real[:, :-1] & real[:, 1:] & (slots["owner"][:, 1:] == slots["owner"][:, :-1])
    likely = slots["logit"].masked_fill(~joins, -math.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(likely).scatter_(
        1, likely, torch.arange(likely.shape[1], device=likely.device).expand_as(likely)
    )
    joins = joins & (rank < excess[:, None])
    group = (~joins).cumsum(1) - 1
    size = int(group[:, -1].max()) + 1
    group = group + (size - 1 - group[:, -1:])  # groups at the right, so that empty ones stay in front
    slot = torch.arange(group.shape[1], device=group.device).expand_as(group)
    ends = torch.zeros(len(group), size, dtype=torch.int64, device=group.device)
    ends.scatter_reduce_(1, group, slot, "amax")  # the last of each group
    first = torch.full_like(ends, group.shape[1]).scatter_reduce_(1, group, slot, "amin")
    none = first == group.shape[1]  # in front, in rows of fewer groups
    first = first.masked_fill(none, 0)
    place = slots["position"].long()
    steps = picked(picked(place, ends), group) - place
    weight = slots["weight"]
    total = none.to(weight.dtype).scatter_add_(1, group, weight)
    alone = (ends == first)[..., None]
    merged = {name: picked(slots[name], ends) for name in ("keys", "values", "position", "owner")}
    for name in ("keys", "values"):
        x = slots[name]
        if name == "keys" and layer.turn is not None:
            x = layer.turn(x[:, :, None], steps[..., None])[:, :, 0]
        given = x * weight[..., None]
        summed = torch.zeros(*ends.shape, x.shape[2], dtype=given.dtype, device=x.device)
        summed = summed.scatter_add(1, group[..., None].expand_as(given), given) / total[..., None]
        merged[name] = torch.where(alone, merged[name], summed.to(x.dtype))
    merged["weight"], merged["logit"] = total, picked(slots["logit"], first)
    merged["position"] = merged["position"].masked_fill(none, -1)
    # The last slot of each head goes back to where the next token may join it.
    stays = merged["position"] >= 0
    final = stays.clone()
    final[:, :-1] &= merged["owner"][:, 1:] != merged["owner"][:, :-1]
    last = {}
    goal = torch.where(final, merged["owner"].long(), kv_heads)
    for name, old in state.last.items():
        x = merged[name]
        room = torch.cat((old, old[:, :1]), 1)  # and one more, for what is no last slot
        last[name] = room.scatter(1, goal.reshape(*goal.shape, *(1 for _ in x.shape[2:])).expand_as(x), x)[
            :, :-1
        ].clone(memory_format=torch.contiguous_format)
    index, empty = rightmost(stays & ~final)
    pool = {name: picked(merged[name], index)[:, None] for name in state.pool.values}
    pool["position"] = pool["position"].masked_fill(empty[:, None], -1)
    pool_slots = Slots.of(pool, room_for(index.shape[1], limit), state.length)
    return dataclasses.replace(state, pool=pool_slots, last=last)
