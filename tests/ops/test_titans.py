"""Titans' matrix memory in chunks against the recurrence that defines it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.ops import gated_delta_rule, naive_titans, titans


def inputs(length: int, seed: int = 0, batch: int = 2, heads: int = 3) -> tuple[list[Tensor], Tensor]:
    """q, k, v, theta, m, g, and a state."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, length, heads, *shape, generator=generator, dtype=torch.float64)

    tensors = [draw(6), F.normalize(draw(6), dim=-1), draw(5)]
    tensors += [draw().sigmoid(), F.logsigmoid(draw()), F.logsigmoid(draw() + 2)]
    return tensors, torch.randn(batch, heads, 2, 6, 5, generator=generator, dtype=torch.float64)


@given(st.integers(0, 100), st.integers(0, 10**6), st.sampled_from([1, 7, 32]))
def test_chunks_give_what_the_recurrence_gives(length: int, seed: int, chunk: int) -> None:
    tensors, state = inputs(length, seed)
    o, last = titans(*tensors, None, state, True, chunk)
    if length == 0:
        torch.testing.assert_close(last, state)
        return
    expected, expected_last = naive_titans(*tensors, None, state)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(last, expected_last, rtol=0, atol=1e-9)


def test_without_momentum_it_is_the_delta_rule_that_decays_after_the_error() -> None:
    (q, k, v, theta, m, _), _ = inputs(50)
    gone = torch.full_like(m, -1e9)
    expected, _ = gated_delta_rule(q, k, v, None, theta)
    torch.testing.assert_close(titans(q, k, v, theta, gone, m * 0)[0], expected, rtol=0, atol=1e-10)


def test_gradients_and_single_precision() -> None:
    tensors, state = inputs(5, batch=1, heads=1)
    leaves = [x.clone().requires_grad_() for x in (*tensors, state)]
    assert torch.autograd.gradcheck(lambda *x: titans(*x[:6], None, x[6], True, 2), leaves)
    tensors, state = inputs(200)
    exact, _ = titans(*tensors, None, state)
    single, _ = titans(*(x.float() for x in tensors), None, state.float())
    assert (single.double() - exact).abs().max() < 1e-5 * exact.abs().max()


def test_wrong_shapes_are_refused() -> None:
    (q, k, v, theta, m, g), _ = inputs(4)
    with pytest.raises(InputError, match=r"expected m \[B, T, H\] = \[2, 4, 3\], got \[2, 4, 3, 1\]"):
        titans(q, k, v, theta, m.unsqueeze(-1), g)
    with pytest.raises(InputError, match=r"expected q, k \[B, T, H, K\]"):
        titans(q, k, v[:, :2], theta, m, g)
