"""Attention over parts, against the definition of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlab.ops import merge
from contextlab.ops.merge import attention_with_lse, merge_attention
from contextlab.ops.softmax import naive_softmax_attention

LENGTH = 12


def tensors(seed: int, kv_heads: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, LENGTH, heads, size, dtype=torch.float64, generator=generator) * 2
        for heads, size in ((4, 6), (kv_heads, 6), (kv_heads, 3))
    )


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, LENGTH), st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 7), st.sampled_from([16, 2**20]),
    st.sampled_from([None, 0.5]),
)  # fmt: skip
def test_parts_make_one_softmax(cut: int, kv_heads: int, alibi: bool, pad: int, scores: int, cap: float | None) -> None:
    """The last `cut` tokens read the first in one part and each other in another, however small the blocks are."""
    q, k, v = tensors(cut, kv_heads)
    slopes = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64) if alibi else None
    places = torch.arange(LENGTH) - torch.tensor([0, pad])[:, None]
    told: dict[str, Any] = {"scale": 0.4, "slopes": slopes, "cap": cap}
    expected = naive_softmax_attention(q, k, v, **told, q_position=places, k_position=places)
    at = LENGTH - cut
    k, v, q = k.transpose(1, 2), v.transpose(1, 2), q[:, at:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "SCORES", scores)
        parts = [
            attention_with_lse(
                q, k[:, :, part], v[:, :, part], **told, causal=own, visible=places[:, part] >= 0,
                q_position=places[:, at:], k_position=places[:, part],
            )
            for part, own in ((slice(0, at), False), (slice(at, None), True))
        ]  # fmt: skip
    torch.testing.assert_close(merge_attention(parts), expected[:, at:], rtol=0, atol=1e-12)


def test_what_sees_nothing_is_zero() -> None:
    q, k, v = tensors(0, 2)
    nothing = torch.zeros(2, LENGTH, dtype=torch.bool)
    y, total = attention_with_lse(q, k.transpose(1, 2), v.transpose(1, 2), scale=1.0, visible=nothing)
    assert not y.any()
    assert (total == -torch.inf).all()
    assert not merge_attention([(y, total), (y, total)]).any()


def test_long_rows_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.repeat(1, 4, 1, 1) for x in tensors(1, 2))
    whole, _ = attention_with_lse(q, k.transpose(1, 2), v.transpose(1, 2), scale=0.4, causal=True)
    monkeypatch.setattr(merge, "SCORES", 1)
    blocks, _ = attention_with_lse(q, k.transpose(1, 2), v.transpose(1, 2), scale=0.4, causal=True)
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(whole, naive_softmax_attention(q, k, v, scale=0.4), rtol=0, atol=1e-12)


def test_gradients() -> None:
    q, k, v = tensors(2, 2)

    def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        early, late = (
            attention_with_lse(q, k[:, :, part], v[:, :, part], scale=0.4) for part in (slice(5), slice(5, None))
        )
        return merge_attention([early, late])

    inputs = [x[:, :8].requires_grad_() for x in (q[:, :3], k, v)]
    inputs = [inputs[0], *(x.transpose(1, 2).detach().requires_grad_() for x in inputs[1:])]
    assert torch.autograd.gradcheck(whole, tuple(inputs))
