"""Each training-free score against its formula, written naively: whole attention matrices and loops over tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer, attention_rows
from contextlab.policies import EvictionPolicy, build_policy
from contextlab.testing.policies import model, tokens

HEADS, KV_HEADS, DIM, LENGTH = 4, 2, 8, 40


def spin(x: Tensor, steps: Tensor) -> Tensor:
    """Rotary positions by complex numbers: x [B, T, H, D] turned by steps [B or 1, T, H or 1]."""
    half = x.shape[-1] // 2
    angles = steps[..., None].double() * 100.0 ** (-torch.arange(half).double() / half)
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((pairs.real, pairs.imag), -1).to(x.dtype)


def layer(**options: Any) -> KVLayer:
    return KVLayer(**{
        "index": 0, "count": 1, "heads": HEADS, "kv_heads": KV_HEADS, "key_dim": DIM, "value_dim": DIM,
        "scale": DIM**-0.5, "turn": spin, **options,
    })  # fmt: skip


def draw(length: int = LENGTH, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys before rotation, and values: [B, T, H or Hkv, D], float64."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, length, n, DIM, generator=generator, dtype=torch.float64)
        for n in (HEADS, KV_HEADS, KV_HEADS)
    )
    return 2 * q + torch.randn(DIM, generator=generator, dtype=torch.float64), k, v


def rotated(x: Tensor, first: int = 0) -> Tensor:
    return spin(x, torch.arange(first, first + x.shape[1])[None, :, None])


def matrix(q: Tensor, k: Tensor) -> Tensor:
    """The attention weights [B, H, T, T] of rotated queries and keys."""
    k = k.repeat_interleave(HEADS // KV_HEADS, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * DIM**-0.5
    return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf).softmax(-1)


def shared(x: Tensor) -> Tensor:
    """[B, H, N] summed over the query heads of each key head."""
    return torch.stack([x[:, head * 2] + x[:, head * 2 + 1] for head in range(KV_HEADS)], 1)


def tova(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    return torch.stack([weights[:, :, -1].mean(1)] * KV_HEADS, 1)


def a2sf(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    return shared(sum(0.8 ** (LENGTH - 1 - t) * weights[:, :, t] for t in range(LENGTH)))  # type: ignore[arg-type]


def recency(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    last = torch.arange(1.0, LENGTH + 1, dtype=torch.float64).repeat(len(q), KV_HEADS, 1)  # being read counts
    for row, head, query, token in (weights >= 0.1).nonzero().tolist():
        last[row, head // 2, token] = max(query + 1.0, float(last[row, head // 2, token]))
    return last


def frequency(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    return shared((weights >= 0.1).double().sum(2))


def alisa(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    return shared(weights[:, :, -3:].sum(2))


def vatp(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    return shared(weights.sum(2)) * v.norm(p=1, dim=-1).transpose(1, 2)


def pyramid_infer(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    rows = weights.mean(1)[:, -5:]
    total = sum((1 + 0.5 * i / 4) * rows[:, i] for i in range(5))
    return torch.stack([total] * KV_HEADS, 1)  # type: ignore[list-item]


def snapkv(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    votes = shared(weights[:, :, -5:].mean(2))
    before = LENGTH - 5
    padded = torch.zeros(*votes.shape[:2], before + 2, dtype=votes.dtype)
    padded[..., 1:-1] = votes[..., :before]
    pooled = sum(padded[..., i : i + before] for i in range(3)) / 3
    return torch.cat((pooled, torch.full((*votes.shape[:2], 5), math.nan)), -1)


def key_norm(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    return -(k**2).sum(-1).sqrt().transpose(1, 2)


def keydiff(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    unit = k / (k**2).sum(-1, keepdim=True).sqrt()
    mean = unit.mean(1)
    return -(torch.einsum("bthd,bhd->bht", unit, mean) / (mean**2).sum(-1).sqrt()[..., None])


def expected(covariance: bool) -> Callable[..., Tensor]:
    def score(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        q = spin(q, -torch.arange(LENGTH)[None, :, None])[:, 4:]
        mean = q.mean(1)
        cov = torch.stack([
            torch.stack([torch.cov(q[b, :, h].T, correction=0) for h in range(HEADS)]) for b in range(len(q))
        ])  # fmt: skip
        basis = torch.eye(DIM, dtype=q.dtype)[None, :, None]
        ahead = torch.stack([spin(basis, torch.full((1, DIM, 1), LENGTH + t))[0, :, 0] for t in range(11)]).mean(0).T
        keys = k.repeat_interleave(2, 2)[:, 4:]
        logits = torch.einsum("bhd,bthd->bht", mean @ ahead.T, keys) * DIM**-0.5
        if covariance:
            logits = logits + torch.einsum("bthi,bhij,bthj->bht", keys, ahead @ cov @ ahead.T, keys) / DIM / 2
        share = shared(logits.softmax(-1)) / 2
        found = (share + 0.25) * v[:, 4:].norm(dim=-1).transpose(1, 2)
        return torch.cat((torch.full((*found.shape[:2], 4), math.nan), found), -1)  # the sinks are always kept

    return score


FORMULAS: list[tuple[str, dict[str, Any], Callable[..., Tensor]]] = [
    ("tova", {}, tova),
    ("a2sf", {"forget": 0.8}, a2sf),
    ("attendre", {"share": 0.1}, recency),
    ("attendre", {"share": 0.1, "order": "frequency"}, frequency),
    ("alisa", {"window": 7, "queries": 3}, alisa),
    ("vatp", {}, vatp),
    ("pyramid_infer", {"window": 5, "recency": 1.5}, pyramid_infer),
    ("snapkv", {"window": 5, "kernel": 3}, snapkv),
    ("key_norm", {}, key_norm),
    ("keydiff", {}, keydiff),
    ("expected_attention", {"future": 11, "epsilon": 0.25}, expected(True)),
    ("expected_attention", {"future": 11, "epsilon": 0.25, "covariance": False}, expected(False)),
]


def read(policy: EvictionPolicy, at: KVLayer, q: Tensor, k: Tensor, v: Tensor, pieces: list[int], **more: Any) -> Any:
    """The state after the pieces, and then token by token."""
    state, first = None, 0
    for size in [*pieces, *[1] * (q.shape[1] - sum(pieces))]:
        part = slice(first, first + size)
        mask = more["mask"][:, part] if "mask" in more else None
        _, state = policy.attend(at, q[:, part], k[:, part], v[:, part], state, mask)
        first += size
    return state


def scored(policy: EvictionPolicy, at: KVLayer, state: Any) -> Tensor:
    return policy.score(policy.seen(at, state))


@pytest.mark.parametrize(("name", "options", "formula"), FORMULAS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("pieces", [[LENGTH], [17, 20]], ids=["whole", "pieces"])
@torch.no_grad()
def test_a_score_is_its_formula(name: str, options: Any, formula: Callable[..., Tensor], pieces: list[int]) -> None:
    q, k, v = draw()
    q, k = rotated(q), rotated(k)
    policy: Any = build_policy(name, **options)
    got = scored(policy, layer(), read(policy, layer(), q, k, v, pieces)).double()
    expected = formula(q, k, v, matrix(q, k))
    told = ~expected.isnan()
    assert told.sum() > 0.8 * told.numel()
    if name == "key_norm":
        # Norms count in 16 bits; their order is what is asked for.
        got, expected = got.argsort(-1), expected.argsort(-1)
        told = torch.ones_like(told)
        assert (got == expected).double().mean() > 0.95
        return
    torch.testing.assert_close(got[told], expected[told], rtol=2e-5, atol=1e-6)


def test_rotation_does_not_choose_between_equal_keys() -> None:
    key = torch.randn(1, 1, KV_HEADS, DIM, generator=torch.Generator().manual_seed(0))
    policy: Any = build_policy("key_norm")
    keys = rotated(key.double().expand(1, 500, -1, -1)).float()
    state = read(policy, layer(), torch.zeros(1, 500, HEADS, DIM), keys, torch.zeros_like(keys), [500])
    assert len(keys.norm(dim=-1).unique()) > KV_HEADS
    assert all(len(head.unique()) == 1 for head in scored(policy, layer(), state)[0])


@pytest.mark.parametrize("name", ["tova", "a2sf"])
@torch.no_grad()
def test_decoding_is_the_papers_loop(name: str) -> None:
    """A list of tokens for each head: the least important one is dropped, the next one read."""
    q, k, v = draw(30, batch=1)
    q, k = rotated(q), rotated(k)
    budget, fade = 12, 0.7
    policy: Any = build_policy(
        name, budget=f"{budget}tok", every=1, window=1, **({"forget": fade} if name == "a2sf" else {})
    )
    state = read(policy, layer(), q, k, v, [5])
    held: list[list[int]] = [[] for _ in range(KV_HEADS)]
    mass = torch.zeros(KV_HEADS, 30, dtype=torch.float64)
    last = torch.zeros(HEADS, 30, dtype=torch.float64)
    for t in range(30):
        for head in range(KV_HEADS):
            if len(held[head]) == budget:
                value = last.mean(0) if name == "tova" else mass[head]
                held[head].remove(min(held[head][:-1], key=lambda i: float(value[i])))
            held[head].append(t)
        mass *= fade
        last.zero_()
        for h in range(HEADS):
            seen = held[h // 2]
            p = (k[0, seen, h // 2] @ q[0, t, h] * DIM**-0.5).softmax(0)
            last[h, seen] = p
            mass[h // 2, seen] += p
    assert state.positions[0].tolist() == held


@pytest.mark.parametrize("pads", [None, (0, 9)], ids=["", "padded"])
@torch.no_grad()
def test_query_statistics_do_not_depend_on_pieces_or_padding(pads: tuple[int, ...] | None) -> None:
    q, k, v = draw(60)
    mask = None if pads is None else torch.arange(60) >= torch.tensor(pads)[:, None]
    more = {} if mask is None else {"mask": mask}
    policy: Any = build_policy("expected_attention", sinks=3)
    state = read(policy, layer(), rotated(q), rotated(k), v, [7, 1, 30, 2], **more)
    for row, pad in enumerate(pads or (0, 0)):
        real = q[row, pad + 3 :]
        count, mean = state.notes["count"][row], state.notes["mean"][row].double()
        assert count == len(real)
        turned = spin(mean[None, None], torch.zeros(1, 1, 1))[0, 0]
        torch.testing.assert_close(turned, real.mean(0), rtol=0, atol=1e-5)
        for h in range(HEADS):
            spread = state.notes["spread"][row, h].double() / count
            torch.testing.assert_close(spread, torch.cov(real[:, h].T, correction=0), rtol=0, atol=1e-4)


def test_expected_attention_is_what_normal_queries_pay() -> None:
    """The closed form of the mean of exp(score) over normal queries, against 400,000 draws of them."""
    generator = torch.Generator().manual_seed(1)
    count = 400_000
    spread = torch.randn(DIM, DIM, generator=generator) / 2
    q = torch.randn(1, count, 1, DIM, generator=generator) @ spread + 0.5
    k = torch.randn(1, 12, 1, DIM, generator=generator)
    at = layer(heads=1, kv_heads=1, turn=None)
    policy: Any = build_policy("expected_attention", sinks=0)
    notes = policy.remember(at, {}, q, torch.arange(count)[None], 0)
    state = read(policy, at, torch.zeros(1, 12, 1, DIM), k, torch.ones_like(k), [12])
    got = scored(policy, at, dataclasses.replace(state, notes=notes))[0, 0] / DIM**0.5
    paid = (q[0, :, 0] @ k[0, :, 0].T * DIM**-0.5).exp().mean(0)
    torch.testing.assert_close(got, paid / paid.sum(), rtol=0.02, atol=0)


def test_hash_codes_agree_as_angles_do() -> None:
    """Two signs agree with probability 1 - angle / pi, so that many of them order keys by angle."""
    q, k, v = (x.float() for x in draw(LENGTH, batch=1))
    policy: Any = build_policy("hash_evict", bits=20_000)
    at = layer(turn=None)
    state = dataclasses.replace(read(policy, at, q, k, v, [LENGTH]), queries=q[:, -1:])
    cosine = torch.cosine_similarity(q[0, -1, :, None], k[0].transpose(0, 1).repeat_interleave(2, 0), dim=-1)
    expected = shared((1 - 2 * cosine.acos() / math.pi)[None])
    torch.testing.assert_close(scored(policy, at, state) / 20_000, expected, rtol=0, atol=0.05)


@torch.no_grad()
def test_hash_evict_asks_the_query_that_comes() -> None:
    """The token that the new query points at stays, whatever the last query was."""
    q, k, v = draw(25, batch=1)
    at = layer(turn=None)
    for wanted in (5, 11):
        q[:, -1] = k[:, wanted].repeat_interleave(2, 1)
        policy: Any = build_policy("hash_evict", budget="24tok", sinks=0, window=1, bits=64, every=22)
        state = read(policy, at, q, k, v, [24])
        assert state.queries is None
        assert state.positions[0].tolist() == [[wanted, 23, 24]] * KV_HEADS


@torch.no_grad()
def test_heads_keep_what_their_profile_says() -> None:
    """Key head 0 looks at what came last, head 1 at the third token: the first is local, the other keeps by mass."""
    length, budget = 40, 16
    k = torch.zeros(1, length, KV_HEADS, DIM, dtype=torch.float64)
    k[:, :, 0, 0] = torch.arange(length) / 2
    k[:, 3, 1, 0] = 20.0
    q = torch.zeros(1, length, HEADS, DIM, dtype=torch.float64)
    q[..., 0] = 4.0
    v = torch.randn(1, length, KV_HEADS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    policy: Any = build_policy("fastgen", budget=f"{budget}tok", sinks=1, window=4)
    state = read(policy, layer(turn=None), q, k, v, [30])
    assert state.notes["profile"].tolist() == [[1, 0]]
    assert state.positions[0, 0].tolist()[0] == 0
    assert state.positions[0, 0].tolist()[-5:] == [35, 36, 37, 38, 39]
    kept = state.positions[0, 0].tolist()
    assert kept[1:] == list(range(kept[1], length))
    assert 3 in state.positions[0, 1].tolist()
    local: Any = build_policy("fastgen", budget=f"{budget}tok", sinks=1, window=4, recovery=0.0)
    assert read(local, layer(turn=None), q, k, v, [30]).notes["profile"].tolist() == [[1, 1]]


@torch.no_grad()
def test_random_tokens_are_uniform_and_the_same_in_any_pieces() -> None:
    q, k, v = draw(50, batch=1)
    counts = torch.zeros(50)
    for seed in range(150):
        policy: Any = build_policy("random", budget="17tok", sinks=4, window=6, every=1, seed=seed)
        whole = read(policy, layer(), q, k, v, [50]).positions
        assert torch.equal(whole, read(policy, layer(), q, k, v, [20, 13, 17]).positions)
        for head in range(KV_HEADS):
            counts[whole[0, head].long()] += 1
    assert (counts[:4] == 300).all()
    assert (counts[44:] == 300).all()
    drawn = counts[4:44] / 300  # each with probability 7 / 40 = 0.175, and standard deviation 0.022
    assert drawn.sum().item() == pytest.approx(7)
    assert (drawn - 0.175).abs().max() < 4.5 * 0.022
    assert not torch.equal(whole[0, 0], whole[0, 1])
    other = read(policy, layer(index=1, count=2), q, k, v, [50]).positions
    assert not torch.equal(whole, other)


@torch.no_grad()
def test_alibi_counts_in_what_queries_look_at() -> None:
    q, k, v = draw()
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.06], dtype=torch.float64)
    at = layer(turn=None, slopes=slopes)
    policy: Any = build_policy("alisa", window=6)
    mask = torch.arange(LENGTH) >= torch.tensor([0, 7])[:, None]
    got = scored(policy, at, read(policy, at, q, k, v, [30, 4], mask=mask))
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * DIM**-0.5
    place = torch.arange(LENGTH)
    scores = scores - slopes[:, None, None] * (place[:, None] - place)
    hidden = torch.ones(LENGTH, LENGTH).triu(1).bool() | ~mask[:, None, None, :]
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)[:, :, -6:]
    torch.testing.assert_close(got, shared(weights.sum(2)), rtol=1e-9, atol=1e-12)
    plain = attention_rows(q[:, -6:], k.transpose(1, 2), scale=DIM**-0.5)
    assert not torch.allclose(plain[:1], weights[:1], atol=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a2sf", {"forget": 0.0}, "forget: expected a factor in (0, 1]"),
        ("alisa", {"window": 8, "queries": 9}, "queries: expected 1 to 8 (window), got 9"),
        ("alisa", {"queries": 0}, "queries: expected 1 to 32"),
        ("pyramid_infer", {"recency": -1.0}, "recency: expected a weight above 0"),
        ("fastgen", {"recovery": 1.5}, "recovery: expected a part from 0 to 1"),
        ("expected_attention", {"future": 0}, "future: expected a whole number of at least 1"),
        ("expected_attention", {"epsilon": -0.1}, "epsilon: expected a number of at least 0"),
        ("hash_evict", {"bits": 0}, "bits: expected a whole number of at least 1"),
        ("hash_evict", {"reposition": True}, "reposition"),
        ("random", {"seed": -1}, "seed: expected a whole number of at least 0"),
        ("pyramid_kv", {"pyramid": 0.5}, "pyramid: expected at least 1"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        build_policy(name, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_expected_attention_refuses_alibi() -> None:
    at = layer(turn=None, slopes=torch.ones(HEADS))
    with pytest.raises(InputError, match="is not defined for ALiBi"):
        build_policy("expected_attention").check([at])


def test_a_profile_of_fastgen_once_set_stays() -> None:
    """Even one that the head's attention does not bear out: heads are judged once, when a row first drops something."""
    reader, x = model(depth=1), tokens(4, 140)
    policy: Any = build_policy("fastgen", budget="24tok", sinks=1, window=4, recovery=0.58)
    with policy.attach(reader), torch.no_grad():
        _, state = reader.read(x[:, :20])
        assert (state.layers[0].notes["profile"] == -1).all()  # nothing was dropped yet
        _, state = reader.read(x[:, 20:40], state)
        held = state.layers[0]
        judged = held.notes["profile"]
        assert set(judged.unique().tolist()) == {0, 1}
        state.layers[0] = dataclasses.replace(held, notes={"profile": 1 - judged})
        for t in range(40, 140):
            _, state = reader.read(x[:, t : t + 1], state)
            assert torch.equal(state.layers[0].notes["profile"], 1 - judged)
    after = state.layers[0].positions[..., 1:]
    last = after.shape[2] == after[..., -1:] - after[..., :1] + 1  # are these the last tokens, without a gap?
    assert torch.equal(last[..., 0], judged == 0)
