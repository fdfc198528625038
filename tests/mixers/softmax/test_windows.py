"""Multi-scale and sigmoid windows, and sliding windows with gaps or a distance limit, against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.mixers.softmax.sliding_window import SlidingWindow
from contextlab.mixers.softmax.windows import MultiScaleWindow, SigmoidWindow, sigmoid_attention
from contextlab.ops.position import RopeScaling, alibi_slopes, rope, rope_table, rotate
from contextlab.ops.softmax import naive_softmax_attention


def x_like(length: int, batch: int = 2, width: int = 16) -> torch.Tensor:
    return torch.randn(batch, length, width, dtype=torch.float64)


@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
def test_each_quarter_of_the_heads_has_its_window(position: Any) -> None:
    mixer = MultiScaleWindow(16, window=4, heads=8, kv_heads=4, position=position).double()
    x = x_like(13)
    q, k, v = mixer.qkv_proj(x).unflatten(-1, (-1, 2)).split((8, 4, 4), 2)
    if position == "rope":
        q, k = rope(q, torch.arange(13)), rope(k, torch.arange(13))
    slopes = alibi_slopes(8) if position == "alibi" else None
    y = []
    for head in range(8):
        quarter = head // 2
        slope = None if slopes is None else slopes[head : head + 1]
        own_k, own_v = k[:, :, quarter : quarter + 1], v[:, :, quarter : quarter + 1]
        window = (1, 2, 4, 8)[quarter]
        y.append(naive_softmax_attention(q[:, :, head : head + 1], own_k, own_v, window=window, slopes=slope))
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(torch.cat(y, 2).flatten(2)), rtol=1e-9, atol=1e-10)


def naive_sigmoid(q: Any, k: Any, v: Any, window: int, slopes: list[float]) -> torch.Tensor:
    """Equation 5 of SWAT, weight by weight."""
    y = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for m in range(q.shape[1]):
        for n in range(max(0, m - window + 1), m + 1):
            for head, slope in enumerate(slopes):
                shared = head * k.shape[2] // len(slopes)
                score = (q[:, m, head] * k[:, n, shared]).sum(-1) / q.shape[-1] ** 0.5 + slope * (m - n)
                y[:, m, head] += v[:, n, shared] / (1 + torch.exp(-score[:, None]))
    return y


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_sigmoid_window_by_its_definition(kv_heads: int) -> None:
    mixer = SigmoidWindow(16, window=5, kv_heads=kv_heads).double()
    x = x_like(12)
    q, k, v = mixer.qkv_proj(x).unflatten(-1, (-1, 4)).split((4, kv_heads, kv_heads), 2)
    q, k = rope(q, torch.arange(12)), rope(k, torch.arange(12))
    y = naive_sigmoid(q, k, v, 5, [-0.5, -0.25, 0.5, 0.25])
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(y.flatten(2)), rtol=1e-9, atol=1e-10)


def test_chunks_of_queries_are_as_the_whole() -> None:
    q, k = torch.randn(1, 300, 2, 4, dtype=torch.float64), torch.randn(1, 310, 1, 4, dtype=torch.float64)
    v, tilt = torch.randn(1, 310, 1, 3, dtype=torch.float64), torch.tensor([-0.5, 0.5])
    padded_q = torch.cat([torch.zeros(1, 10, 2, 4, dtype=torch.float64), q], 1)
    expected = naive_sigmoid(padded_q, k, v, 7, tilt.tolist())[:, 10:]
    torch.testing.assert_close(sigmoid_attention(q, k, v, 7, tilt), expected, rtol=1e-9, atol=1e-10)


def test_sigmoid_attention_gradients() -> None:
    q, k, v = (torch.randn(2, n, h, 3, dtype=torch.float64, requires_grad=True) for n, h in ((5, 4), (7, 2), (7, 2)))
    tilt, real = torch.tensor([-0.5, -0.25, 0.5, 0.25]), torch.arange(7) >= torch.tensor([0, 3])[:, None]
    assert torch.autograd.gradcheck(lambda q, k, v: sigmoid_attention(q, k, v, 3, tilt, real), (q, k, v))


@pytest.mark.parametrize(("name", "reach"), [("multi_scale_window", 16), ("sigmoid_window", 8)])
def test_what_left_the_window_is_forgotten(name: str, reach: int) -> None:
    mixer = build_mixer(name, width=16, window=8).double()
    x = x_like(30)
    changed = x.clone()
    changed[:, 0] += 1
    before, after = mixer(x)[0], mixer(changed)[0]
    torch.testing.assert_close(before[:, reach:], after[:, reach:], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, reach - 1], after[:, reach - 1])


def test_bytes_of_the_state() -> None:
    scales, sigmoid = MultiScaleWindow(16, window=8), SigmoidWindow(16, window=8)
    slots = 1 + 3 + 7 + 15
    assert scales.state_nbytes(5) == scales.state_nbytes(10**6) == slots * (2 * 4 * 4 + 8) + 4 * 8
    assert sigmoid.state_nbytes(5) == sigmoid.state_nbytes(10**6) == 7 * (2 * 16 * 4 + 8) + 8


def test_flops_count_what_the_masks_let_through() -> None:
    matrices = 4 * 16 * 16
    seen = {1: 10, 2: 1 + 2 * 9, 4: 1 + 2 + 3 + 4 * 7, 8: sum(range(1, 8)) + 8 * 3}
    assert MultiScaleWindow(16, window=4).flops(10) == 2 * 10 * matrices + 4 * 4 * sum(seen.values())
    assert SigmoidWindow(16, window=4).flops(10) == 2 * 10 * matrices + 4 * 16 * seen[4]


@pytest.mark.parametrize("name", ["multi_scale_window", "sigmoid_window"])
def test_half_precision_and_autocast_run(name: str) -> None:
    mixer = build_mixer(name, width=16, window=8)
    x = torch.randn(2, 12, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)
        mixer(x, state)
    torch.testing.assert_close(y.float(), mixer(x)[0], atol=0.1, rtol=0.1)
    _, state = mixer.bfloat16()(x.bfloat16())
    assert state is not None
    assert state.nbytes == mixer.state_nbytes(12, 2, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("multi_scale_window", {"window": 6}, "window must be a multiple of 4.*nearest is 8"),
        ("multi_scale_window", {"heads": 2}, "heads must be a multiple of 4.*nearest is 4"),
        ("multi_scale_window", {"heads": 8, "kv_heads": 1}, "kv_heads must be a multiple of 4"),
        ("multi_scale_window", {"sinks": 1}, "unknown option"),
        ("sigmoid_window", {"heads": 3}, "heads must be even.*nearest is 4"),
        ("sigmoid_window", {"position": "alibi"}, "unknown option"),
        ("sigmoid_window", {"window": 0}, "window"),
    ],
    ids=str,
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_mixer(name, width=16, **options)
    assert "\n" not in str(caught.value)


def naive_limited(mixer: SlidingWindow, x: torch.Tensor) -> torch.Tensor:
    """Pair by pair: which are seen, and how far away each counts as; one sequence x [T, width]."""
    heads, dim = mixer.heads, mixer.head_dim
    q, k, v = mixer.qkv_proj(x).unflatten(-1, (-1, dim)).split((heads, mixer.kv_heads, mixer.kv_heads), 1)
    if mixer.q_norm is not None and mixer.k_norm is not None:
        q, k = mixer.q_norm(q), mixer.k_norm(k)

    def turned(x: torch.Tensor, place: int) -> torch.Tensor:
        table = rope_table(torch.tensor([place]), mixer.rotary, mixer.rope_base, x.dtype, mixer.rope_scaling)
        return rotate(x[None, None, None], table)[0, 0, 0]

    y = torch.zeros(len(x), heads, dim, dtype=x.dtype)
    for i in range(len(x)):
        seen = [
            j
            for j in range(i + 1)
            if j < mixer.sinks or ((i - j) % mixer.dilation == 0 and (i - j) // mixer.dilation < mixer.window)
        ]
        for h in range(heads):
            shared = h * mixer.kv_heads // heads
            scores = []
            for j in seen:
                distance = min(i - j, mixer.max_distance or i)
                query, key = q[i, h], k[j, shared]
                if mixer.rotary:
                    query, key = turned(query, distance), turned(key, 0)
                slope = 0.0 if mixer.slopes is None else float(mixer.slopes[h])
                scores.append(query @ key / dim**0.5 - slope * distance)
            y[i, h] = torch.stack(scores).softmax(0) @ v[seen, shared]
    return mixer.out_proj(y.flatten(1))


@pytest.mark.parametrize(
    "options",
    [
        {"window": 3, "dilation": 4},
        {"window": 3, "dilation": 2, "sinks": 2, "position": "alibi"},
        {"window": 2, "dilation": 3, "sinks": 4, "position": "none"},
        {"window": 5, "sinks": 2, "max_distance": 4},
        {"window": 5, "sinks": 3, "max_distance": 8, "kv_heads": 2, "rope_fraction": 0.5, "qk_norm": True},
        {"window": 4, "sinks": 2, "max_distance": 6, "position": "alibi", "kv_heads": 1},
        {"window": 3, "dilation": 3, "sinks": 5, "max_distance": 9},
        {
            "window": 4,
            "sinks": 2,
            "max_distance": 5,
            "rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_length=8),
        },
    ],
    ids=str,
)
def test_gaps_and_the_distance_limit_by_their_definition(options: dict[str, Any]) -> None:
    mixer = SlidingWindow(16, **options).double()
    x = x_like(17)
    y = mixer(x)[0]
    for row in range(2):
        torch.testing.assert_close(y[row], naive_limited(mixer, x[row]), rtol=1e-9, atol=1e-10)


def test_a_limit_beyond_everything_read_changes_nothing() -> None:
    limited, true = (SlidingWindow(16, window=4, sinks=2, max_distance=m).double() for m in (30, None))
    limited.load_state_dict(true.state_dict())
    x = x_like(31)
    torch.testing.assert_close(limited(x)[0], true(x)[0], rtol=1e-9, atol=1e-10)
    longer = x_like(40)
    assert not torch.allclose(limited(longer)[0], true(longer)[0])


def test_with_a_limit_the_same_window_is_answered_alike_however_late() -> None:
    mixer = SlidingWindow(16, window=4, sinks=1, max_distance=6).double()
    x, between = x_like(20), torch.zeros(2, 300, 16, dtype=torch.float64)
    late = torch.cat((x[:, :1], between, x[:, 1:]), 1)
    torch.testing.assert_close(mixer(late)[0][:, -8:], mixer(x)[0][:, -8:], rtol=1e-9, atol=1e-10)


def test_a_gapped_window_sees_its_own_places_only() -> None:
    mixer = SlidingWindow(16, window=3, dilation=4).double()
    x = x_like(20).requires_grad_()
    seen = torch.autograd.grad(mixer(x)[0][0, 17].sum(), x)[0][0].abs().sum(-1) > 0
    assert seen.nonzero().flatten().tolist() == [9, 13, 17]


def test_bytes_and_flops_of_gapped_windows() -> None:
    mixer = SlidingWindow(16, window=3, dilation=4, sinks=2)
    assert mixer.state_nbytes(5) == mixer.state_nbytes(10**6) == 10 * (2 * 16 * 4 + 8) + 8
    seen = [len({j for j in range(i + 1) if j < 2 or ((i - j) % 4 == 0 and i - j < 12)}) for i in range(30)]
    for length in range(1, 30):
        assert mixer.flops(length) == 2 * length * 4 * 16 * 16 + 4 * 16 * sum(seen[:length])


def test_limited_windows_in_half_precision() -> None:
    mixer = SlidingWindow(16, window=4, dilation=2, sinks=2, max_distance=8)
    x = torch.randn(2, 30, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)
        mixer(x, state)
    torch.testing.assert_close(y.float(), mixer(x)[0], atol=0.1, rtol=0.1)
    _, state = mixer.bfloat16()(x.bfloat16())
    assert state is not None
    assert state.nbytes == mixer.state_nbytes(30, 2, torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_distance": 9}, "sinks is 0; set sinks=4 or leave max_distance out"),
        ({"max_distance": 90, "sinks": 1, "position": "none"}, "position is 'none'; set position='rope'"),
        ({"window": 4, "dilation": 3, "sinks": 1, "max_distance": 8}, "nearest is 9"),
        ({"dilation": 0}, "dilation"),
    ],
    ids=str,
)
def test_bad_options_of_limited_windows(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_mixer("sliding_window", width=16, **options)
    assert "\n" not in str(caught.value)
