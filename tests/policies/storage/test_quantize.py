"""Few bits: codes, their errors, what is held, and eviction that stores what it keeps in few bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contextlab import registry
from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.policies import EvictionPolicy, Policy, build_policy
from contextlab.policies.storage.codecs import FLOAT8, TILT, Floats, Integers, pack, unpack
from contextlab.policies.storage.packed import Packed
from contextlab.policies.storage.quantize import PackedState
from contextlab.testing import policies as laws
from tests.policies.core.test_base import padding

BITS = (1, 2, 4, 8)
SEED = st.integers(0, 2**31)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(st.sampled_from(BITS), st.lists(st.integers(1, 9), min_size=1, max_size=3), SEED)
@settings(max_examples=60, deadline=None)
def test_codes_are_packed_without_a_trace(bits: int, shape: list[int], seed: int) -> None:
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (*shape[:-1], math.ceil(shape[-1] * bits / 8))
    torch.testing.assert_close(unpack(packed, bits, shape[-1]), codes, rtol=0, atol=0)


@given(st.sampled_from(BITS), st.sampled_from([None, 2, 6]), st.floats(-8, 8), st.floats(-1e3, 1e3), SEED)
@settings(max_examples=60, deadline=None)
def test_each_number_becomes_the_nearest_level(
    bits: int, block: int | None, size: float, middle: float, seed: int
) -> None:
    x = normal(2, 5, 6, seed=seed) * math.exp(size) + middle
    codec = Integers(bits, block)
    parts = codec.encode(x)
    assert sum(p.numel() * p.element_size() for p in parts.values()) == 2 * codec.nbytes(5, 6, x.dtype)
    blocks = x.mT if block is None else x.unflatten(-1, (-1, block))  # [..., numbers of a block]
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    levels = low + (high - low) * torch.linspace(0, 1, 2**bits, dtype=x.dtype)
    nearest = (blocks[..., None] - levels[..., None, :]).abs().amin(-1)
    back = codec.decode(parts, 5, 6, x.dtype)
    error = (back - x).abs()
    error = error.mT if block is None else error.unflatten(-1, (-1, block))
    rounding = 1e-12 * (1 + x.abs().amax())
    step = (high - low) / (2**bits - 1)
    assert (error <= nearest + 2 * TILT * step + rounding).all()
    assert (error <= step * (0.5 + TILT) + rounding).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", BITS)
def test_low_precision_adds_no_more_than_its_own_rounding(bits: int, dtype: torch.dtype) -> None:
    x = (normal(40, 32, 16, dtype=dtype) + 3).to(dtype)
    back = Integers(bits, None).decode(Integers(bits, None).encode(x), 32, 16, dtype)
    low, high = x.double().amin(-2, keepdim=True), x.double().amax(-2, keepdim=True)
    step, eps = (high - low) / (2**bits - 1), torch.finfo(dtype).eps
    # The step's own rounding adds up over the levels; then the products and sums are rounded.
    assert (
        (back.double() - x.double()).abs() <= step * (0.5 + TILT) + 2 * eps * (high - low) + 2 * eps * x.double().abs()
    ).all()


@given(st.sampled_from(BITS), st.sampled_from([None, 4]), SEED)
@settings(max_examples=30, deadline=None)
def test_what_was_quantized_is_quantized_to_itself(bits: int, block: int | None, seed: int) -> None:
    codec = Integers(bits, block)
    parts = codec.encode(normal(3, 7, 8, seed=seed))
    again = codec.encode(codec.decode(parts, 7, 8, torch.float64))
    torch.testing.assert_close(again["codes"], parts["codes"], rtol=0, atol=0)
    equal = torch.full((1, 4, 8), 2.5)
    torch.testing.assert_close(codec.decode(codec.encode(equal), 4, 8, torch.float32), equal, rtol=0, atol=0)


@pytest.mark.parametrize(("format", "fraction", "least"), [("e4m3", 3, 2.0**-6), ("e5m2", 2, 2.0**-14)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_float8_keeps_its_bits_of_fraction(format: Any, fraction: int, least: float, dtype: torch.dtype) -> None:
    """Half a unit in the last place of normal numbers, of which `least` is the smallest, and of that one below it."""
    x = (normal(50, 20, 16) * torch.logspace(-4, 3, 50, dtype=torch.float64)[:, None, None]).to(dtype)
    codec = Floats(format)
    parts = codec.encode(x)
    back, scale = codec.decode(parts, 20, 16, dtype).double(), parts["scale"].double()
    half = torch.maximum(x.double().abs(), least * scale) * 2.0 ** -(fraction + 1)
    assert ((back - x.double()).abs() <= half * (1 + 2**-6) + 3 * torch.finfo(dtype).eps * x.double().abs()).all()
    assert sum(p.numel() * p.element_size() for p in parts.values()) == 50 * codec.nbytes(20, 16, dtype)
    zero = torch.zeros(1, 2, 8)
    torch.testing.assert_close(codec.decode(codec.encode(zero), 2, 8, torch.float32), zero, rtol=0, atol=0)


@pytest.mark.parametrize("format", FLOAT8)
def test_every_float8_is_read_as_torch_reads_it(format: Any) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 256)
    expected = codes.view(FLOAT8[format]).to(torch.float64)
    parts = {"codes": codes, "scale": torch.full((1, 1, 1), 0.375)}
    got = Floats(format).decode(parts, 1, 256, torch.float64)[expected.isfinite()]
    torch.testing.assert_close(got, expected[expected.isfinite()] * 0.375, rtol=0, atol=0)


LAYER = KVLayer(0, 1, heads=4, kv_heads=2, key_dim=8, value_dim=6, scale=0.4)


def blurred(x: Tensor, bits: int) -> Tensor:
    """Numbers of a block (the last dimension) on the nearest of 2^bits levels from its least to its greatest."""
    low, high = x.min(), x.max()
    levels = [low + (high - low) * i / (2**bits - 1) for i in range(2**bits)]
    return torch.stack([min(levels, key=lambda level: abs(level - n)) for n in x])


def test_quantize_is_its_definition() -> None:
    """Token by token, from the KIVI paper's description: groups of keys by channel, values by token and channels."""
    prompt, more, group, window, channels = 15, 10, 4, 3, 3
    q, k, v = normal(1, 25, 4, 8), normal(1, 25, 2, 8, seed=1), normal(1, 25, 2, 6, seed=2)
    policy = build_policy("quantize", bits=2, value_bits=4, group=group, window=window, channels=channels)
    keys, values, expected, encoded = k[0].clone(), v[0].clone(), [], 0
    for t in range(prompt + more):
        if t == prompt or t > prompt:  # what was held before this token is as it was left
            while t - encoded >= window + group:
                for h in range(2):
                    for d in range(8):
                        keys[encoded : encoded + group, h, d] = blurred(k[0, encoded : encoded + group, h, d], 2)
                    for s in range(encoded, encoded + group):
                        for c in range(0, 6, channels):
                            values[s, h, c : c + channels] = blurred(v[0, s, h, c : c + channels], 4)
                encoded += group
        heads = [(keys[: t + 1, h // 2] @ q[0, t, h] * 0.4).softmax(0) @ values[: t + 1, h // 2] for h in range(4)]
        expected.append(torch.stack(heads))
    y, state = policy.attend(LAYER, q[:, :prompt], k[:, :prompt], v[:, :prompt], None)
    got = [y]
    for t in range(prompt, prompt + more):
        y, state = policy.attend(LAYER, q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], state)
        got.append(y)
    torch.testing.assert_close(torch.cat(got, 1)[0], torch.stack(expected), rtol=0, atol=1e-12)
    assert isinstance(state, PackedState)
    assert state.packed.groups == 5
    torch.testing.assert_close(state.packed["keys"][0, :, 20:], k[0, 20:].transpose(0, 1), rtol=0, atol=0)


@given(
    pieces=st.lists(st.integers(1, 11), min_size=1, max_size=8),
    pads=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    group=st.integers(1, 6),
    window=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_rows_are_encoded_as_if_alone(pieces: list[int], pads: tuple[int, int], group: int, window: int) -> None:
    """However it is cut and padded, a row's decoded tokens are those of the row alone, within the bytes foretold."""
    policy = build_policy("quantize", bits=4, group=group, window=window, channels=3)
    form = policy.storage.at(LAYER)
    total = sum(pieces)
    keys, values = normal(2, 2, total, 8), normal(2, 2, total, 6, seed=1)
    real = torch.arange(total) >= torch.tensor(pads)[:, None]
    packed, at = Packed(form, recent={"keys": keys[:, :, :0], "values": values[:, :, :0]}), 0
    for size in pieces:
        piece = slice(at, at + size)
        packed = packed.append(keys[:, :, piece], values[:, :, piece], real[:, piece])
        at += size
        assert packed.nbytes <= policy.storage.packed_nbytes(at, LAYER, 2, torch.float64)
    for row, pad in enumerate(pads):
        if pad < total:
            none = {"keys": keys[:1, :, :0], "values": values[:1, :, :0]}
            alone = Packed(form, recent=none).append(keys[row : row + 1, :, pad:], values[row : row + 1, :, pad:])
            for name in ("keys", "values"):
                torch.testing.assert_close(packed[name][row : row + 1, :, pad:], alone[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_those_of_the_bits(bits: int) -> None:
    """2-bit codes and a scale and zero of 32 bits for 32 numbers are 4 bits a number; so on, and the window."""
    layer = KVLayer(0, 1, heads=2, kv_heads=2, key_dim=64, value_dim=64, scale=0.1)
    k, v = normal(1, 4096, 2, 64, dtype=torch.float32), normal(1, 4096, 2, 64, seed=1, dtype=torch.float32)
    policy = build_policy("quantize", bits=bits)
    _, state = policy.attend(layer, k[:, :1].expand(-1, 4096, -1, -1) * 0, k, v, None)
    assert state is not None
    exact = 4096 * 2 * 128 * 4
    assert (bits + 2) / 32 < state.nbytes / exact < (bits + 2) / 32 + 0.01
    assert state.nbytes <= policy.nbytes(4096, layer)  # type: ignore[attr-defined]


def test_more_bits_are_nearer() -> None:
    reader, x = laws.model(), laws.tokens()
    expected, _, _ = laws.read(reader, x, [60])
    errors = []
    for bits in BITS:
        with build_policy("quantize", bits=bits, group=8, window=4).attach(reader):
            got, _, _ = laws.read(reader, x, [30])
        errors.append(float((got - expected)[:, 30:].abs().mean()))
    assert errors[0] > 2 * errors[1] > 8 * errors[2] > 64 * errors[3] > 0


PAIRS: dict[str, Callable[..., Policy]] = {
    "h2o | quantize": lambda **more: (
        build_policy("h2o", **{"window": 4, **more}) | build_policy("quantize", bits=4, group=5, window=2)
    ),
    "streaming_llm | quantize": lambda **more: (
        build_policy("streaming_llm", every=1, reposition=True, **more)
        | build_policy("quantize", bits=8, group=3, window=0)
    ),
    "h2o | quantize by token": lambda **more: (
        build_policy("h2o", **{"window": 4, **more})
        | build_policy("quantize", bits=2, keys="token", group=1, window=0, channels=4)
    ),
    "snapkv | fp8": lambda **more: build_policy("snapkv", **{"window": 4, "kernel": 3, **more}) | build_policy("fp8"),
}
pairs = pytest.mark.parametrize("build", PAIRS.values(), ids=PAIRS)


@pairs
@padding
def test_pairs_keep_to_a_full_budget(build: Callable[..., Policy], pads: tuple[int, ...] | None) -> None:
    laws.hold_to_full_budget(build, pads)


@pairs
@pytest.mark.parametrize("budget", ["24tok", "50%", "16kB"])
@padding
def test_pairs_keep_to_their_budget(build: Callable[..., Policy], budget: str, pads: tuple[int, ...] | None) -> None:
    laws.hold_to_budget(build, budget, pads)


@pairs
@pytest.mark.parametrize(
    "law",
    [
        laws.hold_to_older_states,
        laws.hold_to_batch,
        laws.hold_to_pieces,
        laws.hold_to_no_trace,
    ],
)
def test_pairs_keep_the_laws(build: Callable[..., Policy], law: Callable[..., None]) -> None:
    law(build)


@pytest.mark.parametrize("entry", [pytest.param(e, id=e.name) for e in registry.entries("policy") if e.cases])
def test_every_eviction_policy_may_store_few_bits(entry: registry.Entry) -> None:
    known = {parameter.name for parameter in entry.parameters}
    small = {"window": 4} if "window" in known else {}
    policy = entry.build(**{**small, **entry.cases[0], **({"budget": "50%"} if "budget" in known else {})})
    if type(policy).__or__ is not EvictionPolicy.__or__:
        pytest.skip("it evicts nothing, or says itself what it composes with")
    reader, x = laws.model(), laws.tokens(2, 44)
    with (policy | build_policy("quantize", bits=8, group=4, window=2)).attach(reader):
        got, state, sizes = laws.read(reader, x, [36], laws.masked(x, (0, 7)))
    full = 2 * 2 * 2 * (8 + 8) * 8  # layers, rows, key heads, key and value, bytes: of each token
    assert all(size <= full * length // 2 for length, size in enumerate(sizes, 36)), sizes
    assert got.isfinite().all()
    assert sum(layer.slots.used for layer in state.layers) > 44  # of two layers: more than the budget holds uncoded


def test_the_same_bytes_hold_more_tokens_in_fewer_bits() -> None:
    reader, x = laws.model(), laws.tokens(1, 400)
    held = {}
    for bits in (None, 8, 2):
        policy = build_policy("streaming_llm", budget="20kB")
        if bits:
            policy = policy | build_policy("quantize", bits=bits, group=16, window=4)
        with policy.attach(reader):
            _, state, sizes = laws.read(reader, x, [360])
        assert max(sizes) <= 20_000
        held[bits] = state.layers[0].slots.used
    assert held[None] * 1.5 < held[8] < held[2]


def test_codes_by_token_outlive_every_eviction() -> None:
    """Keys that were quantized channel by channel move further off with each; read at once, they are as good."""
    reader, x = laws.model(depth=1), laws.tokens(1, 120)
    with torch.no_grad():
        _, state = reader.read(x)
    exact, errors = state.layers[0].keys, {}
    for keys in ("channel", "token"):
        storage = build_policy("quantize", keys=keys, group=4, window=0)
        for pieces in ([20], [119]):
            with (build_policy("h2o", budget="24tok", window=4, every=2) | storage).attach(reader):
                _, kept, _ = laws.read(reader, x, pieces)
            held = kept.layers[0]
            true = exact.gather(2, held.positions.long()[..., None].expand(-1, -1, -1, 8))
            errors[keys, pieces[0]] = float((held.slots["keys"] - true).abs().mean())
    assert errors["channel", 20] > 1.5 * errors["channel", 119]
    assert errors["token", 20] < 1.1 * errors["token", 119]


def test_a_state_is_quantized_after_reading() -> None:
    reader, x = laws.model(), laws.tokens()
    mask = laws.masked(x, (0, 7))
    for policy in (build_policy("quantize", group=8, window=4), PAIRS["streaming_llm | quantize"](budget="30tok")):
        with policy.attach(reader):
            _, expected, _ = laws.read(reader, x[:, :40], [40], mask)
        with torch.no_grad():
            _, state = reader.read(x[:, :40], mask=mask[:, :40])
            kept = policy.apply(state, reader)
        layers = [getattr(layer, "slots", getattr(layer, "packed", None)) for layer in kept.layers[:1]]
        others = [getattr(layer, "slots", getattr(layer, "packed", None)) for layer in expected.layers[:1]]
        for name in ("keys", "values"):
            torch.testing.assert_close(layers[0][name], others[0][name], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("quantize", {"bits": 3}, "bits: expected 1, 2, 4 or 8, got 3; the nearest is 2"),
        ("quantize", {"value_bits": 16}, "value_bits: expected 1, 2, 4 or 8, got 16; the nearest is 8"),
        ("quantize", {"group": 0}, "group: expected a whole number of at least 1"),
        ("quantize", {"window": -1}, "window: expected a whole number of at least 0"),
        ("quantize", {"keys": "head"}, "keys: input should be 'channel' or 'token', got str 'head'"),
        ("fp8", {"format": "e3m4"}, "e4m3"),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_policy(name, **options)


def test_channels_that_do_not_divide_a_value_are_refused() -> None:
    policy = build_policy("quantize", channels=5)
    for each in (policy, build_policy("h2o") | policy):
        with pytest.raises(InputError, match="5 does not divide the 8 numbers of a value.*nearest that does is 4"):
            each._places(laws.model())


def test_pairs_that_make_no_sense_are_refused() -> None:
    h2o, quantize = build_policy("h2o"), build_policy("quantize")
    with pytest.raises(InputError, match="Quantize | H2O: Quantize keeps every token"):
        quantize | h2o
    with pytest.raises(InputError, match="H2O does not store"):
        h2o | h2o
    with pytest.raises(InputError, match="already; leave one out"):
        h2o | quantize | quantize
    assert h2o.lossless
    assert not (h2o | quantize).lossless


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("block", [None, 4])
def test_a_range_wider_than_float16_is_held(bits: int, block: int | None) -> None:
    x = torch.tensor([-65000.0, 65000.0, -60000.0, 60000.0]).repeat(4, 1).half()
    x[1::2] = x[1::2].flip(1)
    codec = Integers(bits, block)
    parts = codec.encode(x)
    assert all(part.isfinite().all() for part in parts.values())
    exact = Integers(bits, block)
    expected = exact.decode(exact.encode(x.double()), 4, 4, torch.float64)
    found = codec.decode(parts, 4, 4, torch.float16)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=64)


def test_one_bit_is_the_least_or_the_greatest_value_exactly() -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).half()
    codec = Integers(1, 8)
    found = codec.decode(codec.encode(x), 5, 8, torch.float16)
    least, most = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    assert found.equal(torch.where(x.double() - least.double() > (most.double() - least.double()) / 2, most, least))
