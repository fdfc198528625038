"""Neighbourhood attention against the nearest keys, found one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops import neighbourhood_attention, softmax_attention


def naive(q: Tensor, k: Tensor, v: Tensor, window: int, dilation: int) -> Tensor:
    """One sequence [T, D]: each query over the window of its part that holds it as near the middle as can be."""
    rows = []
    for i in range(len(q)):
        part = list(range(i % dilation, len(q), dilation))
        at = part.index(i)
        first = min(max(at - window // 2, 0), max(len(part) - window, 0))
        seen = part[first : first + window]
        rows.append((k[seen] @ q[i] * q.shape[-1] ** -0.5).softmax(0) @ v[seen])
    return torch.stack(rows)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), st.integers(0, 5))
def test_every_query_sees_its_window(length: int, window: int, dilation: int, padding: int) -> None:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, length, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    start = torch.tensor([min(padding, length - 1), 0])
    found = neighbourhood_attention(q, k, v, window, dilation, start)
    plain = neighbourhood_attention(q, k, v, window, dilation)
    for h in range(2):
        for b in range(2):
            at = int(start[b])
            expected = naive(q[b, at:, h], k[b, at:, h], v[b, at:, h], window, dilation)
            torch.testing.assert_close(found[b, at:, h], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(plain[1, :, h], found[1, :, h], rtol=0, atol=1e-10)
    assert found.isfinite().all()


def test_long_sequences_are_read_in_chunks_and_wide_windows_see_all() -> None:
    q, k, v = (torch.randn(1, 700, 1, 4, dtype=torch.float64) for _ in range(3))
    found = neighbourhood_attention(q, k, v, 7, 2)
    torch.testing.assert_close(found[0, :, 0], naive(q[0, :, 0], k[0, :, 0], v[0, :, 0], 7, 2), rtol=0, atol=1e-10)
    everything = neighbourhood_attention(q, k, v, 700)
    torch.testing.assert_close(everything, softmax_attention(q, k, v, causal=False), rtol=0, atol=1e-10)


def test_windows_below_one_are_refused() -> None:
    x = torch.zeros(1, 3, 1, 2)
    with pytest.raises(InputError, match="dilation must be at least 1, got 0"):
        neighbourhood_attention(x, x, x, 3, 0)
