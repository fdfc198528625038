"""Hugging Face checkpoints as models of our own stack: the same function, so the same logits.

In float64 the logits agree within 1e-8 with those of transformers where it computes in float64, too; as it is, it casts
norms, rotations and scans to float32 on the way, which shows as differences of up to 1e-6.

An architecture is imported when every option of its configuration has its like here; else it is refused, with what
stands in the way, and the adapter (`contextlab.models.load` without `native`) still runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from contextlab.errors import InputError, nearest
from contextlab.models.build import build_model
from contextlab.models.spec import ModelSpec
from contextlab.models.stack import Model
from contextlab.ops.position import pairs_of_halves

Tensors = dict[str, Tensor]


def native_model(config: Any, tensors: Tensors, source: str) -> Model:
    """Our model with the weights of a checkpoint.

    config: the checkpoint's transformers configuration. tensors: of any shape, by their names in the checkpoint;
    both already checked. source: for messages.

    Raises InputError when the architecture, or an option of it, has no like here.
    """
    spec, convert = _imported(config, source)
    model = build_model(ModelSpec.parse(spec, source)).to(next(iter(tensors.values())).dtype)
    weights = convert(tensors)
    if not config.tie_word_embeddings:
        weights["read_out.weight"] = tensors["lm_head.weight"]
    elif spec["tied"]:
        weights["read_out.weight"] = weights["read_in.weight"]
    # else: `convert` has given it
    model.load_state_dict(weights)
    return model


def native_spec(config: Any, source: str) -> ModelSpec:
    """The spec of the model that `native_model` would make, without its weights; arguments and errors are its."""
    return ModelSpec.parse(_imported(config, source)[0], source)


def _imported(config: Any, source: str) -> tuple[dict[str, Any], Callable[[Tensors], Tensors]]:
    kind = config.model_type
    if kind not in ARCHITECTURES:
        near = nearest(kind, ARCHITECTURES)
        hint = f"the nearest is {near!r}; " if near else ""
        raise InputError(
            f"{source}: {kind!r} cannot be imported natively (known: {', '.join(sorted(ARCHITECTURES))}); {hint}"
            "leave out native=True to run it through transformers"
        )
    return ARCHITECTURES[kind](config, source)


def _refuse_unless(source: str, **facts: tuple[Any, Any]) -> None:
    """facts: option -> (what the checkpoint has, what alone can be imported)."""
    for option, (has, can) in facts.items():
        if has != can:
            raise InputError(
                f"{source}: {option} = {has!r} cannot be imported natively (only {can!r}); leave out "
                "native=True to run the model "
                "through transformers"
            )


def _common(config: Any, eps: float) -> dict[str, Any]:
    return {
        "width": config.hidden_size,
        "depth": config.num_hidden_layers,
        "norm": "rms",
        "norm_eps": eps,
        "read_in": "token",
        "input_size": config.vocab_size,
        "output_size": config.vocab_size,
        "tied": bool(config.tie_word_embeddings),
        "read_out_bias": False,
    }


def _llama(config: Any, source: str) -> tuple[dict[str, Any], Callable[[Tensors], Tensors]]:
    """Llama (2302.13971), Mistral (2310.06825), Qwen2 (2407.10671), Qwen3 (2505.09388) and Gemma (2403.08295).

    All are attention and a gated MLP, both after RMS norms. Qwen2's projections have biases, its output has none: ours
    is zero there. Gemma multiplies normed vectors by 1 + w and embedded tokens by the root of the width: the imported
    weights hold both, so that read-in and read-out, which are one matrix there, are two here.
    """
    rope = config.rope_parameters
    gemma = config.model_type == "gemma"
    act = "gelu_pytorch_tanh" if gemma else "silu"
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    bias = config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))
    normed = config.model_type == "qwen3"
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    _refuse_unless(
        source,
        partial_rotary_factor=(rope.get("partial_rotary_factor", 1.0), 1.0),
        hidden_act=(config.hidden_act, act),
        mlp_bias=(bool(getattr(config, "mlp_bias", False)), False),
        use_bidirectional_attention=(bool(getattr(config, "use_bidirectional_attention", False)), False),
        use_sliding_window=(bool(getattr(config, "use_sliding_window", False)), False),
        layer_types=(sorted(set(getattr(config, "layer_types", None) or ["full_attention"])), ["full_attention"]),
    )
    options: dict[str, Any] = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "rope_base": float(rope["rope_theta"]),
        "bias": bias,
    }
    scaling = _scaling(config, source)
    if scaling:
        options["rope_scaling"] = scaling
    if normed:
        options |= {"qk_norm": True, "norm_eps": config.rms_norm_eps}
    mixer = "attention" if window is None else "sliding_window"
    if window is not None:
        options["window"] = window
    spec = {
        **_common(config, config.rms_norm_eps),
        "heads": 1,  # the layers' options say it
        "position": "rope",
        "layers": [{"mixer": mixer, "options": options}],
        "mlp": {"kind": "geglu", "options": {"tanh": True}} if gemma else "swiglu",
        "mlp_ratio": config.intermediate_size * 1.5 / config.hidden_size,
    }
    if gemma:
        spec["tied"] = False

    def gain(weight: Tensor) -> Tensor:
        """Of a norm, [D]."""
        return weight + 1 if gemma else weight

    def pairs(rows: Tensor) -> Tensor:
        """Rows [heads * head_dim, ...] of a query or key projection, reordered for rotation in pairs."""
        by_head = rows.unflatten(0, (-1, head_dim)).movedim(1, -1)
        return pairs_of_halves(by_head, head_dim).movedim(-1, 1).flatten(0, 1)

    def convert(tensors: Tensors) -> Tensors:
        embedded = tensors["model.embed_tokens.weight"]
        found = {"read_in.weight": embedded, "read_out_norm.weight": gain(tensors["model.norm.weight"])}
        if gemma:
            root = torch.tensor(config.hidden_size**0.5, dtype=torch.float32).to(embedded.dtype)  # rounded as theirs is
            found |= {"read_in.weight": embedded * root, "read_out.weight": embedded}
        for i in range(config.num_hidden_layers):
            theirs, ours = f"model.layers.{i}.", f"blocks.{i}."
            for part in ("weight", "bias") if bias else ("weight",):
                q, k, v = (tensors[f"{theirs}self_attn.{name}_proj.{part}"] for name in "qkv")
                found[f"{ours}mixer.qkv_proj.{part}"] = torch.cat((pairs(q), pairs(k), v))
                o = tensors.get(f"{theirs}self_attn.o_proj.{part}")
                found[f"{ours}mixer.out_proj.{part}"] = q.new_zeros(config.hidden_size) if o is None else o
            for name in ("q_norm", "k_norm") if normed else ():
                found[f"{ours}mixer.{name}.weight"] = pairs(tensors[f"{theirs}self_attn.{name}.weight"])
            found[f"{ours}mixer_norm.weight"] = gain(tensors[f"{theirs}input_layernorm.weight"])
            found[f"{ours}mlp_norm.weight"] = gain(tensors[f"{theirs}post_attention_layernorm.weight"])
            gate, up = tensors[f"{theirs}mlp.gate_proj.weight"], tensors[f"{theirs}mlp.up_proj.weight"]
            found[f"{ours}mlp.up.weight"] = torch.cat((gate, up))
            found[f"{ours}mlp.out_proj.weight"] = tensors[f"{theirs}mlp.down_proj.weight"]
        return found

    return spec, convert


def _scaling(config: Any, source: str) -> dict[str, Any]:
    """Our `RopeScaling` of a checkpoint's `rope_parameters`; empty for none."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    names = {
        "default": {},
        "linear": {"factor": "factor"},
        "llama3": {
            "factor": "factor",
            "slow": "low_freq_factor",
            "fast": "high_freq_factor",
            "original_length": "original_max_position_embeddings",
        },
        "yarn": {
            "factor": "factor",
            "slow": "beta_slow",
            "fast": "beta_fast",
            "sharpen": "attention_factor",
            "original_length": "original_max_position_embeddings",
        },
        "longrope": {
            "factor": "factor",
            "factors": "long_factor",
            "sharpen": "attention_factor",
            "original_length": "original_max_position_embeddings",
        },
    }
    if kind == "longrope" and rope.get("long_factor") != rope.get("short_factor"):
        kind = "longrope with other factors for short texts than for long ones"
    if kind not in names or (kind == "yarn" and not rope.get("truncate", True)):
        raise InputError(
            f"{source}: rotary positions of type {kind!r} with these options cannot be imported natively (known: "
            f"{', '.join(names)}; of yarn without truncate = False); leave out native=True to run the model through "
            "transformers"
        )
    found = {ours: rope[theirs] for ours, theirs in names[kind].items() if rope.get(theirs) is not None}
    if kind == "longrope":
        found.setdefault("factor", max(1.0, config.max_position_embeddings / found["original_length"]))
    if kind == "yarn":
        found = {
            name: value for name, value in found.items() if value or name not in ("slow", "fast")
        }  # 0: as left out
        found.setdefault("factor", config.max_position_embeddings / found["original_length"])
        if rope.get("mscale") and rope.get("mscale_all_dim"):  # either alone counts for nothing
            over, under = (0.1 * rope[name] * math.log(found["factor"]) + 1 for name in ("mscale", "mscale_all_dim"))
            found.setdefault("sharpen", over / under)
    return {"kind": kind, **found} if found else {}


def _mamba(config: Any, source: str) -> tuple[dict[str, Any], Callable[[Tensors], Tensors]]:
    """Mamba (2312.00752)."""
    _refuse_unless(
        source,
        use_bias=(config.use_bias, False),
        use_conv_bias=(config.use_conv_bias, True),
        hidden_act=(config.hidden_act, "silu"),
        intermediate_size=(config.intermediate_size % config.hidden_size, 0),
    )
    options = {
        "state_size": config.state_size,
        "expand": config.intermediate_size // config.hidden_size,
        "dt_rank": int(config.time_step_rank),
        "short_conv": config.conv_kernel,
    }
    names = ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D", "out_proj.weight")
    return _ssm(config, "mamba", options, {name: name for name in names})


def _mamba2(config: Any, source: str) -> tuple[dict[str, Any], Callable[[Tensors], Tensors]]:
    """Mamba-2 (2405.21060)."""
    inner = config.num_heads * config.head_dim
    _refuse_unless(
        source,
        use_bias=(config.use_bias, False),
        use_conv_bias=(config.use_conv_bias, True),
        hidden_act=(config.hidden_act, "silu"),
        layer_norm_epsilon=(config.layer_norm_epsilon, 1e-5),
        time_step_limit=(tuple(config.time_step_limit), (0.0, float("inf"))),
        num_heads_times_head_dim=(inner % config.hidden_size, 0),
    )
    options = {
        "heads": config.num_heads,
        "state_size": config.state_size,
        "expand": inner // config.hidden_size,
        "groups": config.n_groups,
        "short_conv": config.conv_kernel,
    }
    names = {name: name for name in ("in_proj.weight", "A_log", "D", "dt_bias", "out_proj.weight")}
    return _ssm(config, "mamba2", options, {**names, "norm_weight": "norm.weight"})


def _ssm(
    config: Any, mixer: str, options: dict[str, Any], names: dict[str, str]
) -> tuple[dict[str, Any], Callable[[Tensors], Tensors]]:
    """What Mamba and Mamba-2 have in common. names: our tensor of the mixer -> theirs."""
    spec = {
        **_common(config, config.layer_norm_epsilon),
        "heads": 1,
        "position": "none",
        "layers": [{"mixer": mixer, "options": options}],
        "mlp": "none",
    }

    def convert(tensors: Tensors) -> Tensors:
        found = {
            "read_in.weight": tensors["backbone.embeddings.weight"],
            "read_out_norm.weight": tensors["backbone.norm_f.weight"],
        }
        for i in range(config.num_hidden_layers):
            theirs, ours = f"backbone.layers.{i}.", f"blocks.{i}."
            found[f"{ours}mixer_norm.weight"] = tensors[f"{theirs}norm.weight"]
            for own, other in names.items():
                found[f"{ours}mixer.{own}"] = tensors[f"{theirs}mixer.{other}"]
            found[f"{ours}mixer.conv.weight"] = tensors[f"{theirs}mixer.conv1d.weight"].squeeze(1)
            found[f"{ours}mixer.conv.bias"] = tensors[f"{theirs}mixer.conv1d.bias"]
        return found

    return spec, convert


ARCHITECTURES: dict[str, Callable[[Any, str], tuple[dict[str, Any], Callable[[Tensors], Tensors]]]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gemma": _llama,
    "mamba": _mamba,
    "mamba2": _mamba2,
}
