from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from contextlab.errors import InputError
from contextlab.ops.delta import delta_rule, delta_rule_flops, gated_delta_rule, naive_gated_delta_rule
from contextlab.ops.triangular import unit_lower_inverse


def inputs(length: int, strength: float, strongest: float = 1.0, size: int = 4, heads: int = 2) -> list[Tensor]:
    """q, k, v, g, beta in float64; `strength` of the decay, beta up to `strongest`."""
    q, k = (F.normalize(torch.randn(2, length, heads, size, dtype=torch.float64), dim=-1) for _ in range(2))
    v = torch.randn(2, length, heads, size + 1, dtype=torch.float64)
    g, beta = (torch.rand(2, length, heads, dtype=torch.float64) for _ in range(2))
    return [q, k, v, -strength * g, strongest * beta]


@settings(deadline=None, max_examples=50)
@given(
    length=st.integers(1, 100),
    chunk=st.sampled_from([4, 16, 64]),
    gated=st.booleans(),
    state=st.booleans(),
    final=st.booleans(),
    strength=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_agrees_with_the_recurrence_and_its_gradients(
    length: int, chunk: int, gated: bool, state: bool, final: bool, strength: float
) -> None:
    q, k, v, g, beta = inputs(length, strength, 2.0)
    decay = g if gated else None
    S = torch.randn(2, 2, 4, 5, dtype=torch.float64) if state else None
    wanted = [x.requires_grad_() for x in (q, k, v, decay, beta, S) if x is not None]
    o, last = gated_delta_rule(q, k, v, decay, beta, None, S, final, chunk)
    expected, expected_last = naive_gated_delta_rule(q, k, v, decay, beta, None, S)
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-10)
    weight, weight_last = torch.randn_like(o), torch.randn_like(expected_last)
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
    got = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    truth = torch.autograd.grad(expected_loss, wanted, allow_unused=True, materialize_grads=True)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_gradcheck() -> None:
    q, k, v, g, beta = inputs(9, 1.0, size=2)
    wanted = [x.requires_grad_() for x in (q, k, v, g, beta, torch.randn(2, 2, 2, 3, dtype=torch.float64))]
    assert torch.autograd.gradcheck(
        lambda q, k, v, g, beta, S: gated_delta_rule(q, k, v, g, beta, None, S, True, 4),
        wanted,
        fast_mode=True,
    )


@pytest.mark.parametrize("strongest", [1.0, 2.0])
@pytest.mark.parametrize("strength", [0.0, 0.01, 1.0, 50.0])
def test_float32_is_close_to_float64(strength: float, strongest: float) -> None:
    exact = inputs(500, strength, strongest, size=32)
    expected = naive_gated_delta_rule(*exact)[0]
    got = gated_delta_rule(*(x.float() for x in exact))[0]
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_one_key_written_again_and_again_stays_stable() -> None:
    """The inverse's worst case, equal keys at full strength: the state must hold the last value."""
    k = F.normalize(torch.ones(1, 256, 1, 8), dim=-1)
    v = torch.randn(1, 256, 1, 8)
    o, _ = delta_rule(k, k, v, torch.ones(1, 256, 1), scale=1.0)
    torch.testing.assert_close(o, v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 64, 100])
def test_inverse(size: int) -> None:
    A = torch.randn(3, size, size, dtype=torch.float64) / size
    whole = A.tril(-1) + torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(unit_lower_inverse(A) @ whole, torch.eye(size).double().expand(3, -1, -1))


def test_agrees_with_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    given = [x.float() for x in inputs(150, 0.5, size=16)]
    expected, state = modeling.torch_chunk_gated_delta_rule(*given, output_final_state=True)
    o, last = gated_delta_rule(*given, output_final_state=True)
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-5)


def test_many_functions_at_once() -> None:
    """vmap over grad: how many seeds train as one program."""
    q, k, v, g, beta = (x.unsqueeze(1) for x in inputs(39, 1.0))

    def loss(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return gated_delta_rule(q, k, v, g, beta, chunk_size=13)[0].square().sum()  # no multiple of the functions

    together = torch.func.vmap(torch.func.grad(loss, argnums=(1, 3)))(q, k, v, g, beta)
    for i in range(2):
        alone = torch.func.grad(loss, argnums=(1, 3))(q[i], k[i], v[i], g[i], beta[i])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b)


def test_gradients_of_many_outputs_at_once() -> None:
    """jacrev maps the gradients alone; without a decay two sequences share one mask."""
    q, k, v, _, beta = inputs(5, 1.0, size=2, heads=1)
    found = torch.func.jacrev(lambda k: delta_rule(q, k, v, beta, chunk_size=3)[0])(k)
    expected = torch.autograd.functional.jacobian(lambda k: naive_gated_delta_rule(q, k, v, None, beta)[0], k)
    torch.testing.assert_close(found, expected)


def test_of_no_sequences_nothing_comes() -> None:
    given = [x[:0].requires_grad_() for x in inputs(40, 1.0)]
    o, last = gated_delta_rule(*given, output_final_state=True)
    (o.sum() + last.sum()).backward()
    assert (o.shape, last.shape) == ((0, 40, 2, 5), (0, 2, 4, 5))
    assert [x.grad.shape for x in given] == [x.shape for x in given]


class Products(TorchDispatchMode):
    """Counts multiply-adds x 2 of batched matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm_):
            a, b = args[-2:]
            self.flops += 2 * a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("length", "size"), [(20, 16), (64, 16), (100, 48)])
def test_flops_are_those_of_its_products(length: int, size: int) -> None:
    given = [x.float() for x in inputs(length, 1.0, size=size, heads=1)]
    with Products() as counted:
        gated_delta_rule(*given)
    chunk = {20: 20, 64: 16, 100: 25}[length]
    inverse = -(-length // chunk) * chunk * (chunk * chunk // 3)
    assert counted.flops == 2 * (delta_rule_flops(length, 1, size, size + 1) - inverse)


def test_bad_input() -> None:
    q, k, v, g, beta = inputs(3, 1.0)
    with pytest.raises(InputError, match="beta"):
        gated_delta_rule(q, k, v, g, beta[:, :2])
    with pytest.raises(InputError, match="chunk_size"):
        gated_delta_rule(q, k, v, g, beta, chunk_size=0)
