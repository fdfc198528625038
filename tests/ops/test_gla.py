from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.gla import gla, naive_gla, naive_rwkv6, rwkv6


def inputs(length: int, strength: float = 1.0, seed: int = 0) -> list[Tensor]:
    """q, k, v, g, u in float64; `strength` of the decay."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    q, k, g = (draw(2, length, 3, 4) for _ in range(3))
    return [q, k, draw(2, length, 3, 5), -strength * g.abs(), draw(3, 4)]


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(1, 100),
    strength=st.sampled_from([0.01, 1.0, 50.0]),
    chunk=st.sampled_from([2, 16, 32]),
    bonus=st.booleans(),
    state=st.booleans(),
)
def test_agrees_with_the_recurrence_and_its_gradients(
    length: int, strength: float, chunk: int, bonus: bool, state: bool
) -> None:
    *qkvg, u = inputs(length, strength)
    start = torch.randn(2, 3, 4, 5, dtype=torch.float64) if state else None
    leaves = [*qkvg, *([u] if bonus else []), *([start] if start is not None else [])]
    wanted = [x.requires_grad_() for x in leaves]
    op, naive = (rwkv6, naive_rwkv6) if bonus else (gla, naive_gla)
    main = (*qkvg, u) if bonus else qkvg
    o, last = op(*main, initial_state=start, output_final_state=True, chunk_size=chunk)
    expected, expected_last = naive(*main, initial_state=start)
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(last, expected_last, rtol=1e-9, atol=1e-10)
    weight = torch.randn_like(o)
    got = torch.autograd.grad((o * weight).sum() + last.square().sum(), wanted)
    truth = torch.autograd.grad((expected * weight).sum() + expected_last.square().sum(), wanted)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("strength", [0.001, 1.0, 100.0])
def test_float32_is_accurate_for_any_decay(strength: float) -> None:
    q, k, v, g, u = inputs(600, strength)
    for op, extra in ((gla, ()), (rwkv6, (u,))):
        truth = op(q, k, v, g, *extra)[0]
        single = op(*(x.float() for x in (q, k, v, g, *extra)))[0].double()
        assert (single - truth).abs().max() < 1e-4 * truth.abs().max()


def test_gradcheck() -> None:
    q, k, v, g, u = (x[..., :2].contiguous().requires_grad_() for x in inputs(5))
    assert torch.autograd.gradcheck(lambda *x: gla(*x, chunk_size=4)[0], (q, k, v, g), fast_mode=True)
    assert torch.autograd.gradcheck(lambda *x: rwkv6(*x, chunk_size=4)[0], (q, k, v, g, u), fast_mode=True)


def test_bad_input() -> None:
    q, k, v, g, _ = inputs(3)
    with pytest.raises(InputError, match="q, k and g"):
        gla(q, k, v, g[..., :2])
    with pytest.raises(InputError, match="power of two"):
        gla(q, k, v, g, chunk_size=12)


@pytest.mark.parametrize("bonus", [False, True])
def test_second_derivatives(bonus: bool) -> None:
    q, k, v, g, u = (x[:1, :, :1, :2].contiguous() if x.ndim == 4 else x[:1, :2] for x in inputs(5))
    given = [x.requires_grad_() for x in (q, k, v, g, *([u] if bonus else []), torch.randn(1, 1, 2, 2).double())]

    def both(*x: Tensor) -> tuple[Tensor, ...]:
        o, last = (rwkv6 if bonus else gla)(*x[:-1], initial_state=x[-1], output_final_state=True, chunk_size=4)
        assert last is not None
        return o, last

    assert torch.autograd.gradgradcheck(both, given, fast_mode=True)


def test_many_functions_at_once() -> None:
    """vmap over grad, and twice grad: how many seeds train as one program."""
    q, k, v, g, u = inputs(40)
    u = torch.stack((u, 2 * u))
    given = [x.unsqueeze(1) for x in (q, k, v, g)]

    def loss(q: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor) -> Tensor:
        return rwkv6(q, k, v, g, u, chunk_size=16)[0].square().sum()

    def of_first(*x: Tensor) -> Tensor:
        return torch.func.grad(loss)(*x).square().sum()

    for function, arguments in ((loss, (1, 3, 4)), (of_first, (3, 4))):
        slope = torch.func.grad(function, argnums=arguments)
        together = torch.func.vmap(slope)(*given, u)
        for i in range(2):
            for a, b in zip(together, slope(*(x[i] for x in given), u[i]), strict=True):
                torch.testing.assert_close(a[i], b)
    torch.testing.assert_close(torch.func.vmap(lambda *x: gla(*x)[0])(*given).squeeze(1), gla(q, k, v, g)[0])
