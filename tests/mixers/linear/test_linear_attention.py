"""What the laws do not say of the linear attention mixers: their formulas and their refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.mixers.linear.linear_attention import LightningAttention, LinearAttention, Retention


def heads(x: torch.Tensor, n: int) -> torch.Tensor:
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def test_normalised_linear_attention_is_a_weighted_mean() -> None:
    mixer, x = LinearAttention(8, 2).double(), torch.randn(2, 7, 8, dtype=torch.float64)
    q, k, v = (heads(part, 2) for part in mixer.in_proj(x).chunk(3, -1))
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    expected = (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(expected), rtol=1e-5, atol=1e-6)


def test_lightning_formula() -> None:
    mixer, x = LightningAttention(8, 2).double(), torch.randn(2, 7, 8, dtype=torch.float64)
    qkv, gate = mixer.in_proj(x).split((24, 8), -1)
    q, k, v = (heads(part, 2) for part in F.silu(qkv).chunk(3, -1))
    slopes = torch.tensor([2.0**-4, 2.0**-8], dtype=torch.float64)
    distance = (torch.arange(7)[:, None] - torch.arange(7)).double()
    decay = (-slopes[:, None, None] * distance).exp().tril()
    o = ((q @ k.mT) * decay / 2 @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(mixer.norm(o) * gate.sigmoid()))


def test_retention_depends_on_distances_only() -> None:
    """Left padding shifts every place by the same number; the rotation must not see it."""
    mixer, x = Retention(8, 2).double(), torch.randn(1, 7, 8, dtype=torch.float64)
    padded = torch.cat((torch.full((1, 5, 8), torch.nan, dtype=torch.float64), x), 1)
    mask = torch.arange(12)[None] >= 5
    y, _ = mixer(padded, None, mask)
    torch.testing.assert_close(y[:, 5:], mixer(x)[0])
    assert y.isfinite().all()


def test_state_keeps_float32_when_the_model_is_half() -> None:
    mixer = LightningAttention(8, 2, short_conv=4).bfloat16()
    _, state = mixer(torch.randn(2, 9, 8).bfloat16())
    assert state["matrix"].dtype == torch.float32
    assert state.nbytes == mixer.state_nbytes(9, 2, torch.bfloat16)


def test_no_state_when_none_is_wanted() -> None:
    for name in ("linear_attention", "lightning_attention", "retention"):
        assert build_mixer(name, width=8, heads=2)(torch.randn(1, 5, 8), keep_state=False)[1] is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear_attention", {"feature_map": "identity"}, "normalise must be false"),
        ("linear_attention", {"feature_map": "sillu"}, "did you mean 'silu'"),
        ("linear_attention", {"heads": 3}, "width 8 is not divisible by 3 heads"),
        ("lightning_attention", {"short_conv": -1}, "short_conv"),
        ("retention", {"heads": 8}, "RoPE"),
        ("retention", {"expand_v": 0}, "expand_v"),
    ],
)
def test_bad_options(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_mixer(name, width=8, **options)
