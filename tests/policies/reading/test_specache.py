"""SpeCache against its definition written out token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.policies import build_policy
from contextlab.policies.reading.specache import CopiedState, SpeCache
from contextlab.policies.storage.codecs import TILT
from contextlab.state import KVState
from contextlab.testing import policies as base
from tests.policies.reading.test_selective import decode, layer_of, tensors


def blurred(x: Tensor, bits: int) -> Tensor:
    """Numbers [n] at the nearest (the higher, half-way) of 2^bits even levels from the least to the greatest."""
    step = (x.max() - x.min()) / (2**bits - 1)
    return x.min() + ((x - x.min()) / step + 0.5 + TILT).floor() * step


def naive(
    policy: SpeCache, layer: KVLayer, q: Tensor, k: Tensor, v: Tensor, bits: tuple[int, int], count: int
) -> Tensor:
    """The last token's answer [H, V] of one row: q [T, H, D], k, v [T, Hkv, D]."""
    length, shared = len(q), layer.heads // layer.kv_heads
    encoded = (length - policy.window) // policy.segment * policy.segment
    among = (length - int(policy.ahead) - policy.window) // policy.segment * policy.segment
    y = torch.zeros(layer.heads, v.shape[-1], dtype=v.dtype)
    for h in range(layer.kv_heads):
        keys, values = k[:, h].clone(), v[:, h].clone()
        for first in range(0, encoded, policy.segment):
            for channel in range(keys.shape[1]):
                part = slice(first, first + policy.segment)
                keys[part, channel] = blurred(keys[part, channel], bits[0])
            for token in range(first, first + policy.segment):
                values[token] = blurred(values[token], bits[1])
        own = range(h * shared, (h + 1) * shared)
        chooses = length - 1 - int(policy.ahead)
        scores = torch.stack([keys[:among] @ q[chooses, g] * layer.scale for g in own])
        wanted = (scores - scores.amax(1, keepdim=True)).amax(0).tolist()
        best = sorted(range(among), key=lambda token: (-round(wanted[token], 9), -token))[:count]  # the later, if equal
        for token in [*best, *range(among, length)]:
            keys[token], values[token] = k[token, h], v[token, h]
        for g in own:
            y[g] = (keys @ q[-1, g] * layer.scale).softmax(0) @ values
    return y


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("bits", "prompt"), [((2, 2), 40), ((1, 1), 61), ((1, 4), 30)])
def test_the_best_tokens_are_read_as_they_are_and_the_others_in_few_bits(
    bits: tuple[int, int], prompt: int, ahead: bool
) -> None:
    layer, (q, k, v) = layer_of(), tensors(62)
    policy = SpeCache("27tok", bits=bits[0], value_bits=bits[1], group=5, window=6, ahead=ahead)
    got, state = decode(policy, layer, q, k, v, prompt)
    count = 27 - policy.latest
    for row in range(2):
        expected = naive(policy, layer, q[row], k[row], v[row], bits, count)
        torch.testing.assert_close(got[row, 0], expected, rtol=0, atol=1e-11)
    assert isinstance(state, CopiedState)
    among = (62 - ahead - 6) // 5 * 5
    assert state.read_tokens == count + 62 - among
    group = -(-5 * 8 * bits[0] // 8) + 2 * 8 * 8 + -(-5 * 8 * bits[1] // 8) + 2 * 5 * 8  # codes, scales and zeros
    assert state.read_nbytes == 2 * 2 * (state.read_tokens * 16 * 8 + among // 5 * group)


def test_more_in_full_precision_is_nearer_to_everything() -> None:
    layer, (q, k, v) = layer_of(), tensors(400)
    q = 3 * q
    full, _ = decode(build_policy("specache"), layer, q, k, v, 399)
    error = {}
    for budget in ("64tok", "128tok", "256tok", "415tok"):
        got, _ = decode(SpeCache(budget, bits=1, group=16, window=16), layer, q, k, v, 399)
        error[budget] = float((got - full).norm() / full.norm())
    assert error["64tok"] > error["128tok"] > error["256tok"] > error["415tok"]
    assert error["256tok"] < 0.3 * error["64tok"]
    assert error["415tok"] < 1e-12


@pytest.mark.parametrize("prompt", [12, 40])
def test_rows_that_are_all_padded_are_read_as_alone(prompt: int) -> None:
    reader, x, pads = base.model(), base.tokens(2, prompt + 15), (9, 11)
    with build_policy("specache", budget="12tok", group=4, window=4).attach(reader):
        together, _, _ = base.read(reader, x, [prompt], base.masked(x, pads))
        for row, pad in enumerate(pads):
            alone, _, _ = base.read(reader, x[row : row + 1, pad:], [prompt - pad])
            torch.testing.assert_close(together[row : row + 1, pad:], alone, rtol=0, atol=1e-9)


def test_the_copy_stays_and_the_rest_may_be_offloaded() -> None:
    reader, x = base.model(), base.tokens(2, 100)
    held = {}
    for offload in (False, True):
        with build_policy("specache", budget="40tok", group=8, window=8, offload=offload).attach(reader):
            _, state, _ = base.read(reader, x, [97])
        held[offload] = state.layers[0]
    full = KVState.bytes_at(100, 2, 2, 8, 8, torch.float64)
    assert held[False].offloaded_nbytes == 0
    assert held[True].offloaded_nbytes == full
    assert held[True].resident_nbytes == held[False].nbytes - full < 0.5 * full


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits: expected 1, 2, 4 or 8, got 3"),
        ({"window": 0}, "window: expected a whole number of at least 1, got 0"),
        ({"budget": "40tok"}, "raise it to 64tok or lower page"),
        ({"budget": "5%"}, "raise it above .*%, lower bits or raise group"),
        ({"channels": 3}, "channels: 3 does not divide"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message), build_policy("specache", **options).attach(base.model()):
        pass


def test_the_state_of_another_policy_is_refused() -> None:
    reader, x = base.model(), base.tokens()
    with build_policy("quest", budget="24tok", page=4, window=4).attach(reader), torch.no_grad():
        _, state = reader.read(x)
    for name in ("specache", "infllm"):
        with (
            build_policy(name, budget="100tok").attach(reader),
            pytest.raises(InputError, match="expected the state of this policy, a (Copied|Block)State, got ReadState"),
        ):
            reader.read(x[:, :1], state)
