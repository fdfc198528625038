"""Star Attention against a mask over all pairs of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.policies import build_policy
from contextlab.policies.prompt.star_attention import StarAttention, star_attention
from contextlab.state import KVState
from contextlab.testing import policies as base
from tests.policies.reading.test_selective import layer_of, tensors


def by_mask(q: Tensor, k: Tensor, v: Tensor, block: int, start: Tensor, slopes: Tensor | None) -> Tensor:
    shared = q.shape[2] // k.shape[2]
    places = torch.arange(q.shape[1]) - start[:, None]
    away = places[:, :, None] - places[:, None]
    same = places[:, :, None] // block == places[:, None] // block
    sees = (away >= 0) & (places[:, None] >= 0) & (same | (places[:, None] < block))
    scores = q.transpose(1, 2) @ k.transpose(1, 2).repeat_interleave(shared, 1).mT * q.shape[-1] ** -0.5
    if slopes is not None:
        scores = scores - slopes[:, None, None] * away[:, None]
    p = scores.masked_fill(~sees[:, None], -torch.inf).softmax(-1)
    return (p @ v.transpose(1, 2).repeat_interleave(shared, 1)).transpose(1, 2)


@pytest.mark.parametrize("pads", [None, (0, 5)])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("block", [1, 4, 7, 20, 29, 40])
def test_each_token_sees_the_first_block_and_its_own(block: int, alibi: bool, pads: tuple[int, ...] | None) -> None:
    q, k, v = tensors(29)
    slopes = torch.tensor([0.1, 0.3, 1.0, 2.0], dtype=torch.float64) if alibi else None
    start = torch.tensor(pads or (0, 0))
    got = star_attention(q, k, v, block, scale=8**-0.5, slopes=slopes, start=start if pads else None)
    expected = by_mask(q, k, v, block, start, slopes)
    real = torch.arange(29) >= start[:, None]
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-12)


@pytest.mark.parametrize("budget", ["24tok", "60%", "49152B"])
def test_later_pieces_read_everything(budget: str) -> None:
    """Keys and values of blocks of 12: in one layer they are those of any reading, so that the rest is exact."""
    reader, x = base.model(depth=1), base.tokens()
    policy = StarAttention(budget)
    layer = layer_of()
    assert policy.block(layer, 40, 2, torch.float64) == (12 if budget != "49152B" else 48)
    expected, full, _ = base.read(reader, x, [40])
    with policy.attach(reader):
        got, state, _ = base.read(reader, x, [40, 9])
    torch.testing.assert_close(got[:, 40:], expected[:, 40:], rtol=0, atol=1e-9)
    torch.testing.assert_close(got[:, :12], expected[:, :12], rtol=0, atol=1e-9)
    assert torch.allclose(got[:, 24:40], expected[:, 24:40], rtol=0, atol=1e-9) == (budget == "49152B")
    assert isinstance(state.layers[0], KVState)
    assert state.nbytes == full.nbytes


def test_a_budget_of_less_than_two_tokens_is_refused() -> None:
    reader = base.model()
    for budget, shown in (("1tok", "1 tokens"), ("2%", "0.8 tokens"), ("1kB", "0.977 tokens")):
        with (
            pytest.raises(InputError, match=f"is {shown} of 40 in 2 rows"),
            build_policy("star_attention", budget=budget).attach(reader),
        ):
            reader.read(base.tokens(2, 40))
