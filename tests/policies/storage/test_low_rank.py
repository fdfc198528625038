"""Few directions: what is held of keys and values, against the singular value decomposition that defines it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.policies import build_policy
from contextlab.policies.storage.low_rank import LowRank, LowRankState
from contextlab.testing import policies as laws

PLAIN = KVLayer(0, 1, heads=4, kv_heads=2, key_dim=8, value_dim=6, scale=0.4)
ROTARY = dataclasses.replace(laws.model(depth=1).blocks[0].mixer.kv_layer(), value_dim=6, scale=0.4)
ALIBI = dataclasses.replace(PLAIN, slopes=torch.tensor([0.5, 0.25, 0.1, 0.02], dtype=torch.float64))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(length: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return normal(batch, length, 4, 8), normal(batch, length, 2, 8, seed=1), normal(batch, length, 2, 6, seed=2)


def serve(policy: Any, layer: KVLayer, qkv: tuple[Tensor, ...], pieces: list[int], pads: Tensor | None = None) -> Any:
    """The answers, the last state, and the bytes after each piece; what is left is read token by token."""
    state, outputs, sizes, at = None, [], [], 0
    for size in [*pieces, *[1] * (qkv[0].shape[1] - sum(pieces))]:
        piece = slice(at, at + size)
        mask = None if pads is None else (torch.arange(qkv[0].shape[1]) >= pads[:, None])[:, piece]
        with torch.no_grad():
            y, state = policy.attend(layer, *(x[:, piece] for x in qkv), state, mask)
        outputs.append(y)
        at += size
        sizes.append((at, state.nbytes))
    return torch.cat(outputs, 1), state, sizes


def projected(x: Tensor, basis_of: Tensor, rank: int) -> Tensor:
    """x [N, D] on the leading right singular vectors of basis_of."""
    directions = torch.linalg.svd(basis_of, full_matrices=False).Vh[:rank]
    return x @ directions.mT @ directions


@pytest.mark.parametrize("layer", [PLAIN, ROTARY, ALIBI], ids=["plain", "rotary", "alibi"])
@pytest.mark.parametrize("unrotate", [True, False])
def test_low_rank_is_its_definition(layer: KVLayer, unrotate: bool) -> None:
    """Every answer after the prompt, token by token and in a piece, from projections made by torch.linalg.svd."""
    q, k, v = tokens(40)
    window, prompt, total = 5, 20, 40
    policy = build_policy("low_rank", rank=3, value_rank=2, window=window, unrotate=unrotate)
    got, _, _ = serve(policy, layer, (q, k, v), [prompt, *[1] * 12, 8])
    steps = torch.arange(total)[None, :, None]
    turned = unrotate and layer.turn is not None
    bare = layer.turn(k, -steps) if turned else k  # type: ignore[misc]
    for t in range(total):
        before = 0 if t < prompt else t if t < 32 else 32  # tokens held before the piece of this one
        coded = max(0, before - window)
        for h in range(4):
            keys, values = k[0, :, h // 2].clone(), v[0, :, h // 2].clone()
            low = projected(bare[0, :coded, h // 2], bare[0, :prompt, h // 2], 3)
            if turned:
                low = layer.turn(low[None, :, None], steps[:, :coded])[0, :, 0]  # type: ignore[misc]
            keys[:coded] = low
            values[:coded] = projected(values[:coded], v[0, :prompt, h // 2], 2)
            scores = keys[: t + 1] @ q[0, t, h] * 0.4
            if layer.slopes is not None:
                scores = scores - layer.slopes[h] * (t - torch.arange(t + 1))
            torch.testing.assert_close(got[0, t, h], scores.softmax(0) @ values[: t + 1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("unrotate", [True, False])
def test_all_directions_lose_nothing(unrotate: bool) -> None:
    reader, x = laws.model(), laws.tokens()
    mask = laws.masked(x, (0, 7))
    expected, _, _ = laws.read(reader, x, [60], mask)
    with build_policy("low_rank", rank=8, window=3, unrotate=unrotate).attach(reader):
        got, _, _ = laws.read(reader, x, [30, 12], mask)
    torch.testing.assert_close(got[mask], expected[mask], rtol=0, atol=1e-9)


def test_the_error_is_the_least_there_is() -> None:
    """Eckart and Young: what a rank leaves out of the prompt are the other singular values."""
    _, k, v = tokens(30)
    _, state, _ = serve(LowRank(rank=3, value_rank=2, window=0), PLAIN, (normal(1, 30, 4, 8), k, v), [30])
    assert isinstance(state, LowRankState)
    for name, x, rank in (("keys", k, 3), ("values", v, 2)):
        back = state.coded[name] @ state.basis[name]
        tail = torch.linalg.svdvals(x.transpose(1, 2))[..., rank:]
        torch.testing.assert_close((back - x.transpose(1, 2)).norm(dim=(2, 3)), tail.norm(dim=-1), rtol=1e-9, atol=0)


def test_positions_are_taken_off_before() -> None:
    """Keys that differ by their positions only have one direction, which a rotated key has not."""
    q, k, v = tokens(40)
    assert ROTARY.turn is not None
    k = ROTARY.turn(k[:, :1].expand(-1, 40, -1, -1), torch.arange(40)[None, :, None])
    expected, _, _ = serve(LowRank(rank=8, value_rank=6, window=2), ROTARY, (q, k, v), [20])
    for unrotate in (True, False):
        policy = LowRank(rank=1, value_rank=6, window=2, unrotate=unrotate)
        got, _, _ = serve(policy, ROTARY, (q, k, v), [20])
        assert bool((got - expected).abs().amax() < 1e-9) is unrotate


@given(
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    pads=st.tuples(st.integers(0, 14), st.integers(0, 14)),
    window=st.integers(0, 6),
)
@settings(max_examples=40, deadline=None)
def test_bytes_are_exact_and_rows_are_as_alone(pieces: list[int], pads: tuple[int, int], window: int) -> None:
    policy, total = LowRank(rank=3, value_rank=2, window=window), sum(pieces) + 3
    qkv = tokens(total, 2)
    together, _, sizes = serve(policy, ROTARY, qkv, pieces, torch.tensor(pads))
    assert [size for _, size in sizes] == [policy.nbytes(length, ROTARY, 2, torch.float64) for length, _ in sizes]
    cuts = torch.tensor([0, *pieces, *[1] * 3]).cumsum(0)
    for row, pad in enumerate(pads):
        if pad < total:
            rest = [int(n) for n in (cuts - pad).clamp_min(0).diff() if n]
            alone, _, _ = serve(policy, ROTARY, tuple(x[row : row + 1, pad:] for x in qkv), rest)
            torch.testing.assert_close(together[row : row + 1, pad:], alone, rtol=0, atol=1e-8)


def test_a_short_beginning_loses_nothing() -> None:
    """As long as no more tokens are coded than there are directions."""
    qkv = tokens(13)
    exact, _, _ = serve(LowRank(rank=8, value_rank=6, window=6), ROTARY, qkv, [1])
    got, _, _ = serve(LowRank(rank=5, value_rank=5, window=6), ROTARY, qkv, [1])
    torch.testing.assert_close(got[:, :11], exact[:, :11], rtol=0, atol=1e-7)
    assert not torch.allclose(got[:, 12:], exact[:, 12:], rtol=0, atol=1e-3)


def test_a_state_is_projected_after_reading() -> None:
    reader, x = laws.model(), laws.tokens()
    mask, policy = laws.masked(x, (0, 7)), LowRank(rank=4, window=5)
    with policy.attach(reader):
        _, expected, _ = laws.read(reader, x[:, :40], [40], mask)
    with torch.no_grad():
        _, state = reader.read(x[:, :40], mask=mask[:, :40])
        kept = policy.apply(state, reader)
    for name in ("keys", "values"):
        got, want = (s.layers[0].coded[name] @ s.layers[0].basis[name] for s in (kept, expected))
        real = mask[:, :35]
        torch.testing.assert_close(got.transpose(1, 2)[real], want.transpose(1, 2)[real], rtol=0, atol=1e-9)
    assert kept.nbytes == expected.nbytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: expected a whole number, or a part"),
        ({"rank": 2.5}, "rank: expected a whole number, or a part"),
        ({"value_rank": -1}, "value_rank: expected a whole number, or a part"),
        ({"window": -1}, "window: expected a whole number of at least 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_policy("low_rank", **options)


def test_what_fits_no_layer_is_refused() -> None:
    with pytest.raises(InputError, match="value_rank: 9 is more than the 8 numbers of a head; at most 8"):
        build_policy("low_rank", rank=4, value_rank=9)._places(laws.model())
    with pytest.raises(InputError, match="LowRank does not store"):
        build_policy("h2o") | build_policy("low_rank")
