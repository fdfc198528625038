"""Import with every key of a configuration off its default: the same function, or one line that says what is amiss."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlab.errors import InputError
from contextlab.models.imports import _scaling, native_model
from contextlab.models.mlp import hidden_width
from contextlab.ops import rope_frequencies
from contextlab.ops.position import RopeScaling

from .checkpoints import exactly, reference

transformers = pytest.importorskip("transformers", minversion="5")

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

IDS = {"pad_token_id": 3, "bos_token_id": 4, "eos_token_id": 5, "initializer_range": 0.3, "use_cache": False}
ATTENTION = {
    **IDS, "vocab_size": 37, "hidden_size": 24, "intermediate_size": 41, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "rms_norm_eps": 0.07,
    "max_position_embeddings": 99, "attention_dropout": 0.25,
    "rope_parameters": {"rope_type": "default", "rope_theta": 37.0},
}  # fmt: skip
STEPS = {
    "time_step_min": 0.01, "time_step_max": 0.2, "time_step_floor": 1e-3, "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
}  # fmt: skip
SSM = {**IDS, **STEPS, "vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 3, "state_size": 5, "conv_kernel": 3}

# Each key off its default, all at once, where the import is the same function ...
IMPORTED: dict[str, dict[str, Any]] = {
    "llama": {**ATTENTION, "attention_bias": True, "tie_word_embeddings": True, "pretraining_tp": 2},
    "mistral": {**ATTENTION, "sliding_window": 5, "tie_word_embeddings": True},
    "qwen2": {
        **{key: value for key, value in ATTENTION.items() if key != "head_dim"},
        "tie_word_embeddings": True, "sliding_window": 3, "max_window_layers": 1,
    },
    "gemma": {**ATTENTION, "attention_bias": True, "tie_word_embeddings": False},
    "qwen3": {
        **ATTENTION, "attention_bias": True, "tie_word_embeddings": True, "sliding_window": 3, "max_window_layers": 1,
    },
    "mamba": {
        **SSM, "expand": 3, "layer_norm_epsilon": 0.05, "tie_word_embeddings": False, "time_step_rank": 7,
        "time_step_scale": 2.0, "time_step_init_scheme": "constant", "use_mambapy": True, "use_associative_scan": False,
    },
    "mamba2": {
        **SSM, "expand": 3, "num_heads": 6, "head_dim": 12, "n_groups": 1, "chunk_size": 4, "time_step_rank": 7,
        "tie_word_embeddings": True,
    },
}  # fmt: skip

# ... and those that are refused, one at a time.
REFUSED: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "gelu", "mlp_bias": True},
    "mistral": {"hidden_act": "gelu"},
    "gemma": {"hidden_act": "silu", "use_bidirectional_attention": True},
    "qwen2": {
        "hidden_act": "gelu", "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "qwen3": {
        "hidden_act": "gelu", "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "mamba": {"hidden_act": "gelu", "use_bias": True, "use_conv_bias": False},
    "mamba2": {
        "hidden_act": "gelu", "use_bias": True, "use_conv_bias": False, "layer_norm_epsilon": 0.05,
        "time_step_limit": (0.0, 0.3),
    },
}  # fmt: skip


def scaled(kind: str, **keys: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 90.0, **keys}}


YARN = {"factor": 6.0, "original_max_position_embeddings": 33}
ROPES = {
    "linear": scaled("linear", factor=2.5),
    "llama3": scaled(
        "llama3", factor=6.0, low_freq_factor=1.5, high_freq_factor=3.5, original_max_position_embeddings=33
    ),
    "yarn": scaled("yarn", **YARN),
    "yarn-betas": scaled("yarn", **YARN, beta_fast=3.0, beta_slow=0.5),
    "yarn-factor": scaled("yarn", **YARN, attention_factor=0.7),
    "yarn-mscale": scaled("yarn", **YARN, mscale=0.6, mscale_all_dim=1.7),
}


def both(kind: str, **changes: Any) -> tuple[Any, Any]:
    theirs = reference(kind, **{**IMPORTED[kind], **changes})
    return theirs, native_model(theirs.config, dict(theirs.state_dict()), "here")


@pytest.mark.parametrize("kind", IMPORTED)
def test_the_table_knows_every_key(kind: str) -> None:
    """A key that a release of transformers adds must be imported, refused or found to change nothing."""
    keys = set(type(transformers.AutoConfig.for_model(kind)).__annotations__) - {"model_type"}
    assert keys <= {*IMPORTED[kind], *REFUSED[kind]}
    plain = transformers.AutoConfig.for_model(kind)
    same = [key for key in keys if getattr(plain, key) == {**REFUSED[kind], **IMPORTED[kind]}[key]]
    assert same == []  # off their default indeed


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *(pytest.param(kind, {}, id=kind) for kind in IMPORTED),
        *(
            pytest.param(kind, {"tie_word_embeddings": not IMPORTED[kind]["tie_word_embeddings"]}, id=f"{kind}-untied")
            for kind in IMPORTED
        ),
        pytest.param("mistral", {"sliding_window": None}, id="mistral-without-a-window"),
        *(pytest.param("llama", rope, id=name) for name, rope in ROPES.items()),
    ],
)
def test_the_function_is_the_same(kind: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = both(kind, **changes)
    tokens = torch.randint(6, 37, (2, 23), generator=torch.Generator().manual_seed(0))
    if kind in (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
    ):  # frequencies in float32 show beyond 1e-8: see the test of them
        mixer, rotary = ours.blocks[0].mixer, theirs.model.rotary_emb
        exact, sharpen = rope_frequencies(mixer.rotary, mixer.rope_base, mixer.rope_scaling)
        torch.testing.assert_close(rotary.inv_freq.double(), exact, rtol=1e-6, atol=0)
        assert rotary.attention_scaling == pytest.approx(sharpen, rel=1e-12)
        rotary.inv_freq = exact
    with torch.no_grad(), exactly(monkeypatch):
        expected = theirs(tokens, use_cache=False).logits
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-8)
    assert expected.std() > 0.05


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in REFUSED.items() for key in keys])
def test_what_has_no_like_is_refused_in_one_line(kind: str, key: str) -> None:
    changes = {key: REFUSED[kind][key]}
    with pytest.raises(InputError, match=rf"here: {key} = .* imported natively \(only .*; leave out native") as error:
        both(kind, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        scaled("dynamic", factor=2.0),
        scaled(
            "longrope", factor=2.0, short_factor=[1.0] * 5, long_factor=[2.0] * 5, original_max_position_embeddings=33
        ),
        scaled("yarn", **YARN, truncate=False),
        scaled("default", partial_rotary_factor=0.5),
    ],
    ids=["dynamic", "longrope", "yarn", "partial"],
)
def test_rotary_positions_without_a_like_are_refused(changes: dict[str, Any]) -> None:
    config = transformers.AutoConfig.for_model("llama", **{**IMPORTED["llama"], **changes})
    with pytest.raises(InputError, match=r"here: .* imported natively \(.*\); leave out native") as error:
        native_model(config, {}, "here")
    assert "\n" not in str(error.value)


def maybe(values: st.SearchStrategy[float]) -> st.SearchStrategy[float | None]:
    return st.none() | values


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["default", "linear", "llama3", "yarn"]))
    keys: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.floats(2, 1e7))}
    if kind != "default":
        keys["factor"] = draw(st.floats(1, 64))
    if kind in ("llama3", "yarn"):
        keys["original_max_position_embeddings"] = draw(st.integers(2, 200_000))
    if kind == "llama3":
        keys["low_freq_factor"] = draw(st.floats(0.1, 4))
        keys["high_freq_factor"] = keys["low_freq_factor"] + draw(st.floats(0.1, 8))
    if kind == "yarn":
        slow = draw(maybe(st.floats(0.1, 4)))
        options = {
            "beta_slow": slow,
            "beta_fast": draw(maybe(st.floats(5, 64))),
            "attention_factor": draw(maybe(st.floats(0.2, 3))),
            "mscale": draw(maybe(st.floats(0.1, 2))),
            "mscale_all_dim": draw(maybe(st.floats(0.1, 2))),
        }
        keys |= {name: value for name, value in options.items() if value is not None or draw(st.booleans())}
    return keys


@settings(max_examples=300, deadline=None)
@given(ropes(), st.sampled_from([2, 8, 10, 64, 128]))
def test_frequencies_and_attention_factors_are_those_of_transformers(rope: dict[str, Any], head_dim: int) -> None:
    config = transformers.LlamaConfig(head_dim=head_dim, rope_parameters=rope, max_position_embeddings=4096)
    if rope["rope_type"] == "default":
        expected, factor = (
            transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config)
        )
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    scaling = _scaling(config, "here")
    parsed = RopeScaling.parse(scaling, "here") if scaling else None
    got, sharpen = rope_frequencies(head_dim, rope["rope_theta"], parsed)
    # They compute in float32, where a ramp that ends between two pairs multiplies the rounding.
    torch.testing.assert_close(got, expected.double(), rtol=3e-5, atol=0)
    assert sharpen == pytest.approx(factor, rel=1e-9)


def test_a_yarn_without_a_factor_takes_that_of_the_lengths() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": None, "original_max_position_embeddings": 1000}
    config = transformers.LlamaConfig(head_dim=16, rope_parameters=rope, max_position_embeddings=5000)
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    got, sharpen = rope_frequencies(16, 1e4, RopeScaling.parse(_scaling(config, "here"), "here"))
    torch.testing.assert_close(got, expected.double(), rtol=1e-6, atol=0)
    assert sharpen == pytest.approx(factor, rel=1e-12)


def test_sizes_of_the_mlp_are_kept_whatever_they_are() -> None:
    for hidden in (24, 56, 896, 2048, 3584, 4096):
        for intermediate in range(hidden, 4 * hidden, 7):
            assert hidden_width(hidden, intermediate * 1.5 / hidden, gated=True) == intermediate


NORM_BY_GROUP = (
    "group_size" in inspect.signature(transformers.models.mamba2.modeling_mamba2.MambaRMSNormGated).parameters
)


@pytest.mark.skipif(not NORM_BY_GROUP, reason="this release of transformers normalizes all groups of Mamba-2 together")
def test_groups_of_mamba2_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = both("mamba2", n_groups=3)
    tokens = torch.randint(6, 37, (2, 23), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), exactly(monkeypatch):
        torch.testing.assert_close(ours(tokens), theirs(tokens, use_cache=False).logits, rtol=0, atol=1e-8)
