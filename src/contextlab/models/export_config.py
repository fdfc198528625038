"""What a model of ours is as transformers' config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from contextlab.mixers.softmax.base import AttentionMixer
from contextlab.models.spec import ModelSpec
from contextlab.ops.position import RopeScaling, rope_factors, rope_frequencies

CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "gemma": "GemmaForCausalLM",
}  # fmt: skip
UNLIMITED = 1 << 20
"""Longest sequence where nothing bounds it; a number must be given."""


@dataclass(frozen=True)
class ExportPlan:
    """What all layers of a model have in common, and each one's window (None: all that was read)."""

    mixer: AttentionMixer
    windows: tuple[int | None, ...]
    hidden: int
    gate: str
    bias: bool  # whether queries, keys or values have any that is not zero
    out_bias: bool
    eps: float


def export_config(
    spec: ModelSpec, plan: ExportPlan, kind: str, tensors: Mapping[str, Tensor], like: Mapping[str, Any]
) -> dict[str, Any]:
    """The keys of config.json. tensors: theirs, of any shape. like: the config.json of what the model came from."""
    mixer, scaling = plan.mixer, plan.mixer.rope_scaling
    rope, reach = _rope(mixer)
    told = like.get("max_position_embeddings")
    scaled_already = (like.get("rope_parameters") or {}).get("rope_type", "default") != "default"
    longest = told or spec.max_length or (scaling.original_length if scaling is not None else None) or UNLIMITED
    if scaling is not None and not (told and scaled_already):
        longest = round(longest * reach)
    found: dict[str, Any] = {
        "architectures": [CLASSES[kind]], "model_type": kind, "dtype": str(next(iter(tensors.values())).dtype)[6:],
        "vocab_size": spec.input_size, "hidden_size": spec.width, "intermediate_size": plan.hidden,
        "num_hidden_layers": spec.depth, "num_attention_heads": mixer.heads, "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim, "hidden_act": plan.gate, "rms_norm_eps": plan.eps,
        "tie_word_embeddings": "lm_head.weight" not in tensors, "max_position_embeddings": longest,
        "rope_parameters": rope, "attention_dropout": 0.0, "use_cache": True,
        **{name: like.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }  # fmt: skip
    if kind in ("llama", "qwen3", "gemma"):
        found["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in tensors
    windows = [each for each in plan.windows if each is not None]
    if kind == "mistral":
        found["sliding_window"] = windows[0] if windows else None
    if kind in ("qwen2", "qwen3"):
        found |= {
            "use_sliding_window": bool(windows), "sliding_window": windows[0] if windows else None,
            "max_window_layers": spec.depth,
            "layer_types": ["full_attention" if each is None else "sliding_attention" for each in plan.windows],
        }  # fmt: skip
    return found


def _rope(mixer: AttentionMixer) -> tuple[dict[str, Any], float]:
    """Their `rope_parameters`, and how many times as long contexts become."""
    base, scaling = mixer.rope_base, mixer.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": base}, 1.0
    factor, length = scaling.factor, scaling.original_length
    slow, fast = scaling.turns()
    if scaling.kind == "llama3":
        return {
            "rope_type": "llama3", "rope_theta": base, "factor": factor, "low_freq_factor": slow,
            "high_freq_factor": fast, "original_max_position_embeddings": length,
        }, factor  # fmt: skip
    sharpen = rope_frequencies(mixer.rotary, base, scaling)[1]
    if scaling.kind == "yarn":
        return {
            "rope_type": "yarn", "rope_theta": base, "factor": factor, "beta_slow": slow, "beta_fast": fast,
            "attention_factor": sharpen, "original_max_position_embeddings": length,
        }, factor  # fmt: skip
    if scaling.kind == "ntk" and sharpen == 1:  # another base, and no more
        return {
            "rope_type": "default",
            "rope_theta": base * factor ** (mixer.rotary / max(mixer.rotary - 2, 1)),
        }, factor
    if scaling.kind == "linear" and sharpen == 1:
        return {"rope_type": "linear", "rope_theta": base, "factor": factor}, factor
    return _by_pair(mixer, scaling, sharpen), factor


def _by_pair(mixer: AttentionMixer, scaling: RopeScaling, sharpen: float) -> dict[str, Any]:
    """Any frequencies, by the factor that divides each pair's; alike for short contexts and for long ones."""
    factors = rope_factors(mixer.rotary, mixer.rope_base, scaling)
    return {
        "rope_type": "longrope", "rope_theta": mixer.rope_base, "factor": scaling.factor, "short_factor": factors,
        "long_factor": factors, "attention_factor": sharpen,
        "original_max_position_embeddings": scaling.original_length or 1,
    }  # fmt: skip
