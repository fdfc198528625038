"""NSA against its definition, query by query, and what every query reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops import naive_native_sparse_attention, native_sparse_attention
from contextlab.ops.native_sparse import complete_blocks

HEADS, SIZE, VALUE = 4, 6, 5
SIZES = st.sampled_from(
    [  # block, compress_block, compress_stride, top_k, initial_blocks, local_blocks
        (4, 2, 1, 4, 1, 2), (4, 4, 2, 3, 1, 2), (3, 3, 3, 1, 0, 1), (6, 4, 2, 5, 2, 1), (2, 1, 1, 6, 1, 2),
    ]
)  # fmt: skip


def case(length: int, queries: int, shared: int, padded: bool, sizes: tuple[int, ...], window: int, seed: int):
    """What the op takes: the queries are the last, and so are the near keys; row 0 is padded at the left by three."""
    generator = torch.Generator().manual_seed(seed)
    block, size, stride, top_k, initial, local = sizes
    pads = torch.tensor([min(3, length - 1), 0]) if padded else torch.tensor([0, 0])

    def draw(tokens: int, heads: int, dim: int) -> Tensor:
        return torch.randn(2, tokens, heads, dim, generator=generator, dtype=torch.float64)

    groups, close = HEADS // shared, min(length, window + queries - 1)
    count = complete_blocks(length, size, stride)
    tensors = {
        "q": draw(queries, HEADS, SIZE), "k": draw(length, groups, SIZE), "v": draw(length, groups, VALUE),
        "gates": torch.rand(2, queries, HEADS, 3, generator=generator, dtype=torch.float64),
    }  # fmt: skip
    options = {
        "compressed": (draw(count, groups, SIZE), draw(count, groups, VALUE)),
        "near": (draw(close, groups, SIZE), draw(close, groups, VALUE)),
        "block": block, "top_k": top_k, "window": window, "compress_block": size, "compress_stride": stride,
        "initial_blocks": initial, "local_blocks": local,
    }  # fmt: skip
    if padded:
        at = torch.arange(length) - pads[:, None]
        options |= {"q_position": at[:, -queries:], "k_position": at, "near_position": at[:, length - close :]}
    return tensors, options


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    SIZES,
    st.integers(1, 6),
    st.integers(0, 9),
)
def test_agrees_with_the_definition(length, queries, shared, padded, sizes, window, seed):
    tensors, options = case(length, min(queries, length), shared, padded, sizes, window, seed)
    found = native_sparse_attention(**tensors, **options)
    expected = naive_native_sparse_attention(**tensors, **options)
    assert found.isfinite().all()
    real = options["q_position"] >= 0 if padded else torch.ones(found.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-10)


@pytest.mark.parametrize("shared", [1, 4])
def test_every_query_reads_the_first_block_and_its_last_two(shared):
    length, block, top_k = 60, 4, 5
    tensors, options = case(length, length, shared, False, (block, 4, 2, top_k, 1, 2), 3, 0)
    tensors["gates"] = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand_as(tensors["gates"])
    values = torch.eye(length, dtype=torch.float64)[None, :, None].expand(2, -1, HEADS // shared, -1)
    options["compressed"] = (options["compressed"][0], torch.zeros_like(options["compressed"][0][..., :1]))
    options["near"] = (options["near"][0], torch.zeros_like(options["near"][0][..., :1]))
    tensors["v"] = values  # so that the answer is the weights themselves
    weights = native_sparse_attention(**tensors, **options)  # [2, T, H, T]
    others = set()
    for t in range(length):
        read = weights[:, t].unflatten(-1, (-1, block)) > 0  # [2, H, blocks, block]
        blocks, own = read.any(-1), t // block
        assert (blocks.sum(-1) == min(top_k, own + 1)).all()
        assert blocks[..., 0].all()
        assert blocks[..., max(0, own - 1) : own + 1].all()
        assert (read.sum((-1, -2)) == min(t + 1, (top_k - 1) * block + t % block + 1)).all()  # blocks whole
        assert (blocks.unflatten(1, (-1, shared)).float().var(2, correction=0) == 0).all()  # a group chooses together
        others |= {tuple(row) for row in blocks[:, 0, 1 : max(1, own - 1)].tolist() if any(row)}
    assert len(others) > 10  # and the rest by content


def test_gradients():
    tensors, options = case(9, 9, 2, True, (4, 2, 1, 3, 1, 2), 4, 1)
    extra = [*options.pop("compressed"), *options.pop("near")]

    def op(q, k, v, gates, far_k, far_v, near_k, near_v):
        y = native_sparse_attention(q, k, v, gates, compressed=(far_k, far_v), near=(near_k, near_v), **options)
        return y[options["q_position"] >= 0]

    given_ = [x.clone().requires_grad_() for x in (*tensors.values(), *extra)]
    assert torch.autograd.gradcheck(op, given_, fast_mode=True)


def test_many_queries_are_read_in_chunks():
    tensors, options = case(600, 600, 2, False, (16, 8, 4, 6, 1, 2), 20, 0)
    whole = native_sparse_attention(**tensors, **options)
    last = {**tensors, "q": tensors["q"][:, -1:], "gates": tensors["gates"][:, -1:]}
    torch.testing.assert_close(whole[:, -1:], native_sparse_attention(**last, **options), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_k": 2}, "top_k 2: a query reads 1 initial and 2 local blocks whatever they hold; expected at least 3"),
        ({"compress_stride": 3}, "compress_stride 3 does not divide compress_block 4 and block 8; one that does is 2"),
        ({"compress_block": 9}, r"compress_block must be from 1 to block \(8\), got 9"),
        ({"block": 0}, "block must be at least 1, got 0"),
        ({"initial_blocks": -1}, "initial_blocks must be at least 0, got -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, words):
    tensors, options = case(9, 9, 2, False, (8, 4, 2, 4, 1, 2), 4, 1)
    with pytest.raises(InputError, match=words):
        native_sparse_attention(**tensors, **{**options, **change})
