"""FANformer's attention against its formula, token by token and score by score."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.mixers.softmax.fan_attention import FanAttention


def noisy(**options: Any) -> FanAttention:
    torch.manual_seed(0)
    mixer = build_mixer("fan_attention", width=12, **options).double()
    assert isinstance(mixer, FanAttention)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def by_definition(mixer: FanAttention, x: Tensor, waves: int, turn: float) -> Tensor:
    """Every token's waves, then softmax attention query by query; turn: base of RoPE, 0 for none."""
    phase = torch.zeros(waves).double() if mixer.fan_phase is None else mixer.fan_phase
    offset = 0.0 if mixer.fan_bias is None else mixer.fan_bias
    d, heads, groups = mixer.head_dim, mixer.heads, mixer.kv_heads
    rows = []
    for sequence in x:
        q, k, v = [], [], []
        for n, token in enumerate(sequence):
            linear = mixer.fan_proj.weight @ token
            periodic = linear[:waves] + phase
            features = torch.cat([periodic.cos(), periodic.sin(), linear[waves:] + offset])
            parts = (mixer.qkv_proj.weight @ features).view(-1, d)
            if turn:
                rate = turn ** (-torch.arange(0, d, 2).double() / d) * n
                a, b = parts[: heads + groups, 0::2], parts[: heads + groups, 1::2]
                turned = torch.stack((a * rate.cos() - b * rate.sin(), a * rate.sin() + b * rate.cos()), -1).flatten(-2)
                parts = torch.cat([turned, parts[heads + groups :]])
            for into, part in zip((q, k, v), parts.split((heads, groups, groups)), strict=True):
                into.append(part)
            shared = [h * groups // heads for h in range(heads)]
            out = [
                torch.stack([q[n][h] @ key[g] / math.sqrt(d) for key in k]).softmax(0) @ torch.stack(v)[:, g]
                for h, g in enumerate(shared)
            ]
            rows.append(mixer.out_proj.weight @ torch.cat(out))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize(
    ("options", "waves"),
    [
        ({"heads": 3, "position": "none"}, 3),
        ({"heads": 2, "share": 0.4, "rope_base": 50.0}, 4),
        ({"kv_heads": 1, "heads": 2, "share": 0.5, "position": "none", "phase": True}, 6),
    ],
    ids=str,
)
def test_the_formula(options: dict[str, Any], waves: int) -> None:
    mixer = noisy(**options)
    x = torch.randn(2, 6, 12, dtype=torch.float64, requires_grad=True)
    wanted = [x, *mixer.parameters()]
    got = mixer(x)[0]
    expected = by_definition(mixer, x, waves, options.get("rope_base", 0.0))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    weight = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad((got * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_waves_repeat_and_the_rest_does_not() -> None:
    mixer = noisy(share=0.25, heads=2)
    x = torch.randn(1, 4, 12, dtype=torch.float64)
    with torch.no_grad():
        mixer.fan_proj.weight.copy_(torch.eye(12)[:9])
        step = torch.zeros(12).double()
        step[:3] = 2 * math.pi * torch.tensor([1.0, -2.0, 3.0]).double()
        torch.testing.assert_close(mixer(x + step)[0], mixer(x)[0], rtol=0, atol=1e-10)
        assert not torch.allclose(mixer(x + step.roll(3))[0], mixer(x)[0], atol=1e-3)


def test_a_share_without_a_cosine_is_refused() -> None:
    with pytest.raises(InputError, match=r"share 0.05 of width 12 is less than one cosine; .* is 0.0833333"):
        build_mixer("fan_attention", width=12, heads=2, share=0.05)
    assert build_mixer("fan_attention", width=12, heads=2, share=0.0833333)
