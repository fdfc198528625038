"""RWKV-7's time mixing, token by token as the paper writes it (2503.14456)."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from contextlab.mixers import build_mixer


def test_agrees_with_the_papers_recurrence() -> None:
    torch.manual_seed(0)
    width, heads, size = 12, 3, 4
    mixer = build_mixer("rwkv7", width=width, heads=heads, decay_rank=3, gate_rank=5).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 40, width, dtype=torch.float64)
    W = dict(zip("rkv", mixer.in_proj.weight.chunk(3), strict=True))
    with torch.no_grad():
        for row in range(2):
            before, states = torch.zeros(width, dtype=torch.float64), torch.zeros(heads, size, size).double()
            for t in range(40):
                now = x[row, t]
                xr, xk, xv, xd, xa, xg = (now + (before - now) * mu for mu in mixer.shift)
                before = now
                r, k, v = W["r"] @ xr, W["k"] @ xk, W["v"] @ xv
                decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(mixer.decay_out(torch.tanh(mixer.decay_in(xd)))))
                a = torch.sigmoid(mixer.rate_out(mixer.rate_in(xa)))
                gate = mixer.gate_out(torch.sigmoid(mixer.gate_in(xg)))
                kappa, k = k * mixer.removal, k * (1 + (a - 1) * mixer.replacement)
                outputs = []
                for h in range(heads):
                    part = slice(h * size, (h + 1) * size)
                    hat = F.normalize(kappa[part], dim=0)
                    # The paper's state is the transpose, v k^T: S (diag(w) - k^ (a * k^)^T) + v k^T.
                    S = states[h].T
                    S = S @ (torch.diag(decay[part]) - torch.outer(hat, a[part] * hat)) + torch.outer(v[part], k[part])
                    states[h] = S.T
                    read = S @ r[part]
                    read = (read - read.mean()) / (read.var(unbiased=False) + 64e-5).sqrt()
                    read = read * mixer.norm_weight[part] + mixer.norm_bias[part]
                    outputs.append(read + (r[part] * k[part] * mixer.bonus[h]).sum() * v[part])
                expected = mixer.out_proj(torch.cat(outputs) * gate)
                torch.testing.assert_close(mixer(x[row : row + 1, : t + 1])[0][0, -1], expected, rtol=0, atol=1e-9)
