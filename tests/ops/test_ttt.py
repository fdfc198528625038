"""TTT's dual form against models that really take the steps, with gradients by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contextlab.ops.ttt import InnerNorm, naive_ttt, ttt_linear, ttt_mlp

S, D, M = 6, 4, 7


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def case(hidden: bool) -> tuple[list[Tensor], list[Tensor], InnerNorm]:
    """q, k, v, rate for [2, 3] heads; the weights; the norm."""
    torch.manual_seed(0)
    tensors = [draw(2, 3, S, D) for _ in range(3)] + [torch.rand(2, 3, S, S, dtype=torch.float64).tril() * 0.3]
    shapes = [(D, M), (1, M), (M, D), (1, D)] if hidden else [(D, D), (1, D)]
    return tensors, [0.5 * draw(2, 3, *shape) for shape in shapes], InnerNorm(1 + 0.3 * draw(3, D), 0.3 * draw(3, D))


def run(tensors: list[Tensor], weights: list[Tensor], norm: InnerNorm) -> list[Tensor]:
    """The answers and the weights after, in the naive order."""
    if len(weights) == 2:
        return list(ttt_linear(*tensors, *weights, norm))
    W1, b1, W2, b2 = weights
    o, (V1, V2), (c1, c2) = ttt_mlp(*tensors, (W1, W2), (b1, b2), norm)
    return [o, V1, c1, V2, c2]


@pytest.mark.parametrize("hidden", [False, True])
def test_the_dual_form_takes_the_steps(hidden: bool) -> None:
    tensors, weights, norm = case(hidden)
    found = run(tensors, weights, norm)
    for b in range(2):
        for h in range(3):
            one = [x[b, h] for x in tensors]
            o, after = naive_ttt(*one, [w[b, h] for w in weights], InnerNorm(norm.gain[h], norm.bias[h]))
            for mine, theirs in zip(found, [o, *after], strict=True):
                torch.testing.assert_close(mine[b, h], theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("hidden", [False, True])
def test_gradients(hidden: bool) -> None:
    tensors, weights, norm = case(hidden)
    small = [x[:1, :1, :3, :3] if i == 3 else x[:1, :1, :3] for i, x in enumerate(tensors)]
    leaves = [x.clone().requires_grad_() for x in (*small, *(w[:1, :1] for w in weights), norm.gain[:1], norm.bias[:1])]
    assert torch.autograd.gradcheck(lambda *x: tuple(run(list(x[:4]), list(x[4:-2]), InnerNorm(*x[-2:]))), leaves)
