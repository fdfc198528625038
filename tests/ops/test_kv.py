"""Attention over held tokens and its mass, each beside its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from contextlab.ops import kv as module
from contextlab.ops.kv import attend_cached, attention_rows, attention_with_mass, naive_attention_with_mass


@pytest.mark.parametrize(
    ("batch", "length", "held", "heads", "kv_heads"), [(2, 7, 20, 4, 2), (1, 1, 9, 4, 4), (2, 64, 64, 2, 1)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_all_forms_are_the_definition(
    batch: int, length: int, held: int, heads: int, kv_heads: int, padded: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, length, heads, 8, dtype=torch.float64, generator=generator)
    k = torch.randn(batch, kv_heads, held, 8, dtype=torch.float64, generator=generator)
    v = torch.randn(batch, kv_heads, held, 5, dtype=torch.float64, generator=generator)
    weight = torch.rand(length, dtype=torch.float64, generator=generator)
    visible = torch.arange(held) >= torch.tensor([0, 3][:batch])[:, None] if padded else None
    expected, mass = naive_attention_with_mass(q, k, v, scale=0.3, weight=weight, visible=visible)
    y, got = attention_with_mass(q, k, v, scale=0.3, weight=weight, visible=visible)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(got, mass, rtol=0, atol=1e-12)
    torch.testing.assert_close(attend_cached(q, k, v, scale=0.3, visible=visible), expected, rtol=0, atol=1e-12)
    for told in ({"share": 0.1}, {"share": 0.1, "latest": True}, {"latest": True}):
        counted = [
            function(q, k, v, scale=0.3, weight=weight, visible=visible, **told)
            for function in (attention_with_mass, naive_attention_with_mass)
        ]
        torch.testing.assert_close(*counted, rtol=0, atol=1e-12)
    rows = attention_rows(q, k, scale=0.3, visible=visible)
    torch.testing.assert_close((rows * weight[:, None]).sum(2), mass, rtol=0, atol=1e-12)
    slopes = torch.zeros(heads, dtype=torch.float64)
    places = torch.arange(held)
    biased = attend_cached(
        q, k, v, scale=0.3, visible=visible, slopes=slopes, q_position=places[None, held - length :],
        k_position=places.expand(batch, kv_heads, -1),
    )  # fmt: skip
    torch.testing.assert_close(biased, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("padded", [False, True])
def test_a_learned_sink_takes_its_share_of_the_attention(length: int, padded: bool) -> None:
    """All forms beside its closed form: what is left when the sink's share of the softmax is taken away."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, length, 4, 8, dtype=torch.float64, generator=generator)
    k, v = (torch.randn(2, 2, 20, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    sink = torch.tensor([0.5, -2.0, 3.0, float("-inf")], dtype=torch.float64)
    weight = torch.rand(length, dtype=torch.float64, generator=generator)
    visible = torch.arange(20) >= torch.tensor([0, 3])[:, None] if padded else None
    plain = attention_rows(q, k, scale=0.3, visible=visible)
    scores = torch.einsum("bthd,bhnd->bhtn", q, k.repeat_interleave(2, 1)) * 0.3
    total = scores.masked_fill(plain == 0, float("-inf")).logsumexp(-1)
    rows = plain * (total - sink[:, None]).sigmoid()[..., None]
    y = torch.einsum("bhtn,bhnd->bthd", rows, v.repeat_interleave(2, 1))
    given = {"scale": 0.3, "visible": visible, "sink": sink}
    torch.testing.assert_close(attention_rows(q, k, **given), rows, rtol=0, atol=1e-12)
    torch.testing.assert_close(attend_cached(q, k, v, **given), y, rtol=0, atol=1e-12)
    for function in (attention_with_mass, naive_attention_with_mass):
        found, mass = function(q, k, v, weight=weight, **given)
        torch.testing.assert_close(found, y, rtol=0, atol=1e-12)
        torch.testing.assert_close(mass, (rows * weight[:, None]).sum(2), rtol=0, atol=1e-12)
    places = torch.arange(20)
    biased = attend_cached(
        q, k, v, **given, slopes=torch.zeros(4, dtype=torch.float64), q_position=places[None, 20 - length :],
        k_position=places.expand(2, 2, -1),
    )  # fmt: skip
    torch.testing.assert_close(biased, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("padded", [False, True])
def test_no_score_is_beyond_the_cap(monkeypatch: pytest.MonkeyPatch, length: int, padded: bool) -> None:
    """All forms beside one that is written out here: gemma2's scores, whose bias comes after the cap."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, length, 4, 8, dtype=torch.float64, generator=generator)
    k, v = (torch.randn(2, 2, 20, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    weight = torch.rand(length, dtype=torch.float64, generator=generator)
    visible = torch.arange(20) >= torch.tensor([0, 3])[:, None] if padded else None
    slopes, places = torch.tensor([0.0, 0.1, 0.5, 2.0], dtype=torch.float64), torch.arange(20)
    scores = 0.7 * (torch.einsum("bthd,bhnd->bhtn", q, k.repeat_interleave(2, 1)) * 0.3 / 0.7).tanh()
    unseen = places > torch.arange(20 - length, 20)[:, None]
    unseen = unseen if visible is None else unseen | ~visible[:, None, None]
    rows = scores.masked_fill(unseen, float("-inf")).softmax(-1)
    y = torch.einsum("bhtn,bhnd->bthd", rows, v.repeat_interleave(2, 1))
    given: dict[str, Any] = {"scale": 0.3, "visible": visible, "cap": 0.7}
    torch.testing.assert_close(attention_rows(q, k, **given), rows, rtol=0, atol=1e-12)
    torch.testing.assert_close(attend_cached(q, k, v, **given), y, rtol=0, atol=1e-12)
    for by_head in (2**18, 1):
        monkeypatch.setattr(module, "BY_HEAD", by_head)
        for function in (attention_with_mass, naive_attention_with_mass):
            with torch.no_grad():
                found, mass = function(q, k, v, weight=weight, **given)
            torch.testing.assert_close(found, y, rtol=0, atol=1e-12)
            torch.testing.assert_close(mass, (rows * weight[:, None]).sum(2), rtol=0, atol=1e-12)
    away = torch.arange(20 - length, 20)[:, None] - places
    tilted = (scores - slopes[:, None, None] * away).masked_fill(unseen, float("-inf")).softmax(-1)
    at = {"slopes": slopes, "q_position": places[None, 20 - length :], "k_position": places.expand(2, 2, -1)}
    y = torch.einsum("bhtn,bhnd->bthd", tilted, v.repeat_interleave(2, 1))
    torch.testing.assert_close(attend_cached(q, k, v, **given, **at), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(attention_rows(q, k, **given, **at), tilted, rtol=0, atol=1e-12)


def test_blocks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """More queries than one block holds: the least block is 16."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 50, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    weight = torch.rand(50, dtype=torch.float64, generator=generator)
    monkeypatch.setattr(module, "SCORES", 1)
    got = attention_with_mass(q.transpose(1, 2), k, v, scale=0.5, weight=weight)
    expected = naive_attention_with_mass(q.transpose(1, 2), k, v, scale=0.5, weight=weight)
    for each, other in zip(got, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("length", "held"), [(1, 40), (70, 90), (100, 100)])
def test_heads_one_by_one_are_the_definition(
    monkeypatch: pytest.MonkeyPatch, length: int, held: int, dtype: torch.dtype
) -> None:
    """The CPU's form for long prompts, in blocks of 32 queries, of which the last is not full."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(3, length, 4, 8, dtype=dtype, generator=generator)
    k = torch.randn(3, 2, held, 8, dtype=dtype, generator=generator)
    v = torch.randn(3, 2, held, 5, dtype=dtype, generator=generator)
    weight = torch.rand(length, generator=generator)
    monkeypatch.setattr(module, "IN_CACHE", 1)
    monkeypatch.setattr(module, "BY_HEAD", 1)
    calls: list[int] = []
    by_head = module._mass_by_head

    def counted(*given: Any) -> Any:
        calls.append(1)
        return by_head(*given)

    monkeypatch.setattr(module, "_mass_by_head", counted)
    hidden = torch.tensor([0, 3, held])[:, None]  # of the last row nothing is seen
    for visible in (None, torch.arange(held) >= hidden):
        for told in ({}, {"share": 0.1}, {"share": 0.1, "latest": True}):
            options: dict[str, Any] = {"scale": 0.3, "visible": visible, **told}
            expected = naive_attention_with_mass(q, k, v, weight=weight.to(dtype), **options)
            with torch.no_grad():
                got = attention_with_mass(q, k, v, weight=weight, **options)
            atol = 1e-12 if dtype == torch.float64 else 1e-5
            for each, other in zip(got, expected, strict=True):
                torch.testing.assert_close(each, other, rtol=0, atol=atol)
    assert len(calls) == 6
    attention_with_mass(q, k, v, scale=0.3, weight=weight)  # with gradients enabled: the other form
    assert len(calls) == 6


def test_the_mass_of_half_precision_counts_beyond_its_digits() -> None:
    """A thousand queries that all attend to the first token: bfloat16 would stop at 256."""
    q, v = torch.ones(1, 1000, 1, 4, dtype=torch.bfloat16), torch.ones(1, 1, 1000, 4, dtype=torch.bfloat16)
    k = torch.full((1, 1, 1000, 4), -20.0, dtype=torch.bfloat16)
    k[:, :, 0] = 20
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            _, mass = attention_with_mass(q, k, v, scale=1.0, weight=torch.ones(1000))
        assert mass.dtype == torch.float32
        assert mass[0, 0, 0] == 1000
