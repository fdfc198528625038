"""Sparse attention ops against their definitions, query by query."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.sparse import (
    block_means,
    block_topk,
    landmark_attention,
    naive_sparse_attention,
    routing_attention,
    topk_attention,
)

HEADS, SIZE, VALUE = 4, 6, 5


def inputs(length: int, queries: int, shared: int, padded: bool, seed: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """q, k, v, and positions: the queries are the last; row 0 is padded at the left by three."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    q, k, v = (
        draw(queries, HEADS, SIZE),
        draw(length, HEADS // shared, SIZE),
        draw(length, HEADS // shared, VALUE),
    )
    if not padded:
        return [q, k, v], {}
    at = torch.arange(length) - torch.tensor([[min(3, length - 1)], [0]])
    return [q, k, v], {"q_position": at[:, -queries:], "k_position": at}


settings = given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.integers(1, 6),
    st.integers(0, 9),
)


def real(positions: dict[str, Tensor], o: Tensor) -> Tensor:
    """[B, Tq] bool: the queries that are no padding."""
    return positions["q_position"] >= 0 if positions else torch.ones(o.shape[:2], dtype=torch.bool)


def close(found: Tensor, expected: Tensor, positions: dict[str, Tensor]) -> None:
    assert found.isfinite().all()
    mask = real(positions, found)
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-10)


@settings
def test_topk(length, queries, shared, padded, top_k, seed):
    tensors, positions = inputs(length, min(queries, length), shared, padded, seed)

    def weigh(b, i, h, keys, scores):
        best = scores.argsort(descending=True)[:top_k]
        weights = torch.zeros_like(scores)
        weights[best] = scores[best].softmax(0)
        return weights

    close(topk_attention(*tensors, top_k, **positions), naive_sparse_attention(*tensors, weigh, **positions), positions)


def best_blocks(scores: Tensor, own: int, top_k: int) -> list[int]:
    """The own block and the best of those before, top_k in all. scores: of the blocks 0 .. own - 1."""
    return [own, *scores[:own].argsort(descending=True)[: top_k - 1].tolist()]


@settings
def test_blocks_of_the_best_means(length, queries, shared, padded, top_k, seed):
    tensors, positions = inputs(length, min(queries, length), shared, padded, seed)
    q, k, _ = tensors
    block = 4

    def weigh(b, i, h, keys, scores):
        at = torch.arange(len(keys))  # causal keys in order: their positions
        own = int(at[-1]) // block
        means = torch.stack([k[b, keys[at // block == n], h // shared].mean(0) for n in range(own + 1)])
        chosen = best_blocks(means @ q[b, i, h], own, top_k)
        sees = torch.tensor([int(a) // block in chosen for a in at])
        return scores.masked_fill(~sees, -torch.inf).softmax(0)

    found = block_topk(*tensors, block, top_k, **positions)
    close(found, naive_sparse_attention(*tensors, weigh, **positions), positions)


@settings
def test_routing(length, queries, shared, padded, clusters, seed):
    tensors, positions = inputs(length, min(queries, length), 1, padded, seed)
    generator = torch.Generator().manual_seed(seed)
    of_keys = torch.randint(clusters, (2, length, HEADS), generator=generator)
    of_queries = of_keys[:, -tensors[0].shape[1] :]

    def weigh(b, i, h, keys, scores):
        sees = of_keys[b, keys, h] == of_queries[b, i, h]
        return scores.masked_fill(~sees, -torch.inf).softmax(0)

    found = routing_attention(*tensors, of_queries, of_keys, **positions)
    close(found, naive_sparse_attention(*tensors, weigh, **positions), positions)


@settings
def test_landmarks(length, queries, shared, padded, top_k, seed):
    tensors, positions = inputs(length, min(queries, length), shared, padded, seed)
    q = tensors[0]
    block = 4
    landmarks = torch.randn(2, -(-length // block), HEADS // shared, SIZE, dtype=torch.float64)

    def weigh(b, i, h, keys, scores):
        at = torch.arange(len(keys))
        own = int(at[-1]) // block
        marks = landmarks[b, :own, h // shared] @ q[b, i, h] * SIZE**-0.5
        read = marks.argsort(descending=True)[:top_k]
        mine = at // block == own
        group = torch.cat([scores[mine], marks[read]]).softmax(0)
        weights = torch.zeros_like(scores)
        weights[mine] = group[: int(mine.sum())]
        for weight, n in zip(group[int(mine.sum()) :], read.tolist(), strict=True):
            weights[at // block == n] = weight * scores[at // block == n].softmax(0)
        return weights

    found = landmark_attention(*tensors, landmarks, block, top_k, **positions)
    close(found, naive_sparse_attention(*tensors, weigh, **positions), positions)


def test_landmarks_without_past_blocks_are_plain_attention():
    tensors, _ = inputs(9, 9, 2, False, 0)
    landmarks = torch.randn(2, 1, 2, SIZE, dtype=torch.float64)
    plain = naive_sparse_attention(*tensors, lambda b, i, h, keys, scores: scores.softmax(0))
    torch.testing.assert_close(landmark_attention(*tensors, landmarks, 9), plain)
    torch.testing.assert_close(topk_attention(*tensors, 9), plain)
    torch.testing.assert_close(block_topk(*tensors, 3, 3), plain)


def test_gradients():
    tensors, positions = inputs(7, 7, 2, True, 1)
    marks = torch.randn(2, 3, 2, SIZE, dtype=torch.float64)
    ops = {
        "topk": (lambda q, k, v: topk_attention(q, k, v, 3, **positions), tensors),
        "moba": (lambda q, k, v: block_topk(q, k, v, 3, 2, **positions), tensors),
        "landmark": (lambda q, k, v, m: landmark_attention(q, k, v, m, 3, 1, **positions), [*tensors, marks]),
    }
    for op, given_ in ops.values():
        assert torch.autograd.gradcheck(op, [x.clone().requires_grad_() for x in given_], fast_mode=True)


def test_many_queries_are_read_in_chunks():
    tensors, _ = inputs(600, 600, 2, False, 0)
    last = [tensors[0][:, -1:], *tensors[1:]]
    whole = block_topk(*tensors, 16, 3)
    torch.testing.assert_close(whole[:, -1:], block_topk(*last, 16, 3), rtol=0, atol=1e-10)


def test_means_leave_padding_out():
    x = torch.arange(6.0).view(1, 6, 1, 1)
    at = torch.tensor([[-2, -1, 0, 1, 2, 3]])
    assert block_means(x, at, 3).flatten().tolist() == [3.0, 5.0]


@pytest.mark.parametrize("name", ["block", "top_k"])
def test_sizes_below_one_are_refused(name):
    tensors, _ = inputs(4, 4, 1, False, 0)
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        block_topk(*tensors, **{"block": 2, "top_k": 2, name: 0})
