"""Block-local attention against its definition, pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.mixers.softmax.block_local import BlockLocal, block_local_attention
from contextlab.ops.position import alibi_slopes, rope


def naive(q: Tensor, k: Tensor, v: Tensor, block: int, slopes: Tensor | None = None) -> Tensor:
    """One sequence, q [T, H, D]: each query over the tokens of its block and of the block before, up to itself."""
    rows = []
    for i in range(len(q)):
        seen = [j for j in range(i + 1) if i // block - j // block <= 1]
        heads = []
        for h in range(q.shape[1]):
            shared = h * k.shape[1] // q.shape[1]
            score = k[seen, shared] @ q[i, h] * q.shape[-1] ** -0.5
            if slopes is not None:
                score = score - slopes[h] * (i - torch.tensor(seen))
            heads.append(score.softmax(0) @ v[seen, shared])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 12), st.booleans(), st.sampled_from([4, 2, 1]))
def test_every_query_sees_its_block_and_the_one_before(
    length: int, block: int, padding: int, biased: bool, kv_heads: int
) -> None:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, length, n, 3, generator=generator, dtype=torch.float64) for n in (4, kv_heads, kv_heads))
    slopes = alibi_slopes(4) if biased else None
    start = torch.tensor([min(padding, length - 1), 0])
    places = torch.arange(length)[None]
    padded = block_local_attention(q, k, v, places - start[:, None], block, None, slopes)
    plain = block_local_attention(q, k, v, places, block, None, slopes)
    for row in range(2):
        at = int(start[row])
        expected = naive(q[row, at:], k[row, at:], v[row, at:], block, slopes)
        torch.testing.assert_close(padded[row, at:], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(plain[1], padded[1], rtol=0, atol=1e-10)
    assert not padded[0, : int(start[0])].any()


@pytest.mark.parametrize("block", [3, 700])
def test_groups_of_blocks_are_as_one(block: int) -> None:
    q, k, v = (torch.randn(1, 1500, 1, 2, dtype=torch.float64) for _ in range(3))
    y = block_local_attention(q, k, v, torch.arange(1500)[None], block)
    torch.testing.assert_close(y[0], naive(q[0], k[0], v[0], block), rtol=0, atol=1e-10)


@pytest.mark.parametrize("padding", [0, 2])
def test_gradients(padding: int) -> None:
    q, k, v = (torch.randn(2, n, h, 2, dtype=torch.float64, requires_grad=True) for n, h in ((7, 2), (9, 1), (9, 1)))
    places = torch.arange(9)[None] - torch.tensor([[padding], [0]]) if padding else torch.arange(9)[None]
    assert torch.autograd.gradcheck(lambda q, k, v: block_local_attention(q, k, v, places, 3), (q, k, v))


@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
def test_the_mixer_is_projections_positions_and_the_op(position: Any) -> None:
    mixer = BlockLocal(16, block=4, kv_heads=2, position=position).double()
    x = torch.randn(1, 13, 16, dtype=torch.float64)
    q, k, v = mixer.qkv_proj(x).unflatten(-1, (-1, 4)).split((4, 2, 2), 2)
    if position == "rope":
        q, k = rope(q, torch.arange(13)), rope(k, torch.arange(13))
    y = naive(q[0], k[0], v[0], 4, alibi_slopes(4) if position == "alibi" else None)
    torch.testing.assert_close(mixer(x)[0][0], mixer.out_proj(y.flatten(1)), rtol=1e-9, atol=1e-10)


def test_agrees_with_transformer_xl() -> None:
    ours, theirs = BlockLocal(16, block=4).double(), build_mixer("transformer_xl", width=16, segment=4).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 19, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-9, atol=1e-10)


def test_bytes_and_flops() -> None:
    mixer = BlockLocal(16, block=4)
    assert mixer.state_nbytes(5) == mixer.state_nbytes(10**6) == 7 * (2 * 16 * 4 + 8) + 8
    pairs = (1 + 2 + 3 + 4) + (5 + 6 + 7 + 8) + (5 + 6)
    assert mixer.flops(10) == 2 * 10 * 4 * 16 * 16 + 4 * 16 * pairs


def test_half_precision_and_autocast_run() -> None:
    mixer = BlockLocal(16, block=4)
    x = torch.randn(2, 12, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)
        mixer(x, state)
    torch.testing.assert_close(y.float(), mixer(x)[0], atol=0.1, rtol=0.1)
    _, state = mixer.bfloat16()(x.bfloat16())
    assert state is not None
    assert state.nbytes == mixer.state_nbytes(12, 2, torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"block": 0}, "block"), ({"blok": 4}, "unknown option"), ({"heads": 5}, "nearest that divides it is 4")],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_mixer("block_local", width=16, **options)
    assert "\n" not in str(caught.value)
