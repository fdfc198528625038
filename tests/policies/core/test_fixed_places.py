"""Layers whose first tokens keep plain rotary positions: policies that turn no keys serve them, the others say no."""

from __future__ import annotations

import pytest
import torch

from contextlab import registry
from contextlab.errors import InputError
from contextlab.models.prefill import LazyPrefill
from contextlab.policies import StreamingLLM
from contextlab.testing import policies as laws

from .test_latent import POLICIES, built

SCALING = {"kind": "longrope", "factor": 4.0, "factors": [1.0, 1.5, 2.0, 5.0], "original_length": 8, "plain_tokens": 5}


def fixed_model():
    return laws.model(rope_scaling=SCALING)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_changes_nothing_or_is_refused_before_it_reads(name: str) -> None:
    reader, x = fixed_model(), laws.tokens(2, 24)
    mask = None if name == "kvzip" else laws.masked(x, (0, 7))
    entry = registry.lookup("policy", name)
    policy = entry.build(**(entry.cases[0] if entry.cases else {}))
    if policy.turns:
        with pytest.raises(InputError, match="turns keys to other places"):
            policy.layers(reader)
        return
    with torch.no_grad():
        expected, _, _ = laws.read(reader, x, [24], mask)
    full = built(name, reader, x, mask, budget="64tok" if name == "topk" else "100%")
    real = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.clone()
    if not full.lossless:
        real[:, 20:] = False
    with full.attach(reader):
        got, _, _ = laws.read(reader, x, [20], mask)
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-9)
    if "budget" in {each.name for each in entry.parameters}:  # nor does it turn anything when it drops tokens
        with built(name, reader, x, mask, budget="16tok").attach(reader):
            laws.read(reader, x, [20], mask)


def test_what_turns_keys_is_refused() -> None:
    reader = fixed_model()
    with pytest.raises(InputError, match="turns keys to other places"):
        StreamingLLM(budget="16tok", window=4, reposition=True).layers(reader)
    with pytest.raises(InputError, match="without short_conv, plain_tokens and shared keys"):
        LazyPrefill(reader, {0: 0.5})
    with pytest.raises(InputError, match="keys cannot be turned to other places"):
        reader.blocks[0].mixer.kv_layer().turn(torch.zeros(1, 1, 4, 8), torch.ones(1, 1, 1, dtype=torch.int64))
