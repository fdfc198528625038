"""Disentangled attention against its definition, and against transformers' DeBERTa-v2."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.mixers.encoder import disentangled
from contextlab.mixers.encoder.disentangled import DisentangledAttention, log_buckets


def noisy(width: int = 12, **options: Any) -> DisentangledAttention:
    torch.manual_seed(0)
    mixer = build_mixer("disentangled_attention", width=width, **options).double()
    assert isinstance(mixer, DisentangledAttention)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def bucket_of(distance: int, buckets: int, farthest: int) -> int:
    near = buckets // 2
    if abs(distance) <= near:
        return distance
    far = math.ceil(math.log(abs(distance) / near) / math.log((farthest - 1) / near) * (near - 1)) + near
    return int(math.copysign(min(far, buckets - 1), distance))


def layer_norm(x: Tensor, norm: torch.nn.LayerNorm | None) -> Tensor:
    if norm is None:
        return x
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    return x * norm.weight + norm.bias


def by_definition(mixer: DisentangledAttention, x: Tensor, terms: str) -> Tensor:
    """Score by score, each with the embedding of its own pair of tokens projected anew."""
    width, heads = mixer.width, mixer.heads
    wq, wk, wv = mixer.in_proj.weight.chunk(3)
    bq, bk, bv = (0, 0, 0) if mixer.in_proj.bias is None else mixer.in_proj.bias.chunk(3)
    if mixer.position_proj is None:
        rq, rk, cq, ck = wq, wk, bq, bk
    else:
        own = mixer.position_proj
        rq, rk, cq, ck = own.weight[:width], own.weight[-width:], own.bias[:width], own.bias[-width:]
    table = layer_norm(mixer.distances, mixer.position_norm)
    scale = 1 / math.sqrt(width / heads * (3 if terms == "both" else 2))
    rows = []
    for sequence in x:
        for i, token in enumerate(sequence):
            out = []
            for h in range(heads):
                part = slice(h * width // heads, (h + 1) * width // heads)
                scores = []
                for j, other in enumerate(sequence):
                    at = table[mixer.buckets - 1 + bucket_of(i - j, mixer.buckets, mixer.max_distance)]
                    q, k = (wq @ token + bq)[part], (wk @ other + bk)[part]
                    score = q @ k
                    if terms != "position_to_content":
                        score = score + q @ (rk @ at + ck)[part]
                    if terms != "content_to_position":
                        score = score + k @ (rq @ at + cq)[part]
                    scores.append(score * scale)
                out.append(torch.stack(scores).softmax(0) @ (sequence @ wv.T + bv)[:, part])
            y = mixer.out_proj.weight @ torch.cat(out)
            rows.append(y if mixer.out_proj.bias is None else y + mixer.out_proj.bias)
    return layer_norm(torch.stack(rows).view_as(x), mixer.output_norm)


@pytest.mark.parametrize(
    "options",
    [
        {"buckets": 6, "max_distance": 6, "heads": 3, "bias": True, "output_norm": True},
        {"buckets": 4, "max_distance": 5, "heads": 2, "shared": False, "bias": True},
        {"buckets": 2, "max_distance": 4, "heads": 2, "terms": "content_to_position"},
        {"buckets": 4, "max_distance": 9, "terms": "position_to_content", "position_norm": False},
        {"buckets": 4, "heads": 2, "terms": "position_to_content", "shared": False, "bias": True},
    ],
    ids=str,
)
def test_scores_by_their_definition(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disentangled, "CHUNK", 3)  # more than one chunk of queries
    mixer = noisy(**options)
    x = torch.randn(2, 8, 12, dtype=torch.float64, requires_grad=True)
    wanted = [x, *mixer.parameters()]
    got, expected = mixer(x)[0], by_definition(mixer, x, options.get("terms", "both"))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    weight = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad((got * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("terms", ["both", "content_to_position", "position_to_content"])
@torch.no_grad()
def test_agrees_with_deberta(shared: bool, terms: str) -> None:
    deberta = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    config = pytest.importorskip("transformers").DebertaV2Config(
        hidden_size=12,
        num_attention_heads=3,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
        relative_attention=True,
        position_buckets=8,
        max_relative_positions=30,
        share_att_key=shared,
        pos_att_type=[n for n, o in (("c2p", "position_to_content"), ("p2c", "content_to_position")) if o != terms],
    )
    theirs = deberta.DisentangledSelfAttention(config).double().eval()
    for parameter in theirs.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    ours = noisy(heads=3, buckets=8, max_distance=30, shared=shared, terms=terms, bias=True, position_norm=False)
    for part in ("weight", "bias"):
        in_order = [getattr(getattr(theirs, f"{name}_proj"), part) for name in ("query", "key", "value")]
        getattr(ours.in_proj, part).copy_(torch.cat(in_order))
        if ours.position_proj is not None:
            names = [f"pos_{name}_proj" for name in ("query", "key") if hasattr(theirs, f"pos_{name}_proj")]
            getattr(ours.position_proj, part).copy_(torch.cat([getattr(getattr(theirs, n), part) for n in names]))
    torch.nn.init.eye_(ours.out_proj.weight)
    torch.nn.init.zeros_(ours.out_proj.bias)
    x, mask = torch.randn(2, 25, 12).double(), torch.arange(25) >= torch.tensor([[4], [0]])
    table = torch.cat([torch.full((1, 12), 1e3).double(), ours.distances])  # their first row is for none so near
    expected = theirs(x, (mask[:, None, None] & mask[:, None, :, None]), rel_embeddings=table)[0]
    # Their scales are rounded to float32.
    torch.testing.assert_close(ours(x, None, mask)[0][mask], expected[mask], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("buckets", "farthest"), [(2, 4), (8, 30), (32, 512), (256, 512)])
def test_buckets_are_those_of_deberta(buckets: int, farthest: int) -> None:
    deberta = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    distance = torch.arange(farthest)
    got = log_buckets(distance, buckets, farthest)
    assert got.tolist() == deberta.make_log_bucket_position(distance, buckets, farthest).long().tolist()
    assert got[-1] == buckets - 1
    assert set(log_buckets(torch.arange(farthest, 3 * farthest), buckets, farthest).tolist()) == {buckets - 1}


@torch.no_grad()
def test_the_order_counts_and_only_by_distance() -> None:
    mixer = noisy(buckets=4, max_distance=6, heads=2)
    x = torch.randn(1, 7, 12, dtype=torch.float64)
    assert not torch.allclose(mixer(x.flip(1))[0], mixer(x)[0].flip(1), atol=1e-2)
    mixer.distances.copy_(mixer.distances + mixer.distances.flip(0))  # i - j and j - i alike
    torch.testing.assert_close(mixer(x.flip(1))[0], mixer(x)[0].flip(1), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": 7}, "buckets must be even, got 7; the nearest that fits is 8"),
        ({"buckets": 64, "max_distance": 33}, "max_distance must be more than .* = 33, got 33; .* is 34"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_mixer("disentangled_attention", width=12, **options)
