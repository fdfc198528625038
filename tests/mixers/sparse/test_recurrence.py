"""Sparse attention by its definitions: which keys each query chooses, and what they weigh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.mixers.recurrence import agrees, every_case, linear, recurrence, turned, unit
from tests.mixers.softmax.test_recurrence import attention, heads_of, out, score


def best(scores: list[Tensor], count: int) -> list[int]:
    """The places of the `count` largest."""
    return sorted(range(len(scores)), key=lambda n: -float(scores[n]))[:count]


def placed(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of each head, q and k turned to their own places, for means of keys are of keys as they are held."""
    q, k, v = heads_of(mixer, x)
    if mixer.given.get("position", "rope") == "rope":
        q, k = (torch.stack([turned(y[t], t) for t in range(len(x))]) for y in (q, k))
    return q, k, v


@recurrence("topk_attention")
def topk_attention(mixer: Any, x: Tensor) -> Tensor:
    """2106.06899: softmax over the best keys alone."""
    q, k, _ = heads_of(mixer, x)

    def seen(i: int, h: int) -> list[int]:
        return best([score(mixer, q[i, h], k[j, h], h, i - j) for j in range(i + 1)], mixer.given["top_k"])

    return attention(mixer, x, seen)


@recurrence("routing")
def routing(mixer: Any, x: Tensor) -> Tensor:
    """2003.05997: the keys before that have the query's nearest centroid, and the query's own; unit q and k."""
    q, k, v = heads_of(mixer, x)
    q, k = unit(q), unit(k)
    y = torch.zeros_like(q)
    for i in range(len(x)):
        for h in range(mixer.heads):
            mine = (mixer.centroids[h] @ q[i, h]).argmax()
            keys = [j for j in range(i + 1) if j == i or (mixer.centroids[h] @ k[j, h]).argmax() == mine]
            y[i, h] = (k[keys, h] @ q[i, h] * mixer.head_dim**0.5).softmax(0) @ v[keys, h]
    return out(mixer, x, y)


@recurrence("moba")
def moba(mixer: Any, x: Tensor) -> Tensor:
    """2502.13189, eqs. 2 to 6: the own block, and those before it whose mean key fits the query best, top_k in all."""
    q, k, v = placed(mixer, x)
    block, count = mixer.given["block"], mixer.given["top_k"]
    y = torch.zeros_like(q)
    for i in range(len(x)):
        own = i // block
        for h in range(mixer.heads):
            fits = [q[i, h] @ k[n * block : (n + 1) * block, h].mean(0) for n in range(own)]
            blocks = [own, *best(fits, count - 1)]
            keys = [j for j in range(i + 1) if j // block in blocks]
            y[i, h] = (k[keys, h] @ q[i, h] / mixer.head_dim**0.5).softmax(0) @ v[keys, h]
    return out(mixer, x, y)


@recurrence("nsa")
def nsa(mixer: Any, x: Tensor) -> Tensor:
    """2502.11089, eqs. 5 to 12: three branches of their own keys and values, added by gates of the token."""
    given, dim, heads, groups = mixer.given, mixer.head_dim, mixer.heads, mixer.kv_heads
    block, count, window = (given[name] for name in ("block", "top_k", "window"))
    size = given.get("compress_block", block // 2)
    stride = given.get("compress_stride", size // 2)
    first, local = given.get("initial_blocks", 1), given.get("local_blocks", 2)

    def place(y: Tensor, at: int) -> Tensor:
        return turned(y, at) if given.get("position", "rope") == "rope" else y

    qkv = linear(mixer.qkv_proj, x).view(len(x), -1, dim)
    q, k, near_k, v, near_v, raw_k, raw_v = qkv.split((heads, *(groups,) * 6), 1)
    q, k, near_k = (torch.stack([place(y[t], t) for t in range(len(x))]) for y in (q, k, near_k))
    hidden = linear(mixer.branch_in, x).relu() if mixer.branch_in is not None else x
    gates = linear(mixer.branch_proj, hidden).sigmoid().view(len(x), heads, 3)

    def network(what: str, tokens: Tensor, g: int) -> Tensor:
        with_places = (tokens[:, g] + getattr(mixer, f"{what}_place")[g]).flatten()
        return linear(getattr(mixer, f"{what}_out"), linear(getattr(mixer, f"{what}_in"), with_places).relu())

    y = torch.zeros_like(q)
    for i in range(len(x)):
        starts = [n * stride for n in range(len(x)) if n * stride + size <= i + 1]
        for g in range(groups):
            mine = range(g * heads // groups, (g + 1) * heads // groups)
            worth = dict.fromkeys(range(i // block + 1), 0.0)
            for h in mine:
                if starts:
                    keys = torch.stack([place(network("key", raw_k[s : s + size], g), s) for s in starts])
                    values = torch.stack([network("value", raw_v[s : s + size], g) for s in starts])
                    p = (keys @ q[i, h] / dim**0.5).softmax(0)
                    y[i, h] += gates[i, h, 0] * (p @ values)
                    for s, weight in zip(starts, p, strict=True):
                        for strip in range(s, s + size, stride):  # each part of it goes to the block it lies in
                            worth[strip // block] += weight
            forced = {n for n in worth if n < first or i // block - local < n}
            others = sorted(set(worth) - forced, key=lambda n: -float(worth[n]))
            blocks = forced | set(others[: count - len(forced)])
            chosen = [j for j in range(i + 1) if j // block in blocks]
            near = list(range(max(0, i - window + 1), i + 1))
            for h in mine:
                for n, keys, own_k, own_v in ((1, chosen, k, v), (2, near, near_k, near_v)):
                    share = (own_k[keys, g] @ q[i, h] / dim**0.5).softmax(0)
                    y[i, h] += gates[i, h, n] * (share @ own_v[keys, g])
    return linear(mixer.out_proj, y.flatten(1))


@recurrence("landmark")
def landmark(mixer: Any, x: Tensor) -> Tensor:
    """2305.16300, eqs. 1 to 3: the own block's tokens and past landmarks share a softmax, past tokens their block's."""
    q, k, v = placed(mixer, x)
    block, y, shared = mixer.given["block"], torch.zeros_like(q), mixer.heads // mixer.kv_heads
    for i in range(len(x)):
        own = i // block
        for h in range(mixer.heads):
            scores = k[: i + 1, h] @ q[i, h] / mixer.head_dim**0.5
            marks = [
                q[i, h] @ k[n * block : (n + 1) * block, h].mean(0) * mixer.landmark[h // shared, 0]
                / mixer.head_dim**0.5
                for n in range(own)
            ]  # fmt: skip
            read = sorted(best(marks, mixer.given.get("top_k") or own))
            near = list(range(own * block, i + 1))
            share = torch.cat((scores[near], torch.stack(marks)[read] if read else scores[:0])).softmax(0)
            y[i, h] = share[: len(near)] @ v[near, h]
            for n, part in zip(read, share[len(near) :], strict=True):
                keys = list(range(n * block, (n + 1) * block))
                y[i, h] += part * (scores[keys].softmax(0) @ v[keys, h])
    return out(mixer, x, y)


@every_case("sparse")
def test_agrees_with_the_definition(name: str, options: Mapping[str, Any]) -> None:
    agrees(name, options)
