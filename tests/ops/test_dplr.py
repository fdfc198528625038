"""RWKV-7's and Kimi's delta rules: chunked forms against the recurrences that define them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.ops import dplr_delta_rule, gated_delta_rule, gla, kda, naive_dplr_delta_rule, naive_kda

K, V = 6, 5


def inputs(
    length: int, seed: int = 0, strong: float = 1.0, batch: int = 2, heads: int = 3
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Those of dplr_delta_rule, those of kda, and a state."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(length, heads, K), F.normalize(draw(length, heads, K), dim=-1), draw(length, heads, V)
    rate = draw(length, heads, K).sigmoid()
    g = -strong * draw(length, heads, K).abs()
    return [q, k, v, -k, k * rate, g], [q, k, v, g, draw(length, heads).sigmoid()], draw(heads, K, V)


@given(st.integers(0, 100), st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 20.0]), st.sampled_from([2, 8, 32]))
def test_chunks_give_what_the_recurrences_give(length: int, seed: int, strong: float, chunk: int) -> None:
    general, kimi, state = inputs(length, seed, strong)
    for op, naive, given_ in ((dplr_delta_rule, naive_dplr_delta_rule, general), (kda, naive_kda, kimi)):
        o, last = op(*given_, None, state, True, chunk)
        if length == 0:
            assert o.shape == given_[2].shape
            torch.testing.assert_close(last, state)
            continue
        expected, expected_last = naive(*given_, None, state)
        torch.testing.assert_close(o, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(last, expected_last, rtol=0, atol=1e-9)


@pytest.mark.parametrize("strong", [0.1, 20.0])
def test_single_precision_holds_for_any_decay(strong: float) -> None:
    general, kimi, state = inputs(300, strong=strong)
    for op, given_ in ((dplr_delta_rule, general), (kda, kimi)):
        exact, _ = op(*given_, None, state)
        single, _ = op(*(x.float() for x in given_), None, state.float())
        assert (single.double() - exact).abs().max() < 1e-5 * exact.abs().max()
        half, last = op(*(x.bfloat16() for x in given_), None, None, True)
        assert half.dtype == torch.bfloat16
        assert last is not None
        assert last.dtype == torch.float32


@pytest.mark.parametrize("length", [1, 5, 9])
def test_gradients(length: int) -> None:
    general, kimi, state = inputs(length, batch=1, heads=1)
    for op, given_ in ((dplr_delta_rule, general), (kda, kimi)):
        tensors = [x.requires_grad_() for x in (*given_, state)]
        assert torch.autograd.gradcheck(lambda *x, op=op: op(*x[:-1], None, x[-1], True, 4), tensors, fast_mode=True)


def test_they_are_the_other_rules_where_these_are_special_cases() -> None:
    general, (q, k, v, g, beta), state = inputs(70)
    same = g[..., :1].expand_as(g)  # one decay for all channels: the gated delta rule
    expected, last = gated_delta_rule(q, k, v, same[..., 0], beta, None, state, True)
    found, found_last = kda(q, k, v, same, beta, None, state, True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(found_last, last, rtol=0, atol=1e-10)
    zero = torch.zeros_like(k)  # no correction: gated linear attention
    torch.testing.assert_close(
        dplr_delta_rule(*general[:3], zero, zero, g)[0], gla(*general[:3], g)[0], rtol=0, atol=1e-10
    )
    strength = beta.unsqueeze(-1)  # KDA in the general form
    general_form = dplr_delta_rule(q, k * strength, v, k * g.exp(), -k * strength, g)[0]
    torch.testing.assert_close(kda(q, k, v, g, beta)[0], general_form, rtol=0, atol=1e-10)


def test_memory_of_the_backward_is_linear_in_the_length() -> None:
    def held(length: int) -> int:
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        given_ = [x.requires_grad_() for x in inputs(length, batch=1)[1]]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kda(*given_)
        return kept

    assert held(512) < 2.1 * held(256)


def test_wrong_shapes_are_refused() -> None:
    general, kimi, _ = inputs(4)
    with pytest.raises(InputError, match=r"expected q, k, a, b, g \[B, T, H, K\] and v \[B, T, H, V\]"):
        dplr_delta_rule(*general[:3], general[3][:, :2], *general[4:])
    with pytest.raises(InputError, match=r"expected beta \[B, T, H\] = \[2, 4, 3\]"):
        kda(*kimi[:4], kimi[4].unsqueeze(-1))
    with pytest.raises(InputError, match="chunk_size must be a power of two, at least 2, got 24"):
        kda(*kimi, chunk_size=24)
