"""Mamba-3's op against its recurrence, a complex-valued one, Mamba-2's, and an integral."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.linear import ssd
from contextlab.ops.mamba3 import Mamba3State, mamba3, naive_mamba3

H, N, P = 3, 6, 4


def inputs(length: int, angles: int = 2, strength: float = 1.0, shared: bool = False, seed: int = 0) -> list[Tensor]:
    """x, dt, A, B, C, mix, theta in float64; `strength` of the decay, `shared` angles for all heads."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(2, length, *shape, dtype=torch.float64, generator=generator)  # noqa: E731
    x, dt, A, B, C, mix = draw(H, P), draw(H).abs(), -strength * draw(H).abs(), draw(H, N), draw(H, N), draw(H)
    return [x, dt, A, B, C, mix.sigmoid(), 3 * draw(1 if shared else H, angles)]


def start(angles: int) -> Mamba3State:
    draw = lambda *shape: torch.randn(2, H, *shape, dtype=torch.float64)  # noqa: E731
    return Mamba3State(draw(N, P), draw(N), draw(P), draw(angles) if angles else None)


@settings(deadline=None, max_examples=50)
@given(
    length=st.integers(1, 100),
    angles=st.integers(0, N // 2),
    strength=st.sampled_from([0.0, 0.01, 1.0, 50.0]),
    chunk=st.sampled_from([2, 16, 32]),
    shared=st.booleans(),
    skip=st.booleans(),
    handed=st.booleans(),
)
def test_agrees_with_the_recurrence_and_its_gradients(
    length: int, angles: int, strength: float, chunk: int, shared: bool, skip: bool, handed: bool
) -> None:
    *main, theta = inputs(length, angles, strength, shared)
    state = start(angles) if handed else None
    D = torch.randn(H, dtype=torch.float64) if skip else None
    leaves = [*main, *([theta] if angles else []), *([D] if D is not None else []), *(state or ())]
    wanted = [leaf.requires_grad_() for leaf in leaves if leaf is not None]
    given_theta = theta if angles else None
    y, last = mamba3(*main, given_theta, D, state, True, chunk)
    expected, after = naive_mamba3(*main, given_theta, D, state)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    assert last is not None
    assert (last.angle is None) == (after.angle is None) == (not angles)
    for got, due in zip(last[:3], after[:3], strict=True):
        torch.testing.assert_close(got, due, rtol=1e-9, atol=1e-10)
    weights = [torch.randn_like(part) for part in (y, *after[:3])]

    def gradients(*parts: Tensor) -> tuple[Tensor, ...]:
        total = torch.stack([(part * weight).sum() for part, weight in zip(parts, weights, strict=True)]).sum()
        return torch.autograd.grad(total, wanted, materialize_grads=True)

    for a, b in zip(gradients(y, *last[:3]), gradients(expected, *after[:3]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_is_a_complex_state_that_decays_and_turns() -> None:
    """Pairs of B and C as complex numbers, a state that turns by exp(-i theta dt): no cumulated angle anywhere."""
    x, dt, A, B, C, mix, theta = inputs(70, angles=N // 2)
    b, c = (torch.view_as_complex(each.unflatten(-1, (-1, 2)).contiguous()) for each in (B, C))
    S = torch.zeros(2, H, N // 2, P, dtype=torch.complex128)
    written = torch.zeros_like(S)
    ys = []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None, None]
        turn = torch.exp(step * torch.complex(A[:, t, :, None], -theta[:, t])[..., None])
        now = b[:, t, :, :, None] * x[:, t, :, None, :]
        share = mix[:, t, :, None, None]
        S = turn * (S + (1 - share) * step * written) + share * step * now
        ys.append((c[:, t, :, :, None].conj() * S).real.sum(-2))
        written = now
    got, _ = mamba3(x, dt, A, B, C, mix, theta)
    torch.testing.assert_close(got, torch.stack(ys, 1), rtol=1e-9, atol=1e-10)


def test_without_the_trapezoid_and_the_angles_it_is_mamba2() -> None:
    x, dt, _, B, C, mix, _ = inputs(150)
    A, D = -torch.rand(H, dtype=torch.float64), torch.randn(H, dtype=torch.float64)
    got, state = mamba3(x, dt, A.expand_as(dt), B, C, torch.ones_like(mix), None, D, None, True)
    expected, matrix = ssd(x, dt, A, B, C, D, None, True)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert state is not None
    torch.testing.assert_close(state.matrix, matrix, rtol=1e-10, atol=1e-10)


def test_the_trapezoid_is_of_second_order() -> None:
    """On h' = -h + cos(s), steps 4 times smaller make the error of lambda = 1/2 16 times smaller, of 1 only 4 times."""

    def error(mix: float, steps: int) -> float:
        at = torch.arange(steps + 1, dtype=torch.float64) * (2 / steps)
        ones = torch.ones(1, steps + 1, 1, dtype=torch.float64)
        dt = ones * (2 / steps)
        dt[:, 0] = 0  # the first token is the input at s = 0, where h = 0
        y, _ = mamba3(at.cos().view(1, -1, 1, 1), dt, -ones, ones[..., None], ones[..., None], ones * mix)
        return abs(y[0, -1].item() - (math.cos(2) + math.sin(2) - math.exp(-2)) / 2)

    assert 15 < error(0.5, 20) / error(0.5, 80) < 17
    assert 3.5 < error(1.0, 20) / error(1.0, 80) < 4.5


def test_a_turn_by_pi_flips_the_sign() -> None:
    """One write, then bits: each 1 turns the state by pi, so that what is read has the sign of the parity."""
    bits = torch.randint(2, (1, 300), generator=torch.Generator().manual_seed(1))
    bits[:, 0] = 0
    ones = torch.ones(1, 300, 1, dtype=torch.float64)
    x = torch.zeros(1, 300, 1, 1, dtype=torch.float64)
    x[:, 0] = 1
    key = ones[..., None].expand(-1, -1, -1, 2)
    theta = math.pi * bits[..., None, None].double()
    y, _ = mamba3(x, ones, 0 * ones, key, key, ones, theta)
    torch.testing.assert_close(y[0, :, 0, 0], 2.0 * (1 - 2 * (bits[0].cumsum(0) % 2)).double())


@pytest.mark.parametrize("pieces", [1, 50])
def test_angles_in_float32_stay_true_over_long_texts(pieces: int) -> None:
    """2^18 tokens of about half a radian each: read at once and in pieces, against float64."""
    length = 2**18
    theta = 0.5 + 0.1 * torch.rand(1, length, 1, 1)
    unit = torch.ones(1, length, 1)
    state = None
    for part in theta.chunk(pieces, 1):
        some = unit[:, : part.shape[1]]
        key = some[..., None].expand(-1, -1, -1, 2)
        _, state = mamba3(some[..., None], some, -some, key, key, some, part, None, state, True)
    assert state is not None
    assert state.angle is not None
    assert state.angle.dtype == torch.float32
    off = (state.angle.double() - theta.double().sum()).item()
    assert abs(math.remainder(off, 2 * math.pi)) < 1e-5


@pytest.mark.parametrize("strength", [0.001, 1.0, 100.0])
def test_float32_is_accurate_for_any_decay(strength: float) -> None:
    full = inputs(600, strength=strength)
    truth = mamba3(*full)[0]
    single = mamba3(*(part.float() for part in full))[0].double()
    assert (single - truth).abs().max() < 1e-4 * truth.abs().max()


def test_half_precision_keeps_its_dtype_and_a_float32_memory() -> None:
    full = inputs(80)
    y, state = mamba3(*(part.bfloat16() for part in full), output_final_state=True)
    assert state is not None
    assert state.angle is not None
    assert y.dtype == state.key.dtype == state.value.dtype == torch.bfloat16
    assert state.matrix.dtype == state.angle.dtype == torch.float32


def test_gradcheck() -> None:
    leaves = [part[..., :2].contiguous().requires_grad_() for part in inputs(5, angles=1)]
    leaves = [leaf if leaf.ndim == 3 else leaf[:, :, :2].detach().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda *parts: mamba3(*parts, chunk_size=2)[0], leaves, fast_mode=True)


def test_bad_shapes() -> None:
    x, dt, A, B, C, mix, theta = inputs(4, angles=4)
    with pytest.raises(InputError, match="4 angles do not fit 6 dimensions; at most 3 do"):
        mamba3(x, dt, A, B, C, mix, theta)
    with pytest.raises(InputError, match=r"got \[2, 4, 3, 4\], \[2, 4, 2, 6\], \[2, 4, 3, 6\]"):
        mamba3(x, dt, A, B[:, :, :2], C, mix)
    with pytest.raises(InputError, match="T at least 1"):
        mamba3(*(part[:, :0] for part in (x, dt, A, B, C, mix)))
