"""A tiny configuration of every causal type that transformers has: its own defaults, with every size cut down.

Nothing of a type is written down but what the general rules get wrong (`FIXES`). Of layers that differ, one or two of
each kind stay, so that windows, recurrences, experts and shared caches are all there.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 64
WIDTH, HEADS, KV_HEADS, HEAD, HIDDEN = 32, 4, 2, 8, 48
WINDOW, CHUNK = 6, 8
LAYERS = 4
"""The most layers that stay, where they differ."""

SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size"), VOCABULARY
    ),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "lru_width"), WIDTH),
    **dict.fromkeys(("attention_hidden_size", "word_embed_proj_dim", "embedding_size", "hidden_size_global"), WIDTH),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "backbone_hidden_size"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "linear_num_value_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("index_n_heads", "n_mamba_heads", "mamba_n_heads", "mamba_num_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_query_groups", "num_kv_heads", "kv_n_heads"), KV_HEADS),
    **dict.fromkeys(("swa_num_key_value_heads", "linear_num_key_heads", "num_global_key_value_heads"), KV_HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "attention_head_size", "dim_head", "global_head_dim"), HEAD),
    **dict.fromkeys(("v_head_dim", "index_head_dim", "swa_head_dim", "swa_v_head_dim", "linear_head_dim"), HEAD),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "kv_channels"), HEAD),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "attention_head_dim"), HEAD),
    **dict.fromkeys(("qk_nope_head_dim",), 6),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("qk_head_dim",), 10),
    **dict.fromkeys(("mamba_headdim", "mamba_head_dim", "mamba_d_head"), 2 * WIDTH // HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dff", "dim_ff", "d_inner"), HIDDEN),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "intermediate_size_mlp"), HIDDEN),
    **dict.fromkeys(("dense_intermediate_size", "mlp_dim", "mlp_hidden_size", "feed_forward_size"), HIDDEN),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "router_hidden_size"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_intermediate_size", "moe_latent_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("moe_num_shared_experts", "o_groups", "mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "mamba_state_dim"), HEAD),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "gated_norm_rank", "loop_gate_rank", "hc_lowrank"), 4),
    **dict.fromkeys(("laurel_rank", "adapter_rank", "hidden_size_per_layer_input"), 4),
    **dict.fromkeys(("ple_embed_dim", "embed_dim"), HEAD),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size"), CHUNK),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("local_attention",), 2 * WINDOW),
    **dict.fromkeys(("attention_chunk_size",), CHUNK),
    **dict.fromkeys(("index_topk",), 5),
    **dict.fromkeys(("index_block_size",), 4),
    **dict.fromkeys(("index_topk_blocks",), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "model_max_length"), 128),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "context_length"), 128),
    **dict.fromkeys(("ngram_vocab_size_base",), 97),
    **dict.fromkeys(("encoder_hash_byte_group_vocab",), 50),
    **dict.fromkeys(("make_ngram_vocab_size_divisible_by",), 1),
    **dict.fromkeys(("split_ngram_parts", "num_buckets", "zero_expert_num", "prompt_types", "segment_types"), 4),
    **dict.fromkeys(("num_centroids", "centroid_intermediate_top_k", "altup_num_inputs"), 4),
    **dict.fromkeys(("dim_model_base",), WIDTH),
    **dict.fromkeys(("query_pre_attn_scalar",), HEAD),
    **dict.fromkeys(("num_nextn_predict_layers", "dropout", "layerdrop"), 0),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_mem_blocks", "num_layers_per_stack"), 1),
    **dict.fromkeys(("adapter_in_dim", "adapter_input_size", "adapter_out_dim"), WIDTH),
    **dict.fromkeys(("num_codebooks",), 2),
    **dict.fromkeys(("audio_vocab_size", "codebook_size"), VOCABULARY),
    "compress_rates": {"compressed_sparse_attention": 3, "heavily_compressed_attention": 5},
}
"""What a field becomes, in whatever configuration it stands. Numbers that are 0 or None stay so."""
DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
)
"""What the number of layers is called."""
TOKENS = ("_token_id", "_token_index", "unk_index", "mask_index", "pad_index")
DEEP = ("vision_config", "audio_config", "encoder", "audio_encoder", "text_encoder", "vq_config", "speech_config")
"""Parts that read something else than the text: cut down, and not called."""

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
FIXES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"head_dim": HEAD},
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {name: dict(ROPE) for name in ("sliding_attention", "full_attention")},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": KV_HEADS, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": {
        "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS, "swa_q_lora_rank": HEAD,
        "swa_kv_lora_rank": HEAD, "swa_head_dim": 10, "swa_qk_nope_head_dim": 6, "swa_v_head_dim": HEAD,
    },
    "dory": {
        "num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16},
    "falcon_h1": {"mamba_d_ssm": 2 * WIDTH},
    "gemma3n": {"num_kv_shared_layers": 2, "num_hidden_layers": 4, "activation_sparsity_pattern": None,
                "intermediate_size": HIDDEN, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_hidden_layers": 8},
    "hunyuan_v1_dense": {"head_dim": HEAD, "num_key_value_heads": KV_HEADS},
    "hunyuan_v1_moe": {"head_dim": HEAD, "num_key_value_heads": KV_HEADS},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4, "expert_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "mamba2": {"head_dim": 2 * WIDTH // HEADS},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse"],
    },
    "ministral": {"head_dim": HEAD},
    "mpt": {"attn_config": {"alibi": True}},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "qwen4_exp": {
        "indexer_n_heads": HEADS, "indexer_kv_heads": 1, "indexer_head_dim": HEAD, "indexer_budget": 8,
        "indexer_compress_ratio": 4, "ple_embed_dim": HEAD,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 16],
                 "axial_pos_embds_dim": [16, 16], "num_buckets": 4},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8, "pronunciation_embed_dim": 8,
                 "shape_embed_dim": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": HYBRID, "attention_head_dim": 2 * WIDTH // HEADS,
              "attention_hidden_size": 2 * WIDTH, "mamba_d_state": HEAD, "n_mamba_heads": 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": HYBRID, "attention_head_dim": 2 * WIDTH // HEADS,
               "attention_hidden_size": 2 * WIDTH, "hybrid_layer_ids": [1, 3], "num_mem_blocks": 1,
               "n_mamba_heads": HEADS, "mamba_headdim": 2 * WIDTH // HEADS},
    "xlstm": {
        "hidden_size": 128, "embedding_dim": 128, "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 4,
        "chunk_size": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What the rules get wrong, by type: fields of the configuration of the text."""
FIXES |= {"gemma3n_text": FIXES["gemma3n"], "qwen4_exp_text": FIXES["qwen4_exp"]}
FIXES |= {"dots3_note_text": FIXES["dots3_note"]}


def tiny(kind: str) -> Any:
    """The configuration of transformers of a causal type, cut down."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _built(CONFIG_MAPPING[kind], FIXES.get(kind, {}))


def _built(config_class: Any, fixes: dict[str, Any]) -> Any:
    """A configuration of this class with its own defaults cut down; fixes go to the part that describes the text."""
    parts = config_class.sub_configs
    text = next((name for name in ("text_config", "decoder", "decoder_config") if name in parts), None)
    default = _default(config_class)
    given: dict[str, Any] = {}
    for name, part in parts.items():
        own = getattr(default, name, None)
        if own is None:
            continue
        part = type(own)
        given[name] = _built(part, fixes if name == text else {})
    own_fields = {k: v for k, v in default.to_dict().items() if k not in parts}
    given |= _cut(own_fields, default)
    if text is None:
        given |= fixes
    given = {key: value for key, value in given.items() if value is not ...}
    return config_class(**given)


def _default(config_class: Any) -> Any:
    return config_class()


def _cut(fields: dict[str, Any], default: Any) -> dict[str, Any]:
    """The fields of a configuration that change, and what they become."""
    given: dict[str, Any] = {}
    depth_name = next((name for name in DEPTHS if isinstance(fields.get(name), int)), None)
    depth = fields[depth_name] if depth_name else 0
    by_layer = {
        name: value
        for name, value in fields.items()
        if isinstance(value, list) and depth > 1 and len(value) == depth and name not in ("architectures",)
    }
    places = _kinds(by_layer, depth)
    if depth_name:
        for name in DEPTHS:
            if isinstance(fields.get(name), int) and fields[name] > 0:
                given[name] = len(places)
    for name, value in by_layer.items():
        given[name] = [value[i] for i in places]
    for name, value in fields.items():
        if name in given or value is None:
            continue
        if name in SIZES and not isinstance(value, bool) and value != 0:
            given[name] = SIZES[name]
        elif isinstance(value, int | list) and not isinstance(value, bool) and name.endswith(TOKENS):
            given[name] = _token(name, value)
        elif name.endswith(("dropout", "_pdrop", "dropout_prob", "layerdrop")) and isinstance(value, int | float):
            given[name] = type(value)(0)
    if fields.get("is_decoder") is False and not fields.get("is_encoder_decoder"):
        given["is_decoder"] = True  # without it BERT and its kin see the future
    if fields.get("kv_lora_rank"):  # a latent: all heads have keys of their own, the last part of them turned
        given["num_key_value_heads"] = HEADS
        if fields.get("head_dim") == fields.get("qk_rope_head_dim"):
            given["head_dim"] = SIZES["qk_rope_head_dim"]
    return given


def _token(name: str, value: Any) -> Any:
    """A token id within the vocabulary: 0 for padding, 1 and 2 for the ends, others from the top."""
    if isinstance(value, list):
        return 2
    if value < 0:
        return value
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return known.get(name, VOCABULARY - 1 - sum(map(ord, name)) % 8)


def _kinds(by_layer: dict[str, list[Any]], depth: int) -> list[int]:
    """Which of the layers stay: the first two of one kind, or the first of each of at most `LAYERS` kinds, in order."""
    if not by_layer:
        return list(range(min(depth, 2)))
    seen: dict[str, int] = {}
    for i in range(depth):
        seen.setdefault(str([value[i] for value in by_layer.values()]), i)
    places = sorted(seen.values())[:LAYERS]
    return places if len(places) > 1 else [0, 1]
