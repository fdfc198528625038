from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.ops.scan import linear_scan, naive_linear_scan, naive_selective_scan, selective_scan


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=50)
@given(
    length=st.integers(1, 150),
    shape=st.sampled_from([(), (3,), (2, 3)]),
    strength=st.sampled_from([0.0, 0.01, 1.0, 300.0]),
    state=st.booleans(),
    complex_=st.booleans(),
)
def test_agrees_with_the_recurrence_and_its_gradients(
    length: int, shape: tuple[int, ...], strength: float, state: bool, complex_: bool
) -> None:
    dtype = torch.complex128 if complex_ else torch.float64
    x = draw(2, length, *shape, seed=1, dtype=dtype).requires_grad_()
    g = -strength * draw(2, length, *shape, seed=2).abs()
    g = (torch.complex(g, draw(2, length, *shape, seed=3)) if complex_ else g).requires_grad_()
    h0 = draw(2, *shape, seed=4, dtype=dtype).requires_grad_() if state else None
    wanted = [t for t in (x, g, h0) if t is not None]
    got, truth = linear_scan(x, g, h0), naive_linear_scan(x, g, h0)
    weights = [draw(*t.shape, seed=5 + i, dtype=dtype) for i, t in enumerate(truth)]
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)

    def gradients(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        loss = sum((y * w).real.sum() if complex_ else (y * w).sum() for y, w in zip(outputs, weights, strict=True))
        return torch.autograd.grad(loss, wanted)

    for a, b in zip(gradients(got), gradients(truth), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_gradients_of_any_order_and_maps() -> None:
    x, g, h0 = draw(2, 7, 2), -draw(2, 7, 2, seed=1).abs(), draw(2, 2, seed=2)
    wanted = [t.requires_grad_() for t in (x, g, h0)]
    assert torch.autograd.gradcheck(lambda *t: linear_scan(*t)[0], wanted)
    assert torch.autograd.gradgradcheck(lambda *t: linear_scan(*t)[0], wanted)
    xs, gs = draw(3, 2, 7, 2), -draw(3, 2, 7, 2, seed=1).abs()
    loss = lambda x, g: linear_scan(x, g)[0].square().sum()  # noqa: E731
    together = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(xs, gs)
    for i in range(3):
        for a, b in zip(together, torch.func.grad(loss, argnums=(0, 1))(xs[i], gs[i]), strict=True):
            torch.testing.assert_close(a[i], b)


def test_inputs_stay_as_they_are() -> None:
    x, g = draw(1, 64, 1), -draw(1, 64, 1, seed=1).abs()
    before = x.clone(), g.clone()
    linear_scan(x, g)
    assert torch.equal(x, before[0])
    assert torch.equal(g, before[1])


def test_float32_over_a_long_sequence() -> None:
    x, g = draw(1, 5000, 8), -0.01 * draw(1, 5000, 8, seed=1).abs()
    single = linear_scan(x.float(), g.float())[0]
    truth = naive_linear_scan(x, g)[0]
    torch.testing.assert_close(single.double(), truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item())


def mamba_inputs(length: int) -> list[Tensor]:
    """x, dt, A, B, C, D of 5 channels with states of 3."""
    x, dt = draw(2, length, 5), F.softplus(draw(2, length, 5, seed=1))
    return [x, dt, -draw(5, 3, seed=2).exp(), draw(2, length, 3, seed=3), draw(2, length, 3, seed=4), draw(5, seed=5)]


@settings(deadline=None, max_examples=25)
@given(length=st.integers(1, 70), block=st.sampled_from([8, 64]), state=st.booleans())
def test_selective_scan_agrees_with_the_recurrence(length: int, block: int, state: bool) -> None:
    inputs = [t.requires_grad_() for t in mamba_inputs(length)]
    h0 = draw(2, 5, 3, seed=6).requires_grad_() if state else None
    wanted = inputs + ([h0] if h0 is not None else [])
    y, last = selective_scan(*inputs, h0, True, block)
    expected, expected_last = naive_selective_scan(*inputs, h0)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(last, expected_last, rtol=1e-9, atol=1e-10)
    weight = draw(*y.shape, seed=7)
    got = torch.autograd.grad((y * weight).sum() + last.square().sum(), wanted)
    truth = torch.autograd.grad((expected * weight).sum() + expected_last.square().sum(), wanted)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_selective_scans_are_mapped_where_blocks_are_computed_again() -> None:
    """The hooks by which a block's states are made again in the backward pass do not go through vmap."""
    drawn = [draw(2, 1, 9, 3, seed=i) for i in range(4)]
    inputs = [x.requires_grad_() for x in (drawn[0], drawn[1].exp(), -draw(2, 3, 3, seed=5).exp(), *drawn[2:])]

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return selective_scan(x, dt, A, B, C, block=4)[0]

    mapped = torch.vmap(scan)(*inputs)
    alone = torch.stack([scan(*(x[i] for x in inputs)) for i in range(2)])
    torch.testing.assert_close(mapped, alone, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(y.square().sum(), inputs) for y in (mapped, alone))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="one shape"):
        linear_scan(draw(1, 3, 2), draw(1, 3, 1))
    with pytest.raises(InputError, match="expected x, dt"):
        selective_scan(*mamba_inputs(3)[:4], draw(2, 4, 3))
    with pytest.raises(InputError, match="block"):
        selective_scan(*mamba_inputs(3), block=0)
