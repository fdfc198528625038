"""Softmax attention and its kin by their definitions: which keys a query sees, and what each weighs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from contextlab.ops.position import rope_frequencies
from tests.mixers.recurrence import agrees, convolved, every_case, linear, recurrence, rms, turned


def heads_of(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, D], and k and v [T, H, D], each key head repeated for the query heads that share it."""
    heads, kv_heads, size = mixer.heads, mixer.kv_heads, mixer.head_dim
    qkv = convolved(mixer.conv, linear(mixer.qkv_proj, x), activation=False).view(len(x), -1, size)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    if mixer.given.get("qk_norm"):
        eps = torch.finfo(x.dtype).eps
        q, k = rms(q, eps) * mixer.q_norm.weight, rms(k, eps) * mixer.k_norm.weight
    return q, k.repeat_interleave(heads // kv_heads, 1), v.repeat_interleave(heads // kv_heads, 1)


def slopes(heads: int) -> list[float]:
    """2108.12409: 2^(-8 h / H); where H is no power of two those of the next lower one, then of twice as many."""
    if heads & (heads - 1) == 0:
        return [2 ** (-8 * (h + 1) / heads) for h in range(heads)]
    lower = 2 ** (heads.bit_length() - 1)
    return slopes(lower) + slopes(2 * lower)[0::2][: heads - lower]


def score(mixer: Any, q: Tensor, k: Tensor, h: int, distance: int) -> Tensor:
    """q . k / sqrt(D) with the position that the mixer was built with; q, k: [D]."""
    size, given = mixer.head_dim, mixer.given
    position, base = given.get("position", "rope"), given.get("rope_base", 10000.0)
    rotary = int(size * given.get("rope_fraction", 1.0) + 1e-4)
    if position == "alibi":
        return q @ k / size**0.5 - slopes(mixer.heads)[h] * distance
    if position == "none":
        return q @ k / size**0.5
    if given.get("rope_scaling"):  # the frequencies themselves are held to those of transformers in tests/ops
        frequencies, factor = rope_frequencies(rotary, base, mixer.rope_scaling)
        for j, frequency in enumerate(frequencies.tolist()):
            pair = slice(2 * j, 2 * j + 2)
            q = torch.cat((q[: 2 * j], factor**2 * turned(q[pair], distance * frequency), q[2 * j + 2 :]))
        return q @ k / size**0.5
    q = turned(q, distance, base, rotary)
    if position == "xpos":  # 2212.10554, eqs. 12 and 13, gamma = 0.4
        fade = (torch.arange(rotary // 2) / (rotary // 2) + 0.4) / 1.4
        fade = (fade.double() ** (distance / given.get("xpos_scale", 512.0))).repeat_interleave(2)
        q = torch.cat((q[:rotary] * fade, q[rotary:]))
    return q @ k / size**0.5


def score_of_places(mixer: Any, q: Tensor, k: Tensor, i: int, j: int) -> Tensor:
    """`score` of a query at place i and a key at place j whose first places have plain angles (2402.13753, eq. 3)."""
    rotary = int(mixer.head_dim * mixer.given.get("rope_fraction", 1.0) + 1e-4)
    for_place = []
    for x, place in ((q, i), (k, j)):
        scaling = None if place < mixer.rope_scaling.plain_tokens else mixer.rope_scaling
        frequencies, factor = rope_frequencies(rotary, mixer.given.get("rope_base", 10000.0), scaling)
        pairs = [
            factor * turned(x[2 * n : 2 * n + 2], place * each) for n, each in enumerate(frequencies.tolist())
        ]  # fmt: skip
        for_place.append(torch.cat((*pairs, x[rotary:])))
    return for_place[0] @ for_place[1] / mixer.head_dim**0.5


def attention(mixer: Any, x: Tensor, seen: Callable[[int, int], list[int]], scored: Any = None) -> Tensor:
    """Softmax over the keys seen(query, head), scored by scored(query, key, head, q, k) or by `score`."""
    q, k, v = heads_of(mixer, x)
    if scored is None and getattr(mixer, "plain_tokens", 0):
        return attention(mixer, x, seen, lambda i, j, _, q, k: score_of_places(mixer, q, k, i, j))
    y = torch.zeros_like(q)
    for i in range(len(x)):
        for h in range(mixer.heads):
            keys = seen(i, h)
            scores = [
                score(mixer, q[i, h], k[j, h], h, i - j) if scored is None else scored(i, j, h, q[i, h], k[j, h])
                for j in keys
            ]
            y[i, h] = torch.stack(scores).softmax(0) @ v[keys, h]
    return out(mixer, x, y)


def out(mixer: Any, x: Tensor, y: Tensor) -> Tensor:
    """From the heads' answers y [T, H, D] to the mixer's."""
    y = y.flatten(1)
    return linear(mixer.out_proj, y * linear(mixer.gate_proj, x).sigmoid() if mixer.gate_proj is not None else y)


@recurrence("attention")
def causal(mixer: Any, x: Tensor) -> Tensor:
    """1706.03762, eq. 1, of the tokens so far."""
    return attention(mixer, x, lambda i, h: list(range(i + 1)))


@recurrence("sliding_window")
def sliding_window(mixer: Any, x: Tensor) -> Tensor:
    """The last `window` tokens at steps of `dilation`, and the first `sinks`, no farther away than max_distance."""
    window, given = mixer.given["window"], mixer.given
    sinks, dilation, limit = given.get("sinks", 0), given.get("dilation", 1), given.get("max_distance")

    def seen(i: int, h: int) -> list[int]:
        return [j for j in range(i + 1) if j < sinks or ((i - j) % dilation == 0 and (i - j) // dilation < window)]

    def scored(i: int, j: int, h: int, q: Tensor, k: Tensor) -> Tensor:
        return score(mixer, q, k, h, i - j if limit is None else min(i - j, limit))

    return attention(mixer, x, seen, scored)


@recurrence("multi_scale_window")
def multi_scale_window(mixer: Any, x: Tensor) -> Tensor:
    """2501.01039: each quarter of the heads sees w/4, w/2, w or 2w tokens."""
    window, quarter = mixer.given["window"], mixer.heads // 4

    def seen(i: int, h: int) -> list[int]:
        return list(range(max(0, i + 1 - window * 2 ** (h // quarter) // 4), i + 1))

    return attention(mixer, x, seen)


@recurrence("sigmoid_window")
def sigmoid_window(mixer: Any, x: Tensor) -> Tensor:
    """2502.18845, eqs. 4 and 5: sigmoid weights; half of the slopes fall with the distance, half rise."""
    q, k, v = heads_of(mixer, x)
    y, half = torch.zeros_like(q), mixer.heads // 2
    for i in range(len(x)):
        for h in range(mixer.heads):
            slope = (-1 if h < half else 1) * 2.0 ** -(h % half + 1)
            for j in range(max(0, i - mixer.given["window"] + 1), i + 1):
                y[i, h] += (score(mixer, q[i, h], k[j, h], h, i - j) + slope * (i - j)).sigmoid() * v[j, h]
    return out(mixer, x, y)


@recurrence("block_local")
def block_local(mixer: Any, x: Tensor) -> Tensor:
    """The query's own block and the one before."""
    block = mixer.given["block"]
    return attention(mixer, x, lambda i, h: [j for j in range(i + 1) if i // block - j // block <= 1])


@recurrence("forgetting_attention")
def forgetting_attention(mixer: Any, x: Tensor) -> Tensor:
    """2503.02130, eq. 7: the score gains the sum of log f between key and query, the query's own counted."""
    mixer.given = {**mixer.given, "position": "none"}
    log_f = linear(mixer.forget_proj, x).sigmoid().log()

    def scored(i: int, j: int, h: int, q: Tensor, k: Tensor) -> Tensor:
        return score(mixer, q, k, h, i - j) + log_f[j + 1 : i + 1, h].sum()

    return attention(mixer, x, lambda i, h: list(range(i + 1)), scored)


@recurrence("cope_attention")
def cope_attention(mixer: Any, x: Tensor) -> Tensor:
    """2405.18719, eqs. 3 to 5: a key's position is the sum of the gates from it to the query."""
    q, k, v = heads_of(mixer, x)
    y, embedding, size = torch.zeros_like(q), mixer.position_embedding, mixer.head_dim
    last = len(embedding) - 1
    for i in range(len(x)):
        for h in range(mixer.heads):
            plain = k[: i + 1, h] @ q[i, h] / size**0.5
            scores = []
            for j in range(i + 1):
                place = min(float(plain[j:].sigmoid().sum()), last)
                low, part = int(place), place - int(place)
                between = (1 - part) * embedding[low] + part * embedding[min(low + 1, last)]
                scores.append(plain[j] + q[i, h] @ between)
            y[i, h] = torch.stack(scores).softmax(0) @ v[: i + 1, h]
    return out(mixer, x, y)


@every_case("softmax")
def test_agrees_with_the_definition(name: str, options: Mapping[str, Any]) -> None:
    agrees(name, options)
