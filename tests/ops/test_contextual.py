"""Contextual positions against their definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contextlab.ops import cope_attention, naive_cope_attention, softmax_attention


def inputs(length: int = 12, positions: int = 4) -> list[Tensor]:
    """q, k, v, and the embedding of positions; two query heads share a key head."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, length, 4, 6), (2, length, 2, 6), (2, length, 2, 5), (positions, 6)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("positions", [1, 2, 4, 64])
def test_it_counts_open_gates(positions: int) -> None:
    tensors = inputs(positions=positions)
    torch.testing.assert_close(cope_attention(*tensors), naive_cope_attention(*tensors), rtol=0, atol=1e-10)


def test_without_embeddings_it_is_plain_attention() -> None:
    q, k, v, embedding = inputs(300)
    plain = softmax_attention(q, k, v)
    torch.testing.assert_close(cope_attention(q, k, v, 0 * embedding), plain, rtol=0, atol=1e-10)


def test_gradients_and_padding() -> None:
    q, k, v, embedding = inputs(6)
    leaves = [x[:1].clone().requires_grad_() for x in (q, k, v)] + [embedding.clone().requires_grad_()]
    assert torch.autograd.gradcheck(cope_attention, leaves)
    at = torch.arange(6)[None] - 2
    padded = cope_attention(q, k, v, embedding, q_position=at, k_position=at)
    torch.testing.assert_close(padded[:, 2:], cope_attention(q[:, 2:], k[:, 2:], v[:, 2:], embedding))
    assert not padded[:, :2].any()
