"""What the laws do not say of the delta-rule mixers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.mixers.delta.delta_net import DeltaNet, GatedDeltaNet
from contextlab.ops.delta import naive_gated_delta_rule


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("negative", [False, True])
def test_formula(gated: bool, negative: bool) -> None:
    make = GatedDeltaNet if gated else DeltaNet
    mixer = make(8, 2, short_conv=0, allow_neg_eigval=negative).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    projected = mixer.in_proj(x)
    q, k, v = (F.silu(part).unflatten(-1, (2, 4)) for part in projected[..., :24].chunk(3, -1))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    beta = torch.sigmoid(projected[..., 24:26]) * (2 if negative else 1)
    g = None
    if isinstance(mixer, GatedDeltaNet):
        g = -mixer.A_log.exp() * F.softplus(projected[..., 34:] + mixer.dt_bias)
    o = mixer.norm(naive_gated_delta_rule(q, k, v, g, beta)[0]).flatten(2)
    o = o * F.silu(projected[..., 26:34]) if gated else o
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(o))


def test_initial_decays_are_the_papers() -> None:
    mixer = GatedDeltaNet(64, 16)
    dt, A = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert (dt > 0.9e-3).all()
    assert (dt < 0.11).all()
    assert (A >= 1).all()
    assert (A <= 16).all()


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net"])
def test_refusals_and_no_state(name: str) -> None:
    with pytest.raises(InputError, match="width 8 is not divisible by 3 heads; the nearest"):
        build_mixer(name, width=8, heads=3)
    assert build_mixer(name, width=8, heads=3, head_dim=4)(torch.randn(1, 5, 8), keep_state=False)[1] is None
