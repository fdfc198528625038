"""Rodimus token by token."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from contextlab.mixers import build_mixer


def test_agrees_with_the_recurrence() -> None:
    torch.manual_seed(0)
    mixer = build_mixer("rodimus", width=6, state_size=5, expand=2, short_conv=0, gate_rank=3).double()
    x = torch.randn(1, 30, 6, dtype=torch.float64)
    S, outputs = torch.zeros(5, 12, dtype=torch.float64), []
    for token in x[0]:
        up, gate = mixer.in_proj(token).chunk(2)
        u = up  # the activation is the convolution's
        q, k, g, tau = mixer.select_proj(u).chunk(4)
        g, tau = F.softplus(g), torch.sigmoid(tau)
        k = k / k.norm() * g**tau
        v = torch.sigmoid(mixer.gate_out(mixer.gate_in(up))) * up
        S = torch.exp(-g * tau)[:, None] * S + torch.outer(k, v)
        o = (S.T @ q * 5**-0.5 + u * mixer.residual) * F.silu(gate)
        outputs.append(mixer.out_proj(o / (o.square().mean() + 1e-5).sqrt() * mixer.norm_weight))
    torch.testing.assert_close(mixer(x)[0][0], torch.stack(outputs), rtol=0, atol=1e-9)
