"""Attention over pages: against each head alone, and against the plain form when all heads hold the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contextlab.ops.kv import attend_cached, naive_attention_with_mass
from contextlab.ops.paged import attend_paged, naive_attend_paged


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@given(
    length=st.integers(1, 5), pages=st.integers(1, 7), size=st.integers(1, 4), shared=st.integers(1, 3),
    seed=st.integers(0, 99), holes=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_each_head_sees_its_own_pages(length: int, pages: int, size: int, shared: int, seed: int, holes: bool) -> None:
    q, pk, pv, k, v = drawn(
        seed, (2, length, 3 * shared, 4), (2, pages, size, 4), (2, pages, size, 5), (2, 3, length + 2, 4),
        (2, 3, length + 2, 5),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(0, 3, (2, pages), generator=generator)
    visible = torch.rand(2, pages, size, generator=generator) > 0.4 if holes else None
    given_pages = (q, pk, pv, owner, k, v)
    weight = torch.ones(length, dtype=torch.float64)
    y, far, near = attend_paged(*given_pages, scale=0.5, page_visible=visible, weight=weight)
    expected = naive_attend_paged(*given_pages, scale=0.5, page_visible=visible)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert far is not None
    assert near is not None
    torch.testing.assert_close(far.sum((1, 2)) + near.sum((1, 2)), torch.full((2,), 3.0 * shared * length).double())


@pytest.mark.parametrize("block", [2**20, 40])
def test_pages_of_heads_that_hold_the_same_are_the_plain_form(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("contextlab.ops.paged.SCORES", block)
    q, k, v = drawn(0, (2, 5, 4, 6), (2, 2, 17, 6), (2, 2, 17, 3))
    pages = [x[:, :, :8].unflatten(2, (2, 4)).flatten(1, 2) for x in (k, v)]
    owner = torch.tensor([[0, 0, 1, 1]] * 2)
    weight = torch.rand(5, dtype=torch.float64)
    for cap in (None, 0.6):
        told: dict[str, Any] = {"scale": 0.4, "weight": weight, "cap": cap}
        y, far, near = attend_paged(q, pages[0], pages[1], owner, k[:, :, 8:], v[:, :, 8:], **told)
        expected, mass = naive_attention_with_mass(q, k, v, **told)
        mass = mass.unflatten(1, (2, 2)).sum(2)
        assert far is not None
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(far, mass[:, :, :8].unflatten(2, (2, 4)).flatten(1, 2), rtol=0, atol=1e-12)
        torch.testing.assert_close(near, mass[:, :, 8:], rtol=0, atol=1e-12)
    places = torch.arange(17).expand(2, 2, -1)
    sloped: dict[str, Any] = {
        "scale": 0.4,
        "slopes": torch.tensor([0.5, 0.2, 0.1, 0.3]),
        "q_position": places[:, 0, 12:],
    }
    y, _, _ = attend_paged(
        q, pages[0], pages[1], owner, k[:, :, 8:], v[:, :, 8:], **sloped, k_position=places[..., 8:],
        page_position=places[..., :8].unflatten(2, (2, 4)).flatten(1, 2),
    )  # fmt: skip
    torch.testing.assert_close(y, attend_cached(q, k, v, **sloped, k_position=places), rtol=0, atol=1e-12)


def test_gradients_pass_and_a_query_without_tokens_gets_zeros() -> None:
    tensors = [
        x.requires_grad_() for x in drawn(1, (1, 2, 2, 3), (1, 3, 2, 3), (1, 3, 2, 2), (1, 2, 3, 3), (1, 2, 3, 2))
    ]
    owner = torch.tensor([[0, 1, 1]])

    def answer(q: Tensor, pk: Tensor, pv: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_paged(q, pk, pv, owner, k, v, scale=0.7)[0]

    assert torch.autograd.gradcheck(answer, tensors)
    q, pk, pv, k, v = tensors
    none = {"page_visible": torch.zeros(1, 3, 2, dtype=torch.bool), "visible": torch.zeros(1, 3, dtype=torch.bool)}
    assert not attend_paged(q, pk, pv, owner, k, v, scale=0.7, **none)[0].any()
