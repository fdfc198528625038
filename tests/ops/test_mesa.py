"""The mesa layer by conjugate gradients against direct solutions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.ops import mesa, naive_mesa


def inputs(length: int, seed: int = 0, batch: int = 2, heads: int = 3, size: int = 6) -> tuple[list[Tensor], tuple]:
    """q, k, v, g, beta, ridge, and a state."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = (draw(batch, length, heads, n) for n in (size, size, 5))
    tensors = [q, F.normalize(k, dim=-1), v, F.logsigmoid(draw(batch, length, heads) + 3)]
    tensors += [draw(batch, length, heads).sigmoid(), draw(heads, size).sigmoid() + 0.25]
    root = draw(batch, heads, size, size)
    return tensors, (root @ root.mT, draw(batch, heads, size, 5))


@given(st.integers(1, 90), st.integers(0, 10**6))
def test_it_is_the_ridge_regression_of_all_that_was_read(length: int, seed: int) -> None:
    tensors, state = inputs(length, seed)
    o, last = mesa(*tensors, state, True)
    expected, expected_last = naive_mesa(*tensors, state)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-9)
    for found, wanted in zip(last, expected_last, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_it_is_scikit_learns_ridge() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    (q, k, v, g, beta, _), _ = inputs(40, batch=1, heads=1)
    o, _ = mesa(q, k, v, g * 0, beta, torch.full((1, 6), 0.7, dtype=torch.float64))
    ridge = linear_model.Ridge(alpha=0.7, fit_intercept=False, solver="cholesky")
    ridge.fit(k[0, :30, 0].numpy(), v[0, :30, 0].numpy(), sample_weight=beta[0, :30, 0].numpy())
    expected = torch.from_numpy(ridge.predict(q[0, 29:30, 0].numpy()))
    torch.testing.assert_close(o[0, 29:30, 0], expected, rtol=0, atol=1e-8)


def test_gradients_go_through_the_solution() -> None:
    tensors, (G, H) = inputs(5, batch=1, heads=1, size=3)
    leaves = [x.clone().requires_grad_() for x in (*tensors, G, H)]

    def run(*x: Tensor) -> tuple[Tensor, ...]:
        o, (keys, values) = mesa(*x[:6], ((x[6] + x[6].mT) / 2, x[7]), True)
        return o, keys, values

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_more_steps_come_nearer() -> None:
    tensors, _ = inputs(60, size=16)
    exact, _ = naive_mesa(*tensors)
    errors = [(mesa(*tensors, steps=steps)[0] - exact).abs().max().item() for steps in (1, 4, 8, 30)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[3] < 1e-8


def test_bad_input_is_refused() -> None:
    tensors, _ = inputs(4)
    with pytest.raises(InputError, match=r"expected ridge \[H, K\] = \[3, 6\], got \[6\]"):
        mesa(*tensors[:5], tensors[5][0])
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        mesa(*tensors, steps=0)
