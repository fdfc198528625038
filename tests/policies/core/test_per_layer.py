"""Policies by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.policies import PerLayer, Policy, build_policy
from contextlab.policies.core.slots import KeptState
from contextlab.policies.storage.quantize import PackedState
from contextlab.state import KVState
from contextlab.testing import policies as laws
from tests.policies.core.test_base import padding

CASES: dict[str, Callable[..., Policy]] = {
    "two": lambda **more: PerLayer({0: build_policy("h2o", window=4, **more)}, build_policy("streaming_llm", **more)),
    "one": lambda **more: PerLayer({1: build_policy("h2o", window=4, **more)}),
    "stored": lambda **more: (
        PerLayer({0: None}, build_policy("h2o", window=4, **more)) | build_policy("quantize", group=4, window=2)
    ),
}
each = pytest.mark.parametrize("build", CASES.values(), ids=CASES)


@each
@padding
def test_a_full_budget_changes_nothing(build: Callable[..., Policy], pads: tuple[int, ...] | None) -> None:
    laws.hold_to_full_budget(build, pads)


@each
@pytest.mark.parametrize(
    "law",
    [
        laws.hold_to_older_states,
        laws.hold_to_batch,
        laws.hold_to_pieces,
        laws.hold_to_no_trace,
        laws.hold_to_refusal,
    ],
)
def test_the_laws_hold(build: Callable[..., Policy], law: Callable[..., None]) -> None:
    law(build)


def test_each_layer_is_served_by_its_own() -> None:
    reader, x = laws.model(depth=3), laws.tokens()
    quantize = build_policy("quantize", group=8, window=4)
    policy = PerLayer({0: None, 2: quantize}, default=build_policy("h2o", budget="24tok", window=4))
    with policy.attach(reader):
        _, state, _ = laws.read(reader, x, [50])
    assert [type(layer) for layer in state.layers] == [KVState, KeptState, PackedState]
    assert policy.needs == "the attention of all queries"
    nested = PerLayer({1: PerLayer({}, default=quantize)})
    assert nested.at(KVLayer(1, 3, 4, 2, 8, 8, 0.3)) is quantize
    assert not policy.lossless
    assert PerLayer({0: None}, default=build_policy("h2o")).lossless


def test_policies_of_one_budget_keep_to_it_together() -> None:
    reader, x = laws.model(), laws.tokens()
    with CASES["two"](budget="16kB").attach(reader):
        _, _, sizes = laws.read(reader, x, [40])
    assert 12_000 < max(sizes) <= 16_000


def test_a_state_is_compressed_after_reading() -> None:
    reader, x = laws.model(), laws.tokens()
    policy = PerLayer({1: build_policy("streaming_llm", budget="24tok")})
    with torch.no_grad():
        _, state = reader.read(x[:, :40])
    kept = policy.apply(state, reader)
    assert kept.layers[0] is state.layers[0]
    assert kept.layers[1].slots.used == 24


@pytest.mark.parametrize(
    ("policies", "default", "message"),
    [
        ({}, None, "no layer has a policy"),
        ({0: None}, None, "no layer has a policy"),
        ({-1: None}, None, "indices of layers from 0, got -1"),
        ({0: "h2o"}, None, "a policy or None for layer 0, got 'h2o'"),
        ({}, "h2o", "as the default, got 'h2o'"),
    ],
)
def test_what_is_no_map_is_refused(policies: Any, default: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PerLayer(policies, default)


def test_what_fits_no_layer_is_refused() -> None:
    h2o = build_policy("h2o", budget="24tok", window=4)
    with pytest.raises(InputError, match="no layer 2; the model has 2 with keys and values, the last is 1"):
        PerLayer({2: h2o})._places(laws.model())
    with pytest.raises(InputError, match="do not hold the 40 protected"):
        PerLayer({0: h2o, 1: build_policy("h2o", budget="24tok", window=40)})._places(laws.model())
    with pytest.raises(InputError, match="PerLayer | H2O: it does not store"):
        PerLayer({0: h2o}) | h2o
    with pytest.raises(InputError, match="Quantize keeps every token"):
        PerLayer({0: build_policy("quantize")}) | build_policy("quantize")
    with pytest.raises(InputError, match="layer 1 has no policy"):
        PerLayer({0: h2o}).convert(KVLayer(1, 2, 4, 2, 8, 8, 0.3), KVState(*torch.zeros(3, 1, 2, 0, 8)))
