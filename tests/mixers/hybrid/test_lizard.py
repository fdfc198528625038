"""Lizard's layer, written token by token, and its window as attention with a sink."""

from __future__ import annotations

import torch

from contextlab.mixers.hybrid.lizard import Lizard
from contextlab.mixers.softmax.attention import Attention
from contextlab.testing.readings import noisy


@torch.no_grad()
def test_it_is_a_gated_mean_of_features_and_a_window_with_meta_tokens():
    """2507.09025, section 3.1, each in float64 and of one query at a time."""
    mixer = noisy(Lizard(16, window=3, heads=4, kv_heads=2, meta_tokens=3)).double()
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    q, k, v = mixer.qkv_proj(x).unflatten(-1, (8, 4)).split((4, 2, 2), 2)
    k, v = (each.repeat_interleave(2, 2) for each in (k, v))
    gate = (x @ mixer.decay_proj.weight[0]).sigmoid()

    def features(each, weight):
        found = torch.einsum("hd,hde->he", each, weight)
        return torch.cat((found.softmax(-1), (-found).softmax(-1)), -1)

    y = torch.zeros(2, 8, 4, 4, dtype=torch.float64)
    for b in range(2):
        for t in range(8):
            phi = features(q[b, t], mixer.feature.q_weight)
            gated = [
                gate[b, s + 1 : t + 1].prod() * (phi * features(k[b, s], mixer.feature.k_weight)).sum(-1)
                for s in range(t + 1)
            ]
            far = torch.einsum("sh,shv->hv", torch.stack(gated), v[b, : t + 1]) / sum(gated)[:, None]
            first = max(0, t - 2)
            scores = torch.einsum("hd,shd->sh", q[b, t], k[b, first : t + 1]).exp() ** 0.5  # of heads of 4
            near = torch.einsum("sh,shv->hv", scores, v[b, first : t + 1])
            y[b, t] = far + mixer.alpha * near / (scores.sum(0) + mixer.meta.exp().sum())[:, None]
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(y.flatten(2)), rtol=0, atol=1e-8)


@torch.no_grad()
def test_without_meta_tokens_a_window_that_holds_the_text_adds_attention():
    mixer = noisy(Lizard(16, window=20, meta_tokens=0)).double()
    whole = Attention(16, position="none").double()
    whole.load_state_dict(mixer.state_dict(), strict=False)
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    before = mixer(x)[0]
    mixer.alpha += 1
    torch.testing.assert_close(mixer(x)[0] - before, whole(x)[0], rtol=0, atol=1e-12)
