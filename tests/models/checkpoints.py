"""Small random Hugging Face checkpoints of each type, made here by transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from contextlab.compat import cache_argument, cache_name

V = 31  # token ids
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASE = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GQA = {**BASE, **ENDS, "num_key_value_heads": 2}
SSM = {**ENDS, "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "residual_in_fp32": False}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **ENDS},
    "llama": GQA,
    "mistral": {**GQA, "sliding_window": 6},
    "qwen2": GQA,
    "qwen3": {**GQA, "head_dim": 16},
    "gemma": {**GQA, "head_dim": 8},
    "gemma2": {**GQA, "head_dim": 8, "sliding_window": 6},
    "mamba": SSM,
    "mamba2": {**SSM, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "rwkv": {**BASE, "attention_hidden_size": 32, "context_length": 64, "bos_token_id": 1, "eos_token_id": 2},
    "qwen3_next": {
        **GQA,
        **EXPERTS,
        "head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "jamba": {
        **GQA,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 2,
    },
    "zamba2": {
        **BASE,
        **ENDS,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "chunk_size": 8,
        "num_mem_blocks": 1,
    },
    "xlstm": {
        "vocab_size": V,
        "hidden_size": 128,
        "embedding_dim": 128,
        "num_hidden_layers": 2,
        "num_blocks": 2,
        "num_heads": 4,
        "chunk_size": 16,
    },
}


def reference(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """transformers' own model with random parameters."""
    import transformers

    # No grouped products in float64; no dropout in what has some.
    given = {name: changes.pop(name) for name in ("attn_implementation",) if name in changes}
    config = transformers.AutoConfig.for_model(kind, **{**CONFIGS[kind], **changes})
    eager = {"experts_implementation": "eager"} if kind in ("qwen3_next", "jamba") else {}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, **eager, **given)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # so that no bias and no gain is trivial
    return model.to(dtype).eval()


def checkpoint(kind: str, folder: Path, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """`reference`, saved into the folder; returns the model."""
    model = reference(kind, dtype, **changes)
    model.save_pretrained(folder)
    return model


def cache_of(output: Any) -> Any:
    """The cache in an output of transformers, whatever the installed release calls it."""
    return output[cache_name(output)]


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The argument that hands a model its cache."""
    return {cache_argument(model.forward): cache}


@contextlib.contextmanager
def exactly(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """While open, transformers' norms, rotations and scans stay in float64, which they cast to float32 on the way."""
    to = torch.Tensor.to

    def keep(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        lower = torch.float32 in (*args, *kwargs.values()) and self.dtype == torch.float64
        return self if lower else to(self, *args, **kwargs)

    with patch.context() as inner:
        inner.setattr(torch.Tensor, "float", lambda self: self)
        inner.setattr(torch.Tensor, "to", keep)
        yield
