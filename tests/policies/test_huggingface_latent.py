"""Policies at transformers models that cache a latent, and at modules that attend more than once in a forward."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.evaluation.compress import compress
from contextlab.models import HuggingFaceModel
from contextlab.policies import build_policy
from contextlab.policies.storage.packed import Packed
from contextlab.testing.policy_readings import read
from tests.models.checkpoints import BASE, reference
from tests.policies.test_huggingface import LATENT, compressed_afterwards, other, padding, tokens

transformers = pytest.importorskip("transformers", minversion="5")

TOKEN = 2 * (LATENT["kv_lora_rank"] + LATENT["qk_rope_head_dim"]) * 8  # bytes of a token in two layers
KIMI = {**LATENT, "linear_head_dim": 8, "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
MODELS = {"deepseek_v2": LATENT, "deepseek_v3": {**LATENT, "q_lora_rank": 6}, "minicpm3": LATENT, "kimi_linear": KIMI}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.no_grad():
        yield


@functools.cache
def latent(kind: str) -> HuggingFaceModel:
    """float64."""
    return HuggingFaceModel(other(kind, **MODELS[kind]))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["h2o", "ada_kv", "quest", "streaming_llm"])
def test_a_policy_with_room_for_all_changes_nothing(kind: str, name: str) -> None:
    reader, x = latent(kind), tokens(36)
    mask = padding(x)
    expected, _, _ = read(reader, x, [20, 12], mask)
    with build_policy(name, budget="100%", window=4).attach(reader):
        got, state, _ = read(reader, x, [20, 12], mask)
    torch.testing.assert_close(got[mask], expected[mask], rtol=0, atol=1e-9)
    assert state.length == 36
    assert not any({"expand_kv", "entry"} & set(vars(module)) for module in reader.modules())
    torch.testing.assert_close(read(reader, x, [20, 12], mask)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("budget", [25, 75])
def test_a_budget_is_of_what_the_model_holds(kind: str, budget: int) -> None:
    reader, x = latent(kind), tokens(200, batch=1)
    _, full = reader.read(x)
    assert full.nbytes == 200 * TOKEN + 8  # and the row's padding
    for name in ("h2o", "keydiff", "pyramid_kv", "ada_kv"):
        with build_policy(name, budget=f"{budget}%", window=4).attach(reader):
            _, state = reader.read(x)
        asked = 200 * TOKEN * budget / 100
        # What is left over is less than a token of each layer, or 1%.
        assert asked - max(0.01 * asked, 2 * (TOKEN / 2 + 8)) <= state.nbytes - 8 <= asked, name


def test_the_latent_is_what_is_quantized() -> None:
    """Each number within half a step of the range of its channel in its group of tokens, by hand of the plain cache."""
    reader, x = latent("deepseek_v3"), tokens(32)
    policy = build_policy("quantize", bits=8, group=8, window=0)
    _, plain = reader.read(x)
    held: list[Tensor] = []
    reader.recached(
        plain, lambda cache, *_: held.extend(torch.cat((layer.keys, layer.values), -1) for layer in cache.layers)
    )
    with policy.attach(reader):
        _, state = reader.read(x)
    found = [left.packed for _, left in policy.states(reader, state)]
    # The first layer reads what it reads without a policy; the second is one piece, answered before it is encoded.
    for exact, packed in zip(held, found, strict=True):
        assert isinstance(packed, Packed)
        groups = exact.unflatten(2, (4, 8))
        step = (groups.amax(3, keepdim=True) - groups.amin(3, keepdim=True)) / 255
        off = (packed["keys"].unflatten(2, (4, 8)) - groups).abs()
        assert bool((off <= step * 0.502 + 1e-12).all())
        assert float(off.max()) > 0
    codes = 32 * 2 * TOKEN / 8
    assert 3 * codes < state.nbytes < 3 * codes + 100  # with a scale and a zero, of 8 bytes, for eight codes


@pytest.mark.parametrize("kind", ["deepseek_v2", "kimi_linear"])
def test_a_state_that_was_read_without_it_is_compressed(kind: str) -> None:
    _, kept, state = compressed_afterwards(latent(kind), tokens())
    assert abs(kept.nbytes - state.nbytes) <= 16  # the rows' padding may be shared


def test_positions_are_changed_as_the_model_turns_them() -> None:
    layer = build_policy("h2o").layers(latent("deepseek_v3"))[0]
    assert layer.turn is not None
    assert (layer.kv_heads, layer.key_dim, layer.value_dim, layer.latent) == (1, 12, 0, 8)


def test_compress_measures_a_model_that_keeps_a_latent() -> None:
    torch.manual_seed(0)
    reader = HuggingFaceModel(other("deepseek_v3", **{**LATENT, "vocab_size": 300}))
    found = compress(reader, ["h2o:window=4", "quantize:group=8,window=8"], ["50%"], ["needle"], [192], prompts=2)
    size = found[found["metric"] == "state_bytes"].set_index("model")["value"]
    full = found[(found["metric"] == "state_bytes") & (found["split"] == "full")]["value"].iloc[0]
    assert 0.4 * full < size["h2o:window=4"] <= 0.5 * full + 16
    assert size["quantize:group=8,window=8"] < 0.5 * full


def test_what_only_shows_in_a_forward_is_refused_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS, LlamaAttention

    original = LlamaAttention.forward

    @functools.wraps(original)
    def twice(self: Any, *args: Any, **options: Any) -> Any:
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        none = torch.zeros(2, 4, 1, 8, dtype=torch.float64)
        attend(self, none, none[:, :2], none[:, :2], None)
        return original(self, *args, **options)

    @functools.wraps(original)
    def elsewhere(self: Any, *args: Any, **options: Any) -> Any:
        own, self.layer_idx = self.layer_idx, 1 - self.layer_idx
        try:
            return original(self, *args, **options)
        finally:
            self.layer_idx = own

    model = HuggingFaceModel(reference("llama"))
    assert BASE["num_attention_heads"] == 4
    for forward, message in (
        (twice, "attention more than once in a forward"),
        (elsewhere, "another layer of the cache"),
    ):
        monkeypatch.setattr(LlamaAttention, "forward", forward)
        with build_policy("h2o").attach(model), pytest.raises(InputError, match=message):
            model.read(tokens())
