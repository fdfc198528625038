"""The matrices by which mixers mix tokens, against the papers' formulas written as matrices."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from contextlab import registry
from contextlab.mixers import build_mixer
from contextlab.ops import rope
from contextlab.testing.readings import noisy

T = 11


def made(name, **options):
    return noisy(build_mixer(name, width=12, heads=2, **options)).double(), torch.randn(2, T, 12, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"kv_heads": 1, "window": 4}])
def test_attention_mixes_by_its_softmax(options):
    mixer, x = made("sliding_window" if options else "attention", **options)
    q, k, v = mixer.qkv_proj(x).unflatten(-1, (-1, 6)).split((2, mixer.kv_heads, mixer.kv_heads), 2)
    q, k = (rope(each, torch.arange(T)) for each in (q, k))
    k, v = (each.expand(-1, -1, 2, -1) for each in (k, v))
    sees = torch.ones(T, T).tril() * (torch.ones(T, T).triu(1 - options["window"]) if options else 1)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * 6**-0.5
    expected = scores.masked_fill(sees == 0, float("-inf")).softmax(-1)
    found = mixer.mixing(x)
    torch.testing.assert_close(found, expected)
    y = torch.einsum("bhts,bshd->bthd", found, v).flatten(2)
    torch.testing.assert_close(mixer.out_proj(y), mixer(x)[0])


@torch.no_grad()
@pytest.mark.parametrize(("normalise", "mean"), [(True, False), (False, False), (False, True)])
def test_linear_attention_mixes_by_its_features(normalise, mean):
    mixer, x = made("linear_attention", feature_map="relu", normalise=normalise, mean=mean)
    q, k, v = mixer.in_proj(x).unflatten(-1, (3, 2, 6)).unbind(2)
    expected = torch.einsum("bthd,bshd->bhts", q.relu(), k.relu()).tril()
    expected = expected / (expected.sum(-1, keepdim=True) + 1e-6) if normalise else expected * 6**-0.5
    if mean:  # over the tokens before
        expected = expected / torch.arange(T).clamp_min(1)[:, None]
    found = mixer.mixing(x)
    torch.testing.assert_close(found, expected)
    y = torch.einsum("bhts,bshd->bthd", found, v).flatten(2)
    torch.testing.assert_close(mixer.out_proj(y), mixer(x)[0])


@torch.no_grad()
def test_mamba2_mixes_by_a_semiseparable_matrix():
    mixer, x = made("mamba2", groups=2, state_size=3, short_conv=0)
    _, xBC, dt = mixer.in_proj(x).split((24, 36, 2), -1)
    _, B, C = F.silu(xBC).split((24, 6, 6), -1)
    dt = F.softplus(dt + mixer.dt_bias)
    sums = (dt * -mixer.A_log.exp()).cumsum(1).transpose(1, 2)
    decays = (sums[..., :, None] - sums[..., None, :]).exp().tril()
    products = torch.einsum("bthn,bshn->bhts", C.unflatten(-1, (2, 3)), B.unflatten(-1, (2, 3)))
    expected = products * decays * dt.transpose(1, 2)[..., None, :] + torch.diag_embed(mixer.D[:, None].expand(2, T))
    torch.testing.assert_close(mixer.mixing(x), expected)


@torch.no_grad()
def test_within_its_window_the_hybrid_mixes_as_attention_does():
    mixer, x = made("window_linear", window=T)
    whole = build_mixer("attention", width=12, heads=2).double()
    whole.load_state_dict(mixer.state_dict(), strict=False)
    torch.testing.assert_close(mixer.mixing(x), whole.mixing(x))


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), [("lizard", {"window": 4}), ("lawcat", {"short_conv": 0})])
def test_gated_features_mix_values_linearly(name, options):
    """Rows of LAWCAT sum to one, those of Lizard to one and what its window leaves to the values."""
    mixer, x = made(name, **options)
    found, v = mixer.mixing(x), mixer.qkv_proj(x).unflatten(-1, (3, 2, 6))[:, :, 2]
    y = torch.einsum("bhts,bshd->bthd", found, v).flatten(2)
    torch.testing.assert_close(mixer.out_proj(y), mixer(x)[0])
    assert torch.equal(found, found.tril())
    sums = found.sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums)) == (name == "lawcat")


def test_those_that_tell_are_of_every_linear_family():
    told = {each.name for each in registry.entries("mixer") if each.factory.tells_mixing}
    assert len(told) >= 40
    assert {"attention", "gla", "gated_delta_net", "kda", "rwkv7", "mamba2", "mlstm", "titans", "mesa_net"} <= told
