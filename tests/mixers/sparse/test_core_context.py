"""Core context aware attention query by query, and what it comes to when groups or windows leave nothing to pool."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from contextlab.mixers import build_mixer
from contextlab.mixers.sparse.core_context import CoreContextAttention
from contextlab.ops.position import rope


def made(**options: Any) -> CoreContextAttention:
    mixer = build_mixer("core_context", width=12, **options).double()
    assert isinstance(mixer, CoreContextAttention)
    return mixer


def by_definition(mixer: CoreContextAttention, x: Tensor) -> Tensor:
    """x [T, D] -> y [T, D], each query over the cores and the tokens that it sees."""
    H, Hkv, D, g, s = mixer.heads, mixer.kv_heads, mixer.head_dim, mixer.group, mixer.span
    q, k, v = mixer.qkv_proj(x).view(len(x), -1, D).split((H, Hkv, Hkv), 1)
    if mixer.position == "rope":
        places = torch.arange(len(x))
        q, k = rope(q[None], places)[0], rope(k[None], places)[0]
    rows = []
    for i in range(1, len(x) + 1):  # counted from 1, as in the paper
        groups = max(0, (i - s) // g)
        heads = []
        for h in range(H):
            keys, values = [], []
            for j in range(groups):
                K, V = k[j * g : (j + 1) * g, h // (H // Hkv)], v[j * g : (j + 1) * g, h // (H // Hkv)]
                weights = torch.softmax(K @ q[(j + 1) * g - 1, h] / D**0.5, 0)
                keys.append(weights @ K)
                values.append(weights @ V)
            K = torch.stack([*keys, *k[groups * g : i, h // (H // Hkv)]])
            V = torch.stack([*values, *v[groups * g : i, h // (H // Hkv)]])
            heads.append(torch.softmax(K @ q[i - 1, h] / D**0.5, 0) @ V)
        rows.append(mixer.out_proj(torch.cat(heads)))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        {"group": 4, "window": 6, "heads": 2},
        {"group": 5, "window": 1, "heads": 4, "kv_heads": 2, "head_dim": 2},
        {"group": 3, "window": 7, "heads": 1, "position": "none"},
    ],
)
def test_agrees_with_the_definition(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    mixer = made(**options)
    x = torch.randn(2, 33, 12, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([by_definition(mixer, row) for row in x])
    mask = torch.arange(38) >= torch.tensor([5, 5])[:, None]
    padded = mixer(torch.cat((x.new_ones(2, 5, 12), x), 1), None, mask)[0][:, 5:]
    weight, wanted = torch.randn_like(expected), [x, *mixer.parameters()]
    due = torch.autograd.grad((expected * weight).sum(), wanted)
    for y in (mixer(x)[0], mixer(x, keep_state=False)[0], padded):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
        for got, gradient in zip(torch.autograd.grad((y * weight).sum(), wanted), due, strict=True):
            torch.testing.assert_close(got, gradient, rtol=0, atol=1e-8)


def test_agrees_with_the_definition_beyond_one_chunk_of_queries() -> None:
    torch.manual_seed(0)
    mixer = made(group=7, window=9, heads=1)
    x = torch.randn(1, 300, 12, dtype=torch.float64)
    expected = by_definition(mixer, x[0])
    torch.testing.assert_close(mixer(x)[0][0], expected, rtol=0, atol=1e-9)
    _, state = mixer(x[:, :150])
    torch.testing.assert_close(mixer(x[:, 150:], state)[0][0], expected[150:], rtol=0, atol=1e-9)


@given(length=st.integers(1, 90), window=st.integers(1, 20), seed=st.integers(0, 99))
def test_groups_of_one_token_pool_nothing(length: int, window: int, seed: int) -> None:
    """Then it is full attention; and so it is as long as no group lies behind the window."""
    torch.manual_seed(seed)
    full = build_mixer("attention", width=12, heads=2, kv_heads=1).double()
    x = torch.randn(2, length, 12, dtype=torch.float64)
    for group, span in ((1, window), (max(1, length - window + 1), window)):
        mixer = made(heads=2, kv_heads=1, group=group, window=span)
        mixer.load_state_dict(full.state_dict())
        torch.testing.assert_close(mixer(x)[0], full(x)[0], rtol=0, atol=1e-9)
        assert mixer.flops(length) - full.flops(length) == 6 * (length // group * group) * 2 * 6


def test_pairs_are_those_of_the_definition() -> None:
    for group, window, length in ((4, 6, 50), (5, 1, 23), (1, 3, 9), (8, 30, 20), (3, 3, 3)):
        mixer = made(group=group, window=window, heads=2)
        cores = [max(0, (i - window) // group) for i in range(1, length + 1)]
        due = sum(n + i - n * group for i, n in enumerate(cores, 1))
        assert mixer._pairs(length) == due


def test_the_state_holds_near_tokens_and_one_core_for_each_group() -> None:
    mixer = made(group=80, window=20, heads=3, kv_heads=1)
    x = torch.randn(2, 250, 12, dtype=torch.float64)
    _, state = mixer(x)
    assert state.cores.shape == (2, 3, 3, 8)
    assert state.near.keys.shape == (2, 1, 98, 4)
    # A state from elsewhere is known as one of this mixer's, though groups are longer than what is read to find that.
    y = mixer(x[:, :9], state.select(torch.tensor([0, 1])))[0]
    torch.testing.assert_close(y, mixer(x[:, :9], state)[0])
