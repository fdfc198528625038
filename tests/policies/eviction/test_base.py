"""How eviction keeps to a budget: the slots of a layer are the most that fit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from contextlab.ops.kv import KVLayer
from contextlab.policies import EvictionPolicy, build_policy, parse_policy
from contextlab.state import tensor_bytes

POLICIES = (
    "streaming_llm:sinks=1",
    "h2o:window=3",
    "snapkv:window=4",
    "streaming_llm:reposition=true",
    "h2o:window=2|quantize:bits=2,group=8,window=8",
    "keydiff:window=2|fp8",
)


@given(
    text=st.sampled_from(POLICIES),
    amount=st.floats(0.01, 0.99),
    length=st.integers(1, 700),
    batch=st.integers(1, 3),
    half=st.booleans(),
)
def test_the_slots_are_the_most_that_fit(text: str, amount: float, length: int, batch: int, half: bool) -> None:
    policy, layer = parse_policy(text, amount), KVLayer(0, 2, 4, 2, 16, 8, 0.25, turn=lambda x, steps: x)
    assert isinstance(policy, EvictionPolicy)
    dtype = torch.bfloat16 if half else torch.float32
    allowed = amount * length * tensor_bytes(batch, 2, 24, dtype=dtype)
    rest = tensor_bytes(batch, dtype=torch.int64)  # where rows begin
    rest += tensor_bytes(batch, policy.observe, 4, 16, dtype=dtype) if policy.observe else 0
    rest += tensor_bytes(batch, 2, dtype=torch.int64) if policy.reposition else 0
    mass = tensor_bytes(batch, 2, dtype=torch.float32) if policy.accumulates else 0
    fit = [n for n in range(length + 2) if rest + policy.holder.nbytes(n, layer, batch, dtype) + n * mass <= allowed]
    assert policy.slots(layer, length, batch, dtype) == max(max(fit, default=0), policy.protected + 1)


def test_a_budget_in_tokens_is_that_many_slots() -> None:
    layers = [KVLayer(i, 3, 4, 2, 16, 8, 0.25) for i in range(3)]
    policy = build_policy("h2o", budget="60tok", window=8, pyramid=2.0)
    assert isinstance(policy, EvictionPolicy)
    assert [policy.slots(layer, 1000, 1, torch.float32) for layer in layers] == [90, 60, 30]
