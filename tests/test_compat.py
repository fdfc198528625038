"""Names are asked of what is there."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from contextlab.compat import cache_argument, cache_name


def test_a_cache_is_found_under_any_of_its_names() -> None:
    for name in ("cache", "past_key_values", "cache_params", "state"):
        assert cache_name(["logits", name, "hidden_states"]) == name
    assert cache_name(["logits", "cache_position", "use_cache"]) is None
    assert cache_name(["past_key_values", "cache"]) == "cache"  # the newer name, where both are there


def test_an_argument_is_asked_for_through_decorators() -> None:
    def forward(x: int, past_key_values: Any = None) -> int:
        return x

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> int:
        return forward(*args, **kwargs)

    assert cache_argument(wrapped) == "past_key_values"
    assert cache_argument(lambda cache_position=None, use_cache=True: None) is None


def test_the_installed_transformers_answers() -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    assert cache_argument(transformers.LlamaForCausalLM.forward) in ("cache", "past_key_values")
    assert cache_argument(transformers.MambaForCausalLM.forward) in ("cache", "cache_params")
    assert cache_argument(transformers.RwkvForCausalLM.forward) == "state"
    assert cache_argument(transformers.OpenAIGPTLMHeadModel.forward) is None
    assert cache_argument(transformers.XLMWithLMHeadModel.forward) is None  # its `cache` is its own
