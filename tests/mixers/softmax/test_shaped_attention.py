"""Shaped attention against alpha I + beta A - gamma C, matrix by matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.mixers.softmax.attention import Attention
from contextlab.mixers.softmax.shaped_attention import ResidualLinear, ShapedAttention
from contextlab.ops.position import rope


def noisy(**options: Any) -> ShapedAttention:
    mixer = build_mixer("shaped_attention", width=12, **options).double()
    assert isinstance(mixer, ShapedAttention)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return mixer


def projected(layer: Any, x: Tensor) -> Tensor:
    if layer is None:
        return x
    if isinstance(layer, ResidualLinear):
        return x @ (layer.skip_gain * torch.eye(12).double() + layer.gain * layer.linear.weight).T
    return x @ layer.weight.T


def by_definition(mixer: ShapedAttention, x: Tensor) -> Tensor:
    """Each head's [T, T] matrix written out, on each sequence alone."""
    length, size = x.shape[1], mixer.head_dim
    places = torch.arange(length)
    sees = places[:, None] >= places
    uniform = sees.double() / (places[:, None] + 1)
    q, k = (x @ half.T for half in mixer.qkv_proj.weight.chunk(2))
    value = projected(mixer.values, x)
    q, k, value = (t.unflatten(-1, (-1, size)) for t in (q, k, value))
    if mixer.position == "rope":
        q, k = rope(q, places, mixer.rope_base), rope(k, places, mixer.rope_base)
    rows = []
    for row in range(len(x)):
        heads = []
        for head in range(mixer.heads):
            scores = q[row, :, head] @ k[row, :, head].T / size**0.5
            attention = scores.masked_fill(~sees, float("-inf")).softmax(-1)
            alpha, beta, gamma = mixer.gains[:, head, 0]
            shaped = alpha * torch.eye(length).double() + beta * attention - gamma * uniform
            heads.append(shaped @ value[row, :, head])
        rows.append(torch.cat(heads, -1))
    return projected(getattr(mixer, "out_proj", None), torch.stack(rows))


@pytest.mark.parametrize(
    "options",
    [{}, {"heads": 2, "projection": "residual"}, {"heads": 3, "projection": "linear", "position": "none"}],
    ids=str,
)
def test_shaped_matrices_by_their_definition(options: dict[str, Any]) -> None:
    mixer = noisy(**{"heads": 6, **options})
    x = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    wanted = [x, *mixer.parameters()]
    got, expected = mixer(x)[0], by_definition(mixer, x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    weight = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad((got * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("projection", ["identity", "residual"])
@pytest.mark.parametrize("position", ["rope", "none"])
def test_training_starts_at_the_identity(projection: str, position: str) -> None:
    mixer = build_mixer("shaped_attention", width=12, heads=2, projection=projection, position=position).double()
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], x, rtol=0, atol=1e-12)
    _, state = mixer(x[:, :7])
    torch.testing.assert_close(mixer(x[:, 7:], state)[0], x[:, 7:], rtol=0, atol=1e-12)


def test_it_leaves_the_identity_when_trained() -> None:
    mixer, x = build_mixer("shaped_attention", width=12, heads=3), torch.randn(1, 6, 12)
    assert isinstance(mixer, ShapedAttention)
    mixer(x)[0].square().sum().backward()
    queries, keys = mixer.qkv_proj.weight.grad.chunk(2)
    assert queries.abs().max() > 0  # zero queries are no saddle: their gradient is not zero,
    assert not keys.any()  # though that of the keys is
    assert mixer.gains.grad.all()


def test_the_mean_is_attention_with_zero_scores() -> None:
    mixer = ShapedAttention(12, heads=2, projection="linear", position="none").double()
    plain = Attention(12, heads=2, position="none").double()
    with torch.no_grad():
        mixer.gains.copy_(torch.tensor([0.0, 0.0, -1.0])[:, None, None].expand(3, 2, 1))
        plain.qkv_proj.weight[:24] = 0
        plain.qkv_proj.weight[24:] = mixer.values.weight
        plain.out_proj.weight.copy_(mixer.out_proj.weight)
    x = torch.randn(3, 8, 12, dtype=torch.float64)
    mask = torch.arange(8) >= torch.tensor([[0], [3], [7]])
    expected = plain(x, None, mask)[0]
    torch.testing.assert_close(mixer(x, None, mask)[0][mask], expected[mask], rtol=0, atol=1e-12)
    _, state = mixer(x[:, :5], None, mask[:, :5])
    later = mixer(x[:, 5:], state, mask[:, 5:])[0]
    torch.testing.assert_close(later[mask[:, 5:]], expected[:, 5:][mask[:, 5:]], rtol=0, atol=1e-12)


def test_long_sums_of_half_precisions_keep_their_digits() -> None:
    mixer = ShapedAttention(8, heads=2).bfloat16()
    x = torch.ones(1, 3000, 8, dtype=torch.bfloat16)  # a sum in bfloat16 stops at 256
    with torch.no_grad():
        mixer.gains.copy_(torch.tensor([0.0, 0.0, -1.0])[:, None, None].expand(3, 2, 1))
        y, state = mixer(x)
        torch.testing.assert_close(y, x, rtol=0, atol=0)
        torch.testing.assert_close(mixer(x[:, :1], state)[0], x[:, :1], rtol=0, atol=0)
    assert y.dtype == torch.bfloat16


def test_parameters_and_flops_of_each_projection() -> None:
    attention = 4 * 12 * (10 * 11 // 2)
    for projection, matrices, extra in (("identity", 2, 0), ("residual", 4, 4), ("linear", 4, 0)):
        mixer = ShapedAttention(12, heads=3, projection=projection)  # type: ignore[arg-type]
        assert sum(p.numel() for p in mixer.parameters()) == matrices * 144 + 3 * 3 + extra
        assert mixer.flops(10) == 2 * 10 * matrices * 144 + attention


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="width 12 is not divisible by 5 heads; the nearest that divides it is 4"):
        build_mixer("shaped_attention", width=12, heads=5)
    with pytest.raises(InputError, match="RoPE rotates pairs of dimensions, but width 12 / 4 heads is 3"):
        build_mixer("shaped_attention", width=12, heads=4)
    with pytest.raises(InputError, match="projection"):
        build_mixer("shaped_attention", width=12, projection="none")
