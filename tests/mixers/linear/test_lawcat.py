"""LAWCAT's layer, written token by token."""

from __future__ import annotations

import torch

from contextlab.mixers.linear.lawcat import Lawcat
from contextlab.testing.readings import noisy


@torch.no_grad()
def test_it_is_a_gated_mean_of_convolved_features():
    """2509.18467: a causal convolution, features, decays by channel, and a division by the sum of the weights."""
    mixer = noisy(Lawcat(16, heads=4, kv_heads=2, gate_rank=3, short_conv=3)).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    projected = mixer.qkv_proj(x)[0]
    taps = mixer.conv.weight
    rows = [sum(taps[:, 2 - d] * projected[t - d] for d in range(min(3, t + 1))) for t in range(9)]
    q, k, v = torch.stack(rows).unflatten(-1, (8, 4)).split((4, 2, 2), 1)
    k, v = (each.repeat_interleave(2, 1) for each in (k, v))
    low = x[0] @ mixer.decay_in.weight.T
    decay = (low @ mixer.decay_out.weight.T + mixer.decay_out.bias).sigmoid() ** (1 / 16)
    decay = decay.unflatten(-1, (2, 8)).repeat_interleave(2, 1)

    def features(each, weight):
        found = torch.einsum("hd,hde->he", each, weight)
        return torch.cat((found.softmax(-1), (-found).softmax(-1)), -1)

    memory, total, answers = 0.0, 0.0, []
    for t in range(9):
        phi = features(k[t], mixer.feature.k_weight)
        memory = decay[t][..., None] * memory + phi[..., None] * v[t][:, None]
        total = decay[t] * total + phi
        asked = features(q[t], mixer.feature.q_weight)
        answers.append(torch.einsum("hf,hfv->hv", asked, memory) / (asked * total).sum(-1, keepdim=True))
    expected = mixer.out_proj(torch.stack(answers).flatten(1))
    torch.testing.assert_close(mixer(x)[0][0], expected, rtol=0, atol=1e-8)
