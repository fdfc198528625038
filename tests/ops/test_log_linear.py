"""Log-linear attention: the Fenwick tree, and chunks against pairs."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from contextlab.mixers import build_mixer
from contextlab.mixers.base import state_growth
from contextlab.ops.log_linear import (
    fenwick_levels,
    log_linear_chunk,
    log_linear_chunks,
    naive_log_linear_attention,
)


def test_levels_part_the_past_as_binary_digits_do() -> None:
    levels = fenwick_levels(14)
    # 13 = 8 + 4 + 1: the token itself, one token, four tokens, eight tokens.
    assert levels[13].tolist() == [4] * 8 + [3] * 4 + [1] + [0]
    assert levels[8, :9].tolist() == [4] * 8 + [0]
    for t in range(14):
        for level in range(1, 5):
            assert (levels[t, :t] == level).sum() == (2 ** (level - 1) if t >> (level - 1) & 1 else 0)


def inputs(length: int) -> list[Tensor]:
    """q, k, v, g, weights."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, length, 3, *shape, generator=generator, dtype=torch.float64)

    return [draw(4), draw(4), draw(5), F.logsigmoid(draw()), draw(6).sigmoid()]


def test_a_chunk_is_the_sum_over_pairs() -> None:
    tensors = inputs(16)
    o, state, decayed = log_linear_chunk(*tensors)
    torch.testing.assert_close(o, naive_log_linear_attention(*tensors), rtol=0, atol=1e-10)
    _, k, v, g, _ = tensors
    S = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    for t in range(16):
        S = g[:, t].exp()[..., None, None] * S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
    torch.testing.assert_close(state, S, rtol=0, atol=1e-10)
    torch.testing.assert_close(decayed[:, -1], g.sum(1).exp())


@given(first=st.integers(0, 7), more=st.integers(1, 9), partial=st.booleans(), reset=st.booleans())
@settings(max_examples=25, deadline=None)
def test_many_chunks_at_once_are_the_sum_over_pairs_wherever_they_are_cut(first, more, partial, reset) -> None:
    """In two calls of whole chunks of 2 tokens; the last may be left out of the states. With a hard reset."""
    count = first + more
    tensors = inputs(2 * count)
    if reset:
        tensors[3][:, ::5] = -math.inf
    chunks = [x.unflatten(1, (count, 2)) for x in tensors]
    digits = count.bit_length()
    matrices = torch.zeros(2, digits, 3, 4, 5, dtype=torch.float64)
    found = []
    if first:
        o, matrices = log_linear_chunks(*(x[:, :first] for x in chunks), matrices, 0, first)
        found.append(o)
    o, after = log_linear_chunks(*(x[:, first:] for x in chunks), matrices, first, more - partial)
    expected = naive_log_linear_attention(*tensors)
    torch.testing.assert_close(torch.cat([*found, o], 1).flatten(1, 2), expected, rtol=0, atol=1e-10)
    _, k, v, g, _ = tensors
    held = count - partial
    for j in range(digits):  # the state of each digit by its recurrence
        S = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
        if held >> j & 1:
            begin = (held >> j + 1) << j + 1
            for t in range(2 * begin, 2 * held):
                write = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2) if t < 2 * (begin + (1 << j)) else 0.0
                S = g[:, t].exp()[..., None, None] * S + write
        torch.testing.assert_close(after[:, j], S, rtol=0, atol=1e-10)


def test_gradients_of_many_chunks() -> None:
    leaves = [x[:1, :6, :1].unflatten(1, (3, 2)).clone().requires_grad_() for x in inputs(6)]
    matrices = torch.randn(1, 2, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *given: log_linear_chunks(*given, 1, 2), [*leaves, matrices])


def test_gradients() -> None:
    leaves = [x[:1, :4, :1].clone().requires_grad_() for x in inputs(4)]
    assert torch.autograd.gradcheck(log_linear_chunk, leaves)


def test_the_mixer_weighs_every_pair_by_its_level() -> None:
    torch.manual_seed(0)
    heads, size, levels = 2, 4, 8
    mixer = build_mixer("log_linear_attention", width=8, heads=heads, chunk=4, levels=levels).double()
    x = torch.randn(1, 45, 8, dtype=torch.float64)
    qkv, gate, decay, weights = mixer.in_proj(x).split((24, 8, heads, heads * levels), -1)
    q, k, v = qkv.unflatten(-1, (3, heads, size)).unbind(2)
    weights = F.softplus(mixer.level_scale * weights.unflatten(-1, (heads, levels)))
    o = naive_log_linear_attention(q * size**-0.5, k, v, F.logsigmoid(decay + mixer.decay_bias), weights)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
    expected = mixer.out_proj(o.flatten(2) * F.silu(gate))
    torch.testing.assert_close(mixer(x)[0], expected, rtol=0, atol=1e-6)


def test_the_state_grows_with_the_logarithm() -> None:
    mixer = build_mixer("log_linear_attention", width=8, heads=2, chunk=4)
    assert state_growth(mixer) == "logarithmic"
    matrix = 2 * 4 * 4 * 4
    assert mixer.state_nbytes(63) - mixer.state_nbytes(31) == matrix
    assert mixer.state_nbytes(63) == mixer.state_nbytes(60)
