"""Mamba-3's layer against the recurrence from its own weights, on parity, and its refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.mixers.state_space.mamba3 import Mamba3
from contextlab.ops.mamba3 import naive_mamba3


def by_recurrence(mixer: Mamba3, x: Tensor) -> Tensor:
    """The layer as the authors' implementation lays it out, every head and token by the recurrence."""
    inner, heads = mixer.out_proj.in_features, mixer.heads
    wide = mixer.groups * mixer.key
    z, v, B, C, dt, A, mix, theta = (x @ mixer.in_proj.weight.T).split(
        [inner, inner, wide, wide, heads, heads, heads, mixer.angles], -1
    )

    def per_head(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = y.unflatten(-1, (mixer.groups, mixer.key))
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        return torch.stack([y[:, :, h * mixer.groups // heads] + bias[h] for h in range(heads)], 2)

    o, _ = naive_mamba3(
        v.unflatten(-1, (heads, -1)),
        (dt + mixer.dt_bias).exp().log1p(),
        torch.minimum(-A.exp().log1p(), torch.tensor(-1e-4)),
        per_head(B, mixer.B_norm.weight, mixer.B_bias),
        per_head(C, mixer.C_norm.weight, mixer.C_bias),
        1 / (1 + (-mix).exp()),
        math.pi * theta.tanh()[:, :, None].expand(-1, -1, heads, -1) if mixer.angles else None,
        mixer.D,
    )
    if mixer.norm_weight is not None:
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm_weight.unflatten(0, (heads, -1))
    return (o.flatten(2) * z * z.sigmoid()) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("length", [1, 150])
@pytest.mark.parametrize(
    "options",
    [
        {"state_size": 8},
        {"heads": 6, "groups": 2, "state_size": 5, "rope_fraction": 1.0, "output_norm": True},
        {"head_dim": 6, "groups": 4, "state_size": 4, "rope_fraction": 0.0},
    ],
)
def test_agrees_with_the_recurrence(options: dict[str, Any], length: int) -> None:
    mixer = Mamba3(12, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        x = torch.randn(2, length, 12, dtype=torch.float64)
        torch.testing.assert_close(mixer(x)[0], by_recurrence(mixer, x), rtol=1e-9, atol=1e-9)


def by_hand(rope_fraction: float) -> Mamba3:
    """Reads tokens (is first, is one, 1): the first is written, each one turns the state by pi."""
    mixer = Mamba3(3, heads=1, state_size=4, expand=1, rope_fraction=rope_fraction)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.zero_()
        mixer.B_bias.fill_(1)
        mixer.C_bias.fill_(1)
        mixer.dt_bias.fill_(math.log(math.e - 1))  # steps of 1
        z, v, *_, A, _, theta = mixer.in_proj.weight.split(mixer.sizes)
        z[:, 2] = 1
        v[:, 0] = 1
        A[:, 2] = -20  # the slowest decay
        theta[:, 1] = 20  # tanh 20 is 1
        mixer.out_proj.weight.copy_(torch.eye(3))
    return mixer


@pytest.mark.parametrize("rope_fraction", [1.0, 0.0])
def test_tracks_parity_by_turning(rope_fraction: float) -> None:
    bits = torch.randint(2, (4, 500), generator=torch.Generator().manual_seed(0))
    bits[:, 0] = 0
    first = F.one_hot(torch.zeros(4, dtype=torch.int64), 500)
    with torch.no_grad():
        y, _ = by_hand(rope_fraction)(torch.stack((first, bits, torch.ones_like(bits)), -1).float())
    odd = bits.cumsum(1) % 2 == 1
    assert y.abs().min() > 0.5
    said = y[..., 0] < 0
    assert torch.equal(said, odd) if rope_fraction else not said.any()


def test_sizes() -> None:
    mixer = Mamba3(16)
    assert (mixer.heads, mixer.value, mixer.key, mixer.angles) == (4, 8, 64, 16)
    assert (Mamba3(16, head_dim=4).heads, Mamba3(16, rope_fraction=1.0).angles) == (8, 32)
    assert mixer.state_nbytes(10**6) == 4 * 4 * (64 * 8 + 64 + 8 + 16)


@pytest.mark.parametrize("state_size", range(2, 40))
def test_the_least_rope_fraction_that_is_named_fits(state_size: int) -> None:
    with pytest.raises(InputError, match="has no pair to rotate; the least is") as refusal:
        build_mixer("mamba3", width=4, state_size=state_size, rope_fraction=0.01)
    least = float(str(refusal.value).rpartition(" ")[2])
    assert Mamba3(4, state_size=state_size, rope_fraction=least).angles == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "width 32 is not divisible by 5 heads"),
        ({"heads": 4, "head_dim": 4}, "head_dim 8 fits"),
        ({"heads": 4, "groups": 3}, "groups 3 does not divide heads 4"),
        ({"state_size": 1}, "rope_fraction 0.5 of state_size 1 has no pair to rotate; 0 turns none"),
        ({"rope_fraction": 1.5}, "rope_fraction"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_mixer("mamba3", width=16, **options)
