from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops import linear
from contextlab.ops.linear import naive_simple_gla, simple_gla, ssd


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(1, 150),
    heads=st.sampled_from([(2, 2), (1, 4), (2, 4)]),
    chunk=st.sampled_from([4, 16, 64]),
    decays=st.tuples(st.booleans(), st.booleans()),
    state=st.booleans(),
    final=st.booleans(),
    strength=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_agrees_with_the_recurrence_and_its_gradients(
    length: int,
    heads: tuple[int, int],
    chunk: int,
    decays: tuple[bool, bool],
    state: bool,
    final: bool,
    strength: float,
) -> None:
    groups, H = heads
    q, k, v = draw(2, length, groups, 3), draw(2, length, groups, 3), draw(2, length, H, 5)
    g = -strength * torch.rand(2, length, H, dtype=torch.float64) if decays[0] else None
    gamma = -torch.rand(H, dtype=torch.float64) if decays[1] else None
    S = draw(2, H, 3, 5) if state else None
    inputs = [x.requires_grad_() for x in (q, k, v, g, gamma, S) if x is not None]
    o, last = simple_gla(q, k, v, g, gamma, None, S, final, chunk)
    expected, expected_last = naive_simple_gla(q, k, v, g, gamma, None, S)
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-10)
    weight, weight_last = draw(*o.shape), draw(*expected_last.shape)
    loss, expected_loss = (o * weight).sum(), (expected * weight).sum()
    if final:
        assert last is not None
        torch.testing.assert_close(last, expected_last, rtol=1e-9, atol=1e-10)
        loss, expected_loss = (
            loss + (last * weight_last).sum(),
            expected_loss + (expected_last * weight_last).sum(),
        )
    else:
        assert last is None
    got = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    truth = torch.autograd.grad(expected_loss, inputs, allow_unused=True, materialize_grads=True)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_gradcheck() -> None:
    q, k, v, S = draw(1, 9, 1, 2), draw(1, 9, 1, 2), draw(1, 9, 2, 3), draw(1, 2, 2, 3)
    g = -torch.rand(1, 9, 2, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, g, S)]
    assert torch.autograd.gradcheck(lambda q, k, v, g, S: simple_gla(q, k, v, g, None, None, S, True, 4), inputs)


@pytest.mark.parametrize("strength", [1e-3, 0.1, 5.0, 100.0])
def test_float32_is_close_to_float64(strength: float) -> None:
    q, k, v = (draw(1, 300, 2, 16) for _ in range(3))
    g = -strength * torch.rand(1, 300, 2, dtype=torch.float64)
    expected = naive_simple_gla(q, k, v, g)[0]
    got = simple_gla(q.float(), k.float(), v.float(), g.float())[0]
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    assert simple_gla(q.bfloat16(), k.bfloat16(), v.bfloat16(), g, output_final_state=True)[1].dtype == torch.float32


def test_ssd_agrees_with_its_recurrence() -> None:
    x, dt, A, B, C, D = (
        draw(2, 130, 4, 3),
        torch.rand(2, 130, 4).double(),
        -torch.arange(1.0, 5),
        *(draw(2, 130, 2, 5) for _ in range(2)),
        draw(4),
    )
    A = A.double()
    S, ys = torch.zeros(2, 4, 5, 3, dtype=torch.float64), []
    for t in range(130):
        Bt, Ct = (M[:, t].repeat_interleave(2, 1) for M in (B, C))
        S = (dt[:, t] * A).exp()[..., None, None] * S
        S = S + (dt[:, t, :, None] * Bt)[..., None] * x[:, t, :, None]
        ys.append(torch.einsum("bhnp,bhn->bhp", S, Ct) + D[:, None] * x[:, t])
    y, last = ssd(x, dt, A, B, C, D, output_final_state=True)
    torch.testing.assert_close(y, torch.stack(ys, 1))
    torch.testing.assert_close(last, S)


def test_ssd_agrees_with_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    x, dt, A = draw(2, 150, 4, 8, dtype=torch.float32), torch.rand(2, 150, 4) * 0.2, -torch.arange(1.0, 5)
    B, C, D = draw(2, 150, 2, 6).float(), draw(2, 150, 2, 6).float(), torch.ones(4)
    expected, state = modeling.mamba2_chunk_scan(x, dt, A, B, C, 32, D=D, return_final_states=True)
    y, last = ssd(x, dt, A, B, C, D, output_final_state=True)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, state.mT, rtol=1e-4, atol=1e-4)


def test_decays_of_the_papers() -> None:
    torch.testing.assert_close(linear.retention_decay(2).exp(), torch.tensor([1 - 1 / 32, 1 - 1 / 64]))
    torch.testing.assert_close(linear.lightning_decay(8)[:2], torch.tensor([-0.5, -0.25]))
    assert linear.lightning_decay(8, layer=1, layers=2)[0] == -0.25


@pytest.mark.parametrize("name", ["linear_attention", "retention", "lightning_attention"])
def test_named_forms(name: str) -> None:
    q, k, v = (draw(1, 20, 2, 4) for _ in range(3))
    gamma = {
        "linear_attention": torch.zeros(2),
        "retention": linear.retention_decay(2),
        "lightning_attention": linear.lightning_decay(2),
    }[name]
    expected = naive_simple_gla(q, k, v, None, gamma.double())[0]
    torch.testing.assert_close(getattr(linear, name)(q, k, v)[0], expected, rtol=1e-6, atol=1e-6)


def test_empty_sequence_leaves_the_state() -> None:
    S = draw(2, 2, 3, 5)
    o, last = simple_gla(draw(2, 0, 2, 3), draw(2, 0, 2, 3), draw(2, 0, 2, 5), None, None, None, S, True)
    assert o.shape == (2, 0, 2, 5)
    assert torch.equal(last, S)


def test_many_functions_at_once() -> None:
    """vmap over grad: how many seeds train as one program."""
    q, k, v = (draw(3, 1, 70, 2, 4) for _ in range(3))
    g = -torch.rand(3, 1, 70, 2, dtype=torch.float64)

    def loss(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return simple_gla(q, k, v, g, chunk_size=16)[0].square().sum()

    together = torch.func.vmap(torch.func.grad(loss, argnums=(0, 3)))(q, k, v, g)
    for i in range(3):
        alone = torch.func.grad(loss, argnums=(0, 3))(q[i], k[i], v[i], g[i])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b)


def test_gradients_of_many_outputs_at_once() -> None:
    """jacrev maps the gradients alone; of a constant decay two sequences share one mask."""
    q, k, v, gamma = draw(2, 5, 1, 2), draw(2, 5, 1, 2), draw(2, 5, 1, 3), torch.tensor([-0.3], dtype=torch.float64)
    found = torch.func.jacrev(lambda k, gamma: simple_gla(q, k, v, None, gamma, chunk_size=3)[0], (0, 1))(k, gamma)
    expected = torch.autograd.functional.jacobian(
        lambda k, gamma: naive_simple_gla(q, k, v, None, gamma)[0], (k, gamma)
    )
    torch.testing.assert_close(found, expected)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="not a multiple"):
        simple_gla(draw(1, 3, 2, 4), draw(1, 3, 2, 4), draw(1, 3, 3, 4))
    with pytest.raises(InputError, match="expected q, k"):
        simple_gla(draw(1, 3, 2, 4), draw(1, 4, 2, 4), draw(1, 3, 2, 4))
    with pytest.raises(InputError, match="chunk_size"):
        simple_gla(*(draw(1, 3, 2, 4) for _ in range(3)), chunk_size=0)
