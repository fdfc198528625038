"""No causal mixer is without a recurrence of its paper that is written apart from it."""

from __future__ import annotations

from importlib import import_module

import pytest

from contextlab import registry
from tests.mixers.recurrence import REFERENCES

FAMILIES = ("delta", "linear", "recurrent", "softmax", "sparse", "state_space", "static", "test_time")

# Mixers whose definition, token by token from the parameters, stands in a test of their own, because they need more
# than x (token ids, other mixers) or because segments are told more plainly than tokens.
ELSEWHERE = {
    "carope_attention": "softmax.test_rotary:test_carope_token_by_token",
    "clex_attention": "softmax.test_rotary:test_clex_query_by_query",
    "complex_attention": "softmax.test_complex_attention:test_scores_by_their_definition",
    "core_context": "sparse.test_core_context:test_agrees_with_the_definition",
    "fan_attention": "softmax.test_fan_attention:test_the_formula",
    "gali_attention": "softmax.test_rotary:test_gali_query_by_query",
    "gated_window": "hybrid.test_gated_window:test_it_is_half_a_window_and_half_a_gated_recurrence",
    "hierarchical_memory": "segment.test_hierarchical:test_hierarchical_memory_is_its_description",
    "infini_attention": "segment.test_segments:test_infini_attention",
    "lawcat": "linear.test_lawcat:test_it_is_a_gated_mean_of_convolved_features",
    "lizard": "hybrid.test_lizard:test_it_is_a_gated_mean_of_features_and_a_window_with_meta_tokens",
    "lm2": "segment.test_lm2:test_lm2_is_its_formulas",
    "mla": "softmax.test_latent:test_is_attention_over_keys_and_values_made_from_the_latent",
    "ngram": "static.test_ngram:test_what_is_read_is_what_followed_the_same_tokens",
    "parallel": "hybrid.test_parallel:test_outputs_are_joined_as_told",
    "recurrent_memory": "segment.test_segments:test_recurrent_memory",
    "sentinel": "segment.test_sentinel:test_sentinel_is_its_description",
    "shaped_attention": "softmax.test_shaped_attention:test_shaped_matrices_by_their_definition",
    "sse": "linear.test_sse:test_agrees_with_the_recurrence",
    "supra": "linear.test_supra:test_it_is_a_normed_sum_of_rotated_features_that_decay",
    "transformer_xl": "segment.test_segments:test_transformer_xl",
    "window_linear": "hybrid.test_window_linear:test_features_are_of_rotated_queries_and_keys",
}


def test_every_causal_mixer_has_a_recurrence_written_apart() -> None:
    for family in FAMILIES:
        import_module(f"tests.mixers.{family}.test_recurrence")
    ours = [entry for entry in registry.entries("mixer") if entry.factory.__module__.startswith("contextlab.")]
    causal = {entry.name for entry in ours if entry.factory.causal}  # type: ignore[attr-defined]
    assert set(REFERENCES) | set(ELSEWHERE) == causal
    assert not set(REFERENCES) & set(ELSEWHERE)


@pytest.mark.parametrize("place", ELSEWHERE.values())
def test_the_tests_of_their_own_are_there(place: str) -> None:
    module, _, test = place.partition(":")
    assert callable(getattr(import_module(f"tests.mixers.{module}"), test))
