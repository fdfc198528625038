"""SUPRA's formula, written as a sum over pairs of tokens."""

from __future__ import annotations

import torch

from contextlab.mixers.linear.supra import Supra
from contextlab.ops import rope
from contextlab.testing.readings import noisy


@torch.no_grad()
def test_it_is_a_normed_sum_of_rotated_features_that_decay():
    mixer = noisy(Supra(12, heads=3, rope_base=100.0)).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    q, k, v = mixer.in_proj(x).unflatten(-1, (3, 3, 4)).unbind(2)
    q, k = (rope(each.relu(), torch.arange(9), 100.0) for each in (q, k))
    expected = torch.zeros_like(v)
    for t in range(9):
        for j in range(t + 1):
            gamma = 1 - 2.0 ** (-5 - torch.arange(3, dtype=torch.float64))
            weight = (q[:, t] * k[:, j]).sum(-1) * gamma ** (t - j) / 2
            expected[:, t] += weight[..., None] * v[:, j]
    group = torch.nn.GroupNorm(3, 12, eps=1e-6, dtype=torch.float64)
    group.weight.copy_(mixer.norm_weight)
    group.bias.copy_(mixer.norm_bias)
    normed = group(expected.flatten(0, 1).flatten(1)).unflatten(0, (2, 9))
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(normed), rtol=1e-6, atol=1e-7)
