from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from contextlab import registry
from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.mixers.encoder.attention import EncoderAttention
from contextlab.mixers.encoder.base import left_aligned
from contextlab.mixers.encoder.fnet import FNet
from contextlab.mixers.encoder.linformer import Linformer
from contextlab.mixers.encoder.merged import MergedAttention, merge_alike
from contextlab.mixers.encoder.performer import Performer
from contextlab.mixers.encoder.ponet import PoNet


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def heads(x: Tensor, count: int) -> Tensor:
    """[B, T, H, d]"""
    return x.unflatten(-1, (count, -1))


# Attention


@torch.no_grad()
def test_attention_agrees_with_bert() -> None:
    bert = pytest.importorskip("transformers.models.bert.modeling_bert")
    config = pytest.importorskip("transformers").BertConfig(
        hidden_size=12, num_attention_heads=3, attn_implementation="eager", attention_probs_dropout_prob=0.0
    )
    theirs = bert.BertSelfAttention(config).double().eval()
    ours = EncoderAttention(12, heads=3, position="none", bias=True).double()
    ours.qkv_proj.weight.copy_(torch.cat([getattr(theirs, name).weight for name in ("query", "key", "value")]))
    ours.qkv_proj.bias.copy_(torch.cat([getattr(theirs, name).bias for name in ("query", "key", "value")]))
    torch.nn.init.eye_(ours.out_proj.weight)
    torch.nn.init.zeros_(ours.out_proj.bias)
    x, mask = draw(2, 7, 12), torch.arange(7) >= torch.tensor([[3], [0]])
    hidden = torch.zeros(2, 1, 1, 7, dtype=torch.float64).masked_fill(~mask[:, None, None], -1e30)
    torch.testing.assert_close(ours(x, None, mask)[0][mask], theirs(x, hidden)[0][mask])


@torch.no_grad()
def test_rope_and_alibi_tell_the_order_and_none_does_not() -> None:
    x, shuffle = draw(1, 8, 12), torch.tensor([3, 0, 6, 1, 7, 5, 2, 4])
    for position, blind in (("none", True), ("rope", False), ("alibi", False)):
        mixer = EncoderAttention(12, heads=3, position=position).double()  # type: ignore[arg-type]
        same = torch.allclose(mixer(x[:, shuffle])[0], mixer(x)[0][:, shuffle], atol=1e-10)
        assert same == blind


# Linformer


@pytest.mark.parametrize("sharing", ["none", "headwise", "key_value"])
@torch.no_grad()
def test_linformer_by_its_definition(sharing: Literal["none", "headwise", "key_value"]) -> None:
    mixer = Linformer(12, max_length=9, projected=4, heads=3, sharing=sharing).double()
    x = draw(2, 7, 12)
    q, k, v = (heads(part, 3) for part in (x @ mixer.in_proj.weight.T).chunk(3, -1))
    out = torch.zeros(2, 7, 3, 4, dtype=torch.float64)
    for h in range(3):
        E = mixer.sums[0, h % mixer.sums.shape[1], :, :7]
        F_ = mixer.sums[-1, h % mixer.sums.shape[1], :, :7]
        for b in range(2):
            P = (q[b, :, h] @ (E @ k[b, :, h]).T / math.sqrt(4)).softmax(-1)
            out[b, :, h] = P @ (F_ @ v[b, :, h])
    torch.testing.assert_close(mixer(x)[0], out.flatten(2) @ mixer.out_proj.weight.T)
    assert mixer.sums.shape == {"none": (2, 3, 4, 9), "headwise": (2, 1, 4, 9), "key_value": (1, 1, 4, 9)}[sharing]


def test_linformer_counts_real_tokens_against_its_length() -> None:
    mixer, x = Linformer(8, max_length=5, projected=3).double(), draw(2, 9, 8)
    with pytest.raises(InputError, match="a sequence of 9 tokens does not fit max_length 5"):
        mixer(x)
    with pytest.raises(InputError, match="a sequence of 6 tokens does not fit max_length 5"):
        mixer(x, None, torch.arange(9) >= torch.tensor([[3], [5]]))
    mask = torch.arange(9) >= torch.tensor([[4], [6]])
    y = mixer(x, None, mask)[0]
    torch.testing.assert_close(y[:1, 4:], mixer(x[:1, 4:])[0])
    torch.testing.assert_close(y[1:, 6:], mixer(x[1:, 6:])[0])


# FNet


@torch.no_grad()
def test_fnet_agrees_with_transformers() -> None:
    fnet = pytest.importorskip("transformers.models.fnet.modeling_fnet")
    config = pytest.importorskip("transformers").FNetConfig(hidden_size=12, use_tpu_fourier_optimizations=False)
    x = draw(2, 7, 12)
    torch.testing.assert_close(FNet(12, normalise=False)(x)[0], fnet.FNetBasicFourierTransform(config)(x)[0])


@pytest.mark.parametrize("length", [1, 2, 37])
def test_fnet_by_its_matrices(length: int) -> None:
    def transform(n: int) -> Tensor:
        angles = -2 * math.pi * torch.outer(torch.arange(n), torch.arange(n)).double() / n
        return torch.complex(angles.cos(), angles.sin())

    x = draw(2, length, 12)
    expected = (transform(length) @ x.to(torch.complex128) @ transform(12)).real
    torch.testing.assert_close(FNet(12, normalise=False)(x)[0], expected)
    torch.testing.assert_close(FNet(12)(x)[0], expected / math.sqrt(12 * length))


def test_fnet_of_padded_rows_is_exact_in_float32_at_length() -> None:
    x = torch.randn(2, 3000, 4)
    mask = torch.arange(3000) >= torch.tensor([[1], [1203]])
    y = FNet(4)(x, None, mask)[0]
    for row, start in ((0, 1), (1, 1203)):
        expected = FNet(4)(x[row : row + 1, start:].double())[0].float()
        torch.testing.assert_close(y[row : row + 1, start:], expected, atol=1e-4, rtol=0)


# Performer


@torch.no_grad()
def test_performer_by_its_definition() -> None:
    mixer, x = Performer(12, heads=3, features=5).double(), draw(2, 7, 12)
    q, k, v = (heads(part, 3) for part in (x @ mixer.in_proj.weight.T).chunk(3, -1))
    w = mixer.feature.directions

    def phi(u: Tensor) -> Tensor:  # lemma 1, of u / d^(1/4)
        u = u / 4**0.25
        return torch.exp(torch.einsum("bthd,hfd->bthf", u, w) - u.square().sum(-1, keepdim=True) / 2)

    weights = torch.einsum("bthf,bshf->bhts", phi(q), phi(k))
    out = torch.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdim=True), v)
    torch.testing.assert_close(mixer(x)[0], out.flatten(2) @ mixer.out_proj.weight.T, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_performer_nears_softmax_attention_with_more_features() -> None:
    softmax = EncoderAttention(16, heads=2, position="none").double()
    x, errors = draw(2, 20, 16) / 2, []
    for features in (8, 128, 2048):
        torch.manual_seed(1)
        mixer = Performer(16, heads=2, features=features).double()
        mixer.in_proj.weight.copy_(softmax.qkv_proj.weight)
        mixer.out_proj.weight.copy_(softmax.out_proj.weight)
        expected = softmax(x)[0]
        errors.append(((mixer(x)[0] - expected).norm() / expected.norm()).item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.05


# PoNet


@torch.no_grad()
def test_ponet_by_its_definition() -> None:
    mixer, x = PoNet(12, heads=3, segment=4, local=3).double(), draw(2, 10, 12)
    q, k, o, s, l = (x @ mixer.in_proj.weight.T).chunk(5, -1)
    out = torch.zeros_like(x)
    for b in range(2):
        g = torch.zeros(12, dtype=torch.float64)
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            mean, keys = q[b, :, part].mean(0), k[b, :, part]
            g[part] = (keys @ mean / math.sqrt(4)).softmax(0) @ keys
        for t in range(10):
            first = t // 4 * 4
            segment = s[b, first : first + 4].amax(0)
            local = l[b, max(0, t - 1) : t + 2].amax(0)
            out[b, t] = (g + segment) * o[b, t] + local
    torch.testing.assert_close(mixer(x)[0], out @ mixer.out_proj.weight.T)


def test_an_even_neighbourhood_is_refused() -> None:
    with pytest.raises(InputError, match="local must be odd.* got 4; 5 is nearest"):
        PoNet(8, local=4)


# Merging


def merged_by_loops(k: Tensor, v: Tensor, ratio: float) -> list[tuple[Tensor, Tensor, int]]:
    """One row by the steps of bipartite soft matching. k, v: [T, H, d]. Returns (key, value, tokens) of all left."""
    metric = k.mean(1)
    even, odd = range(0, len(k), 2), range(1, len(k), 2)
    edges = [max((F.cosine_similarity(metric[i], metric[j], 0).item(), i, j) for j in odd) for i in even if odd]
    edges = sorted(edges, reverse=True)[: int(ratio * len(k))]
    groups = {j: [j, *(i for _, i, to in edges if to == j)] for j in odd}
    rest = set(even) - {i for _, i, _ in edges}
    groups |= {i: [i] for i in rest}
    return [(k[group].mean(0), v[group].mean(0), len(group)) for group in groups.values()]


@given(
    tokens=st.lists(st.integers(1, 13), min_size=1, max_size=3),
    ratio=st.sampled_from([0.1, 0.25, 0.4, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_merging_by_its_definition(tokens: list[int], ratio: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(len(tokens), max(tokens), 2, d, dtype=torch.float64, generator=generator) for d in (3, 5))
    ks, vs, counts, exists = merge_alike(k, v, ratio, torch.tensor(tokens))
    assert ks.shape[1] <= max(tokens) - int(ratio * min(tokens))
    for row, n in enumerate(tokens):
        expected = merged_by_loops(k[row, :n], v[row, :n], ratio)
        got = exists[row].nonzero()[:, 0]
        assert len(got) == len(expected) == n - int(ratio * n)
        assert counts[row, got].sum() == n
        by_key = sorted(((ks[row, i], vs[row, i], counts[row, i]) for i in got), key=lambda each: each[0].flatten()[0])
        expected.sort(key=lambda each: each[0].flatten()[0].item())
        for (key, value, count), (due_key, due_value, due_count) in zip(by_key, expected, strict=True):
            torch.testing.assert_close(key, due_key)
            torch.testing.assert_close(value, due_value)
            assert count == due_count


@torch.no_grad()
def test_merging_equal_tokens_changes_nothing() -> None:
    merged = MergedAttention(12, heads=3, ratio=0.5).double()
    whole = EncoderAttention(12, heads=3, position="none").double()
    whole.qkv_proj.weight.copy_(merged.in_proj.weight)
    whole.out_proj.weight.copy_(merged.out_proj.weight)
    x = draw(2, 6, 12).repeat_interleave(2, 1)
    torch.testing.assert_close(merged(x)[0], whole(x)[0])
    x = draw(2, 12, 12)
    assert not torch.allclose(merged(x)[0], whole(x)[0], atol=1e-3)


@torch.no_grad()
def test_merged_attention_by_its_definition() -> None:
    mixer, x = MergedAttention(8, heads=2, ratio=0.3).double(), draw(1, 11, 8)
    q, k, v = (heads(part, 2)[0] for part in (x @ mixer.in_proj.weight.T).chunk(3, -1))
    left = merged_by_loops(k, v, 0.3)
    keys, values = torch.stack([key for key, _, _ in left]), torch.stack([value for _, value, _ in left])
    scores = torch.einsum("thd,nhd->htn", q, keys) / 2 + torch.tensor([math.log(n) for _, _, n in left])
    out = torch.einsum("htn,nhd->thd", scores.softmax(-1), values).flatten(1)
    torch.testing.assert_close(mixer(x)[0][0], out @ mixer.out_proj.weight.T)


def test_merging_more_than_half_is_refused() -> None:
    with pytest.raises(InputError, match="less than or equal to 0.5"):
        registry.lookup("mixer", "merged_attention").build(width=8, ratio=0.6)


def test_left_aligned() -> None:
    x = torch.arange(8.0).view(2, 4, 1)
    mask = torch.tensor([[False, False, True, True], [True] * 4])
    assert left_aligned(x, mask, -1).squeeze(-1).tolist() == [[2, 3, -1, -1], [4, 5, 6, 7]]
    assert left_aligned(x, ~torch.ones_like(mask)).eq(0).all()


@torch.no_grad()
@pytest.mark.parametrize("mean", [False, True])
def test_linear_attention_weighs_all_tokens_by_its_features(mean):
    options = {"feature_map": "identity", "normalise": False, "mean": True, "key_dim": 4} if mean else {}
    mixer = build_mixer("encoder_linear_attention", width=12, heads=2, **options).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v = mixer.in_proj(x).split((2 * mixer.key_dim, 2 * mixer.key_dim, 12), -1)
    q, k, v = (each.unflatten(-1, (2, -1)) for each in (q, k, v))
    if mean:
        weight = torch.einsum("bthd,bshd->bhts", q, k) * 4**-0.5 / 6
    else:
        weight = torch.einsum("bthd,bshd->bhts", F.elu(q) + 1, F.elu(k) + 1)
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-6)
    y = torch.einsum("bhts,bshd->bthd", weight, v).flatten(2)
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(y))


@pytest.mark.parametrize("name", ["encoder_linear_attention", "linear_attention"])
def test_a_mean_beside_a_normalisation_is_refused(name):
    with pytest.raises(InputError, match="normalise divides already"):
        build_mixer(name, width=12, mean=True)
