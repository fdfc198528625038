"""Complex vector attention against its definition, score by score."""

from __future__ import annotations

import cmath
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.mixers.softmax.attention import Attention
from contextlab.mixers.softmax.complex_attention import ComplexAttention, turned


def noisy(**options: Any) -> ComplexAttention:
    mixer = build_mixer("complex_attention", width=12, **options).double()
    assert isinstance(mixer, ComplexAttention)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return mixer


def by_definition(mixer: ComplexAttention, x: Tensor) -> Tensor:
    """The sum of |q| |k| cos(delta (theta_q - theta_k) + b + (m - n) g) over pairs, for every query and key alone."""
    pairs = mixer.head_dim // 2
    heads, groups = mixer.heads, mixer.kv_heads
    qkv = mixer.qkv_proj(x).unflatten(-1, (-1, mixer.head_dim))
    q, k, v = qkv.split((heads, groups, groups), 2)
    if mixer.q_norm is not None and mixer.k_norm is not None:
        q, k = mixer.q_norm(q), mixer.k_norm(k)
    delta, shift = mixer.delta.expand(groups, pairs), mixer.shift.expand(heads, pairs)
    rows = []
    for row in range(len(x)):
        for m in range(x.shape[1]):
            for head in range(heads):
                group = head * groups // heads
                scores = []
                for n in range(m + 1):
                    score = x.new_zeros(())
                    for i in range(pairs):
                        a, b = q[row, m, head, 2 * i : 2 * i + 2], k[row, n, group, 2 * i : 2 * i + 2]
                        meaning = torch.atan2(a[1], a[0]) - torch.atan2(b[1], b[0])
                        g = mixer.rope_base ** (-2 * i / mixer.head_dim) if mixer.position == "rope" else 0.0
                        angle = delta[group, i] * meaning + shift[head, i] + (m - n) * g
                        score = score + a.norm() * b.norm() * angle.cos()
                    scores.append(score / mixer.head_dim**0.5)
                rows.append(torch.stack(scores).softmax(0) @ v[row, : m + 1, group])
    return mixer.out_proj(torch.stack(rows).view(*x.shape[:2], -1))


@pytest.mark.parametrize(
    "options",
    [{"heads": 2}, {"heads": 3, "kv_heads": 1, "adapt": "head"}, {"heads": 2, "position": "none", "qk_norm": True}],
    ids=str,
)
def test_scores_by_their_definition(options: dict[str, Any]) -> None:
    mixer = noisy(**options)
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    wanted = [x, *mixer.parameters()]
    got, expected = mixer(x)[0], by_definition(mixer, x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    weight = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad((got * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("position", ["rope", "none"])
def test_training_starts_at_attention_with_rope(position: Any) -> None:
    mixer, plain = ComplexAttention(12, heads=2, position=position), Attention(12, heads=2, position=position)
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if k not in ("delta", "shift")})
    x = torch.randn(2, 9, 12)
    torch.testing.assert_close(mixer(x)[0], plain(x)[0], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        mixer.delta.mul_(1.5)
    assert not torch.allclose(mixer(x)[0], plain(x)[0], atol=1e-3)


def test_numbers_are_turned_as_complex_arithmetic_turns_them() -> None:
    x = torch.tensor([[[[-3.0, 4.0, 0.5, -0.25]]]], dtype=torch.float64)
    y = turned(x, torch.tensor([[0.5, 2.0]]).double(), torch.tensor([[0.0, 1.0]]).double()).view(2, 2)
    halved = cmath.sqrt(-3 + 4j) * 5**0.5  # half the angle, the same size
    squared = (0.5 - 0.25j) ** 2 / abs(0.5 - 0.25j) * cmath.exp(1j)  # twice the angle, and one radian more
    expected = torch.tensor([[halved.real, halved.imag], [squared.real, squared.imag]], dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e18])
def test_gradients_are_finite_where_there_is_no_angle(size: float) -> None:
    x = torch.full((1, 1, 2, 4), size, requires_grad=True)
    delta = torch.full((2, 2), 1.3, requires_grad=True)
    y = turned(x, delta, torch.ones(2, 2))
    torch.testing.assert_close(y.norm(), x.norm() if size > 1e-19 else torch.tensor(0.0))
    for gradient in torch.autograd.grad(y.sum(), (x, delta)):
        assert gradient.isfinite().all()


def test_half_precision_goes_through_float32() -> None:
    x = torch.randn(2, 3, 2, 6)
    delta, shift = torch.randn(2, 3), torch.randn(2, 3)
    half = x.bfloat16()
    expected = turned(half.float(), delta, shift).bfloat16()
    torch.testing.assert_close(turned(half, delta.bfloat16().float(), shift), turned(half, delta.bfloat16(), shift))
    torch.testing.assert_close(turned(half, delta, shift), expected, rtol=0, atol=0)


def test_odd_heads_are_refused() -> None:
    with pytest.raises(InputError, match="head_dim must be even.*got 3; the nearest that fits is 4"):
        build_mixer("complex_attention", width=12, heads=4)
