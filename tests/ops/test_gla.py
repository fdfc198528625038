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
