from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.mixers import Attention, CaropeAttention, ClexAttention, GaliAttention, build_mixer
from contextlab.mixers.softmax.carope import PhaseState
from contextlab.ops.position_variants import clex_frequencies
from contextlab.state import KVState


def tokens(length: int, batch: int = 2, width: int = 16) -> Tensor:
    return torch.randn(batch, length, width, dtype=torch.float64)


def noisy(mixer: Any) -> Any:
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer.double()


def heads_of(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, T, H, D] of a mixer with neither convolution nor norms, each key head repeated for its group."""
    qkv = mixer.qkv_proj(x).unflatten(-1, (-1, mixer.head_dim))
    q, k, v = qkv.split((mixer.heads, mixer.kv_heads, mixer.kv_heads), 2)
    group = mixer.heads // mixer.kv_heads
    return q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """One head's vector [D], pair j of its first dimensions turned by angle[j]."""
    pairs = x[: 2 * len(angle)].view(-1, 2)
    c, s = angle.cos(), angle.sin()
    both = torch.stack((pairs[:, 0] * c - pairs[:, 1] * s, pairs[:, 0] * s + pairs[:, 1] * c), 1)
    return torch.cat((both.flatten(), x[2 * len(angle) :]))


def same_gradients(mixer: Any, x: Tensor, got: Tensor, expected: Tensor) -> None:
    weight = torch.randn_like(got)
    given = [x, *mixer.parameters()]
    ours, theirs = (torch.autograd.grad((y * weight).sum(), given, materialize_grads=True) for y in (got, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"kv_heads": 1, "rope_fraction": 0.5}], ids=str)
def test_carope_token_by_token(options: dict[str, Any]) -> None:
    mixer = noisy(CaropeAttention(16, heads=2, **options))
    x = tokens(7).requires_grad_()
    q, k, v = heads_of(mixer, x)
    group, pairs = mixer.heads // mixer.kv_heads, mixer.pairs
    rows = []
    for b in range(2):
        for h in range(2):
            phase, keys, values = torch.zeros(pairs, dtype=torch.float64), [], []
            for t in range(7):
                z = x[b, t] @ mixer.freq_proj.weight[h // group] + mixer.freq_proj.bias[h // group]
                f = 1 / (torch.nn.functional.softplus(z) + 1)
                phase = phase + torch.stack([f**i for i in range(pairs)])
                keys.append(turn(k[b, t, h], phase))
                values.append(v[b, t, h])
                scores = torch.stack(keys) @ turn(q[b, t, h], phase) / mixer.head_dim**0.5
                rows.append(scores.softmax(0) @ torch.stack(values))
    expected = mixer.out_proj(torch.stack(rows).view(2, 2, 7, -1).transpose(1, 2).flatten(2))
    got = mixer(x)[0]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    same_gradients(mixer, x, got, expected)


@pytest.mark.parametrize(("heads", "base"), [(2, 300.0), (4, 1e7), (1, 1.001)])
def test_carope_starts_as_rope(heads: int, base: float) -> None:
    mixer = CaropeAttention(16, heads=heads, rope_base=base).double()
    plain = Attention(16, heads=heads, rope_base=base).double()
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("freq")})
    x = tokens(40)
    torch.testing.assert_close(mixer(x)[0], plain(x)[0], rtol=1e-5, atol=1e-5)  # b was made in float32
    mixer(x)[0].sum().backward()
    assert mixer.freq_proj.weight.grad is not None
    assert mixer.freq_proj.weight.grad.any()


def test_carope_far_out_is_as_right_as_near() -> None:
    """What counts is how far the angles are apart: a stream of a million tokens has no other effect."""
    mixer = noisy(CaropeAttention(16)).float()
    x = torch.randn(2, 9, 16)
    before = torch.rand(2, 4, mixer.pairs, dtype=torch.float64) * 2 * math.pi
    nothing = torch.zeros(2, 0, 4, 4)
    far = PhaseState(KVState.empty(nothing, nothing), before, length=0)
    torch.testing.assert_close(mixer(x, far)[0], mixer(x)[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_carope_keeps_its_angles_in_half_precision(autocast: bool) -> None:
    mixer = noisy(CaropeAttention(16)).float()
    x = torch.randn(2, 600, 16).bfloat16().float()
    with torch.no_grad():
        for parameter in mixer.parameters():  # as exact in either precision
            parameter.copy_(parameter.bfloat16())
    expected = mixer(x)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        half, given = (mixer, x) if autocast else (mixer.bfloat16(), x.bfloat16())
        y, state = half(given)
        half(given[:, :1], state)
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)
    if not autocast:
        assert state.nbytes == mixer.state_nbytes(600, 2, torch.bfloat16)


def turned_on_read(mixer: Any, x: Tensor, angles: Any) -> Tensor:
    """The mixer's output by a softmax for each query; angles(n, m) gives [(weight, of q, of k)] for their score."""
    q, k, v = heads_of(mixer, x)
    batch, length, heads, _ = q.shape
    rows = []
    for b in range(batch):
        for n in range(length):
            for h in range(heads):
                scores = []
                for m in range(n + 1):
                    parts = [w * (turn(q[b, n, h], one) @ turn(k[b, m, h], other)) for w, one, other in angles(n, m)]
                    scores.append(sum(parts) / mixer.head_dim**0.5)
                rows.append(torch.stack(scores).softmax(0) @ v[b, : n + 1, h])
    return mixer.out_proj(torch.stack(rows).view(batch, length, -1))


def test_clex_query_by_query() -> None:
    mixer = noisy(ClexAttention(16, heads=2, kv_heads=1, original_length=3, max_factor=3, rope_fraction=0.5))
    x = tokens(12).requires_grad_()
    theta = clex_frequencies(3, 4, 10000.0, mixer.ode_up, mixer.ode_down)

    def angles(n: int, m: int) -> list[tuple[float, Tensor, Tensor]]:
        at = theta[min(n // 3, 2)]
        return [(1.0, n * at, m * at)]

    got, expected = mixer(x)[0], turned_on_read(mixer, x, angles)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    same_gradients(mixer, x, got, expected)


def test_clex_within_the_trained_length_is_rope() -> None:
    mixer, plain = ClexAttention(16, original_length=20).double(), Attention(16).double()
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("ode")})
    x = tokens(30)
    y, rotary = mixer(x)[0], plain(x)[0]
    torch.testing.assert_close(y[:, :20], rotary[:, :20])
    assert not torch.allclose(y[:, 20:], rotary[:, 20:])


def test_clex_trains_the_frequencies_of_long_sequences_on_short_ones() -> None:
    mixer = noisy(ClexAttention(16, original_length=20, max_factor=4, sample=True))
    x = tokens(10)
    mask = torch.arange(10) >= torch.tensor([4, 0])[:, None]
    drawn = [mixer(x, None, mask)[0] for _ in range(8)]
    assert len({y[1, -1, 0].item() for y in drawn}) > 1
    sum(y[mask].square().sum() for y in drawn).backward()
    assert mixer.ode_up.grad.any()
    assert mixer.ode_down.grad.any()
    plain = ClexAttention(16, original_length=20, max_factor=4).double()
    plain.load_state_dict(mixer.state_dict())
    expected = plain(x, None, mask)[0]
    torch.testing.assert_close(mixer.eval()(x, None, mask)[0], expected)
    # All places of a trained length are the places themselves.
    only = noisy(ClexAttention(16, original_length=10, max_factor=1, sample=True))
    torch.testing.assert_close(only.train()(x)[0], only.eval()(x)[0])


@pytest.mark.parametrize(("original", "window", "chunk"), [(5, 2, 3), (4, 3, 1), (6, 1, 20)])
def test_gali_query_by_query(original: int, window: int, chunk: int) -> None:
    mixer = noisy(
        GaliAttention(16, heads=2, kv_heads=1, original_length=original, window=window, chunk=chunk, rope_fraction=0.5)
    )
    x = tokens(13).requires_grad_()
    theta = torch.tensor([1.0, 0.01], dtype=torch.float64)

    def places(length: int) -> list[float]:
        """Places by the paper's algorithm 2."""
        group, i = math.ceil((length - window) / (original - window)), 0
        out: list[float] = []
        while original - i + len(out) < length:
            out += [i + j / group for j in range(group)]
            i += 1
        return [*out[: length - (original - i)], *range(i, original)]

    def angles(n: int, m: int) -> list[tuple[float, Tensor, Tensor]]:
        if n < original:
            return [(1.0, n * theta, m * theta)]
        at = places(original + math.ceil((n + 1 - original) / chunk) * chunk)
        query, r = math.ceil(at[n]), math.ceil(at[n]) - at[m]
        assert 0 <= r < original  # no distance that was not trained
        part = r % 1
        return [
            (1 - part, query * theta, (query - math.floor(r)) * theta),
            (part, query * theta, (query - math.ceil(r)) * theta),
        ]

    got, expected = mixer(x)[0], turned_on_read(mixer, x, angles)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    same_gradients(mixer, x, got, expected)


def test_gali_is_attention_within_the_trained_length_with_the_same_parameters() -> None:
    plain = Attention(16, kv_heads=2).double()
    mixer = GaliAttention(16, kv_heads=2, original_length=20, window=5, chunk=8).double()
    mixer.load_state_dict(plain.state_dict())
    x = tokens(30)
    y, rotary = mixer(x)[0], plain(x)[0]
    torch.testing.assert_close(y[:, :20], rotary[:, :20])
    assert not torch.allclose(y[:, 20:], rotary[:, 20:])


@pytest.mark.parametrize("name", ["clex_attention", "gali_attention"])
def test_keys_turned_on_read_run_in_half_precision(name: str) -> None:
    mixer = build_mixer(name, width=16, original_length=300, **({"window": 20} if name[0] == "g" else {}))
    x = torch.randn(2, 700, 16)
    expected = mixer(x)[0]
    y, state = mixer.bfloat16()(x.bfloat16())
    assert state is not None
    assert state.nbytes == mixer.state_nbytes(700, 2, torch.bfloat16)
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("carope_attention", {"heads": 8}, "CARoPE needs at least 4 rotated dimensions, got 2 of head_dim 2"),
        ("clex_attention", {"rope_fraction": 0.5}, "CLEX needs at least 4 rotated dimensions, got 2 of head_dim 4"),
        ("gali_attention", {"original_length": 64, "window": 64}, "the nearest that fits is 63"),
        ("gali_attention", {"original_length": 1}, "original_length"),
    ],
)
def test_impossible_options_are_refused_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_mixer(name, width=16, **options)
    assert "\n" not in str(caught.value)
