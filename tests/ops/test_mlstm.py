from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.ops.mlstm import mlstm, naive_mlstm


def inputs(length: int, gates: float = 1.0, seed: int = 0) -> list[Tensor]:
    """q, k, v, i, f in float64; `gates` is the spread of the gates."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(2, length, 3, *shape, dtype=torch.float64, generator=generator)  # noqa: E731
    return [draw(4), draw(4), draw(5), gates * draw(), gates * draw() + 2]


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 150),
    gates=st.sampled_from([0.1, 3.0, 20.0]),
    state=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_recurrence_and_its_gradients(length: int, gates: float, state: bool, seed: int) -> None:
    given_ = inputs(length, gates, seed)
    start = None
    if state:
        start = (torch.randn(2, 3, 4, 6, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64))
    wanted = [x.requires_grad_() for x in (*given_, *(start or ()))]
    h, last = mlstm(*given_, initial_state=start, output_final_state=True, chunk_size=16)
    expected, expected_last = naive_mlstm(*given_, initial_state=start)
    assert last is not None
    pairs = ((h, expected), (last[0], expected_last[0]), (last[1], expected_last[1]))
    weights = [torch.randn_like(b) for _, b in pairs]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    got = torch.autograd.grad(sum((a * w).sum() for (a, _), w in zip(pairs, weights, strict=True)), wanted)
    truth = torch.autograd.grad(sum((b * w).sum() for (_, b), w in zip(pairs, weights, strict=True)), wanted)
    for a, b in zip(got, truth, strict=True):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8 * scale)


def test_agrees_with_transformers() -> None:
    xlstm = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    q, k, v, i, f = inputs(21, 2.0)
    start = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    m = torch.randn(2, 3, 1, dtype=torch.float64)
    step, states = xlstm.mlstm_recurrent_step_native, (*start, m)
    expected = []
    for t in range(21):
        h, states = step(
            q[:, t], k[:, t], v[:, t], i[:, t, :, None], f[:, t, :, None], *states, dtype_state=torch.float64
        )
        expected.append(h)
    ours, last = mlstm(
        q, k, v, i, f, None, (torch.cat((start[0], start[1].unsqueeze(-1)), -1), m.squeeze(-1)), output_final_state=True
    )
    torch.testing.assert_close(ours, torch.stack(expected, 1), rtol=1e-9, atol=1e-10)
    assert last is not None
    torch.testing.assert_close(last[0], torch.cat((states[0], states[1].unsqueeze(-1)), -1), rtol=1e-9, atol=1e-10)


def test_the_running_maximum_cancels() -> None:
    """The undivided recurrence in float64, with gates that float32 could not hold undivided."""
    q, k, v, i, f = inputs(30, 1.0)
    i = i + 60
    C, n, expected = torch.zeros(2, 3, 4, 5, dtype=torch.float64), torch.zeros(2, 3, 4, dtype=torch.float64), []
    for t in range(30):
        keep, write = f[:, t].sigmoid()[..., None], i[:, t].exp()[..., None]
        C, n = (
            keep[..., None] * C + write[..., None] * k[:, t, :, :, None] * v[:, t, :, None],
            keep * n + write * k[:, t],
        )
        read = torch.einsum("bhkv,bhk->bhv", C, q[:, t] / 2), torch.einsum("bhk,bhk->bh", n, q[:, t] / 2)
        expected.append(read[0] / read[1].abs().clamp(min=1).unsqueeze(-1))
    truth = torch.stack(expected, 1)
    torch.testing.assert_close(mlstm(q, k, v, i, f)[0], truth, rtol=1e-3, atol=1e-4)  # EPS is ours alone
    single = mlstm(*(x.float() for x in (q, k, v, i, f)))[0]
    assert single.isfinite().all()
    assert F.mse_loss(single.double(), truth).sqrt() < 1e-2 * truth.abs().max()


def test_gradcheck() -> None:
    wanted = [x.requires_grad_() for x in inputs(7)]
    assert torch.autograd.gradcheck(lambda *x: mlstm(*x, chunk_size=4)[0], wanted, fast_mode=True)


def test_bad_gates() -> None:
    q, k, v, i, f = inputs(3)
    with pytest.raises(InputError, match="i and f"):
        mlstm(q, k, v, i[..., :2], f)
