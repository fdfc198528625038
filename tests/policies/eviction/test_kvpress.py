"""What is kept of a random Llama's prompt, against NVIDIA's kvpress, where both define the method.

kvpress 0.5.5 wants transformers below 5.3 and pandas below 3, older than what this project runs with, so it is no
extra of it: install both in an environment of their own (`pip install kvpress==0.5.5 pytest hypothesis`) and run this
file there with `src` on the path. Elsewhere it is skipped.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

kvpress = pytest.importorskip("kvpress", reason="kvpress needs an environment of its own; see this file's first lines")
transformers = pytest.importorskip("transformers")

from contextlab.ops.kv import KVLayer  # noqa: E402
from contextlab.policies import build_policy  # noqa: E402

HEADS, KV_HEADS, DIM, LENGTH, KEPT = 8, 4, 16, 96, 48


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=HEADS * DIM, intermediate_size=64, num_hidden_layers=3, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=DIM, max_position_embeddings=4096, attn_implementation="eager",
        initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    generator = torch.Generator().manual_seed(1)  # no token twice: rounding would choose between keys of equal norm
    return torch.stack([torch.randperm(256, generator=generator)[:LENGTH] for _ in range(2)])


def turn(model: Any) -> Any:
    def turned(x: Tensor, steps: Tensor) -> Tensor:
        angles = steps[..., None].double() * model.model.rotary_emb.inv_freq.double()
        first, second = x.double().chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)

    return turned


@torch.no_grad()
def projected(model: Any, prompt: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each layer's rotated queries and keys, and values: [B, T, H or Hkv, D]."""
    found = []
    hidden = model(prompt, output_hidden_states=True).hidden_states
    places = torch.arange(prompt.shape[1])[None, :, None]
    for block, x in zip(model.model.layers, hidden, strict=False):
        x, attention = block.input_layernorm(x), block.self_attn
        q, k, v = (f(x).unflatten(-1, (-1, DIM)) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
        found.append((turn(model)(q, places), turn(model)(k, places), v))
    return found


@torch.no_grad()
def kept_by_press(model: Any, prompt: Tensor, press: Any) -> list[Tensor]:
    """The places [B, Hkv, n] that each layer keeps, most important first, told by the keys that are left."""
    whole, cut = transformers.DynamicCache(), transformers.DynamicCache()
    model(prompt, past_key_values=whole)
    with press(model):
        model(prompt, past_key_values=cut)
    found = []
    for all_of, part in zip(whole.layers, cut.layers, strict=True):
        distance = torch.cdist(part.keys, all_of.keys, compute_mode="donot_use_mm_for_euclid_dist")
        assert distance.min(-1).values.max() < 1e-4
        found.append(distance.argmin(-1))
    return found


@torch.no_grad()
def states(model: Any, prompt: Tensor, policy: Any) -> list[Any]:
    layers = projected(model, prompt)
    at = [KVLayer(i, len(layers), HEADS, KV_HEADS, DIM, DIM, DIM**-0.5, turn=turn(model)) for i in range(len(layers))]
    return [(policy.attend(at[i], q, k, v, None)[1], at[i]) for i, (q, k, v) in enumerate(layers)]


RATIO = 1 - KEPT / LENGTH
PAIRS = [
    ("snapkv", {"window": 16}, lambda: kvpress.SnapKVPress(compression_ratio=RATIO, window_size=16)),
    ("tova", {}, lambda: kvpress.TOVAPress(compression_ratio=RATIO)),
    ("key_norm", {"sinks": 0, "window": 1}, lambda: kvpress.KnormPress(compression_ratio=RATIO)),
    ("keydiff", {"sinks": 0, "window": 1}, lambda: kvpress.KeyDiffPress(compression_ratio=RATIO)),
    ("streaming_llm", {}, lambda: kvpress.StreamingLLMPress(compression_ratio=RATIO, n_sink=4)),
    ("expected_attention", {"window": 1}, lambda: kvpress.ExpectedAttentionPress(compression_ratio=RATIO)),
    (
        "expected_attention",
        {"window": 1, "covariance": False, "future": 100, "epsilon": 0.02},
        lambda: kvpress.ExpectedAttentionPress(
            compression_ratio=RATIO, use_covariance=False, n_future_positions=100, epsilon=0.02
        ),
    ),
]


@pytest.mark.parametrize(("name", "options", "press"), PAIRS)
def test_the_same_tokens_are_kept(model: Any, prompt: Tensor, name: str, options: Any, press: Any) -> None:
    ours = states(model, prompt, build_policy(name, budget=f"{KEPT}tok", **options))
    for (state, _), theirs in zip(ours, kept_by_press(model, prompt, press()), strict=True):
        for row in range(len(prompt)):
            for head in range(KV_HEADS):
                expected = theirs[row, head].tolist()
                if LENGTH - 1 not in expected:  # ours keeps the last token whatever its score: in place of the least
                    expected = [*expected[:-1], LENGTH - 1]
                assert state.positions[row, head].tolist() == sorted(expected)


def test_accumulated_attention_is_the_same(model: Any, prompt: Tensor) -> None:
    """kvpress divides what a token got by the queries that could see it, and averages over query heads."""
    ours = states(model, prompt, build_policy("h2o"))
    press = kvpress.ObservedAttentionPress()
    attentions = model(prompt, output_attentions=True).attentions
    for (state, _), weights in zip(ours, attentions, strict=True):
        expected = press.score(None, None, state.slots["keys"], None, weights, {})
        able = torch.arange(LENGTH, 0, -1)
        torch.testing.assert_close(state.mass / (HEADS // KV_HEADS) / able, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("floor", [0.2, 0.6])
def test_heads_share_a_budget_in_the_same_way(model: Any, prompt: Tensor, floor: float) -> None:
    """kvpress's Ada-KV hides what it drops from each head: what is left is what ours holds, at a page of one token."""
    policy = build_policy("ada_kv", budget=f"{KEPT}tok", window=16, floor=floor, page=1)
    ours = states(model, prompt, policy)
    press = kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=RATIO, window_size=16), alpha_safeguard=floor)
    model.set_attn_implementation("sdpa")
    try:
        with press(model), torch.no_grad():
            model(prompt, past_key_values=transformers.DynamicCache())
        for (state, _), block in zip(ours, model.model.layers, strict=True):
            kept = torch.ones(len(prompt), KV_HEADS, LENGTH, dtype=torch.bool)
            kept[block.self_attn.masked_key_indices] = False
            assert state.places() == [[head.nonzero()[:, 0].tolist() for head in row] for row in kept]
            assert any(len(set(map(len, row))) > 1 for row in state.places())
    finally:
        for block in model.model.layers:
            block.self_attn.masked_key_indices = None
        model.set_attn_implementation("eager")
