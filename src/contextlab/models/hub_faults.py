"""Where a model of transformers first goes wrong."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_fault(model: Any, inputs: Tensor, given: dict[str, Any]) -> str:
    """Where NaN or infinity first appears, in words.

    inputs: [B, T] token ids. given: what else the model was given, but for the cache.
    """
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"the model's parameter {name!r} holds NaN or infinity"
    found: list[str] = []

    def look(name: str, layer: nn.Module) -> Any:
        def hook(module: nn.Module, arguments: Any, result: Any) -> None:
            hidden = result[0] if isinstance(result, tuple) else result
            if not found and isinstance(hidden, Tensor) and not bool(hidden.isfinite().all()):
                found.append(f"layer {name!r} gives NaN or infinity")

        return layer.register_forward_hook(hook)

    layers = [(n, m) for n, m in model.named_modules() if re.search(r"\.(layers|h|blocks)\.\d+$", n)]
    hooks = [look(name, layer) for name, layer in layers]
    try:
        model(input_ids=inputs, use_cache=False, **(given if "attention_mask" not in given else {}))
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "the logits hold NaN or infinity"
