"""What the laws do not say of `window_linear`: its formula, and what it is within its window."""

from __future__ import annotations

import pytest
import torch

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.mixers.hybrid.window_linear import WindowLinear
from contextlab.ops import naive_window_linear_attention, rope
from contextlab.testing.readings import noisy


@torch.no_grad()
def test_features_are_of_rotated_queries_and_keys():
    mixer = noisy(WindowLinear(16, window=4, heads=2)).double()
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    q, k, v = mixer.qkv_proj(x).unflatten(-1, (3, 2, 8)).unbind(2)
    q, k = (rope(each, torch.arange(20)) for each in (q, k))

    def features(each, weight):
        found = torch.einsum("bthd,hde->bthe", each, weight)
        return torch.cat((found.softmax(-1), (-found).softmax(-1)), -1)

    fq, fk = features(q, mixer.feature.q_weight), features(k, mixer.feature.k_weight)
    y = naive_window_linear_attention(q, k, v, fq, fk, mixer.share.sigmoid(), 4)
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(y.flatten(2)), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_text_within_the_window_is_answered_by_attention():
    options = {"heads": 4, "kv_heads": 2, "qk_norm": True, "bias": True, "output_gate": True, "rope_base": 500.0}
    whole = noisy(build_mixer("attention", width=24, **options)).double()
    mixer = build_mixer("window_linear", width=24, window=30, **options).double()
    mixer.load_state_dict(whole.state_dict(), strict=False)
    x = torch.randn(2, 30, 24, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], whole(x)[0], rtol=0, atol=1e-12)
    longer = torch.cat((x, x), 1)
    assert not torch.allclose(mixer(longer)[0], whole(longer)[0])


def test_a_window_has_a_token():
    with pytest.raises(InputError, match="window"):
        build_mixer("window_linear", width=8, window=0)
