"""Where a model's NaN or infinity comes from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from contextlab.models.stack import Model, ModelState


def finite(x: Tensor) -> bool:
    """Whether x, of any shape, holds neither NaN nor infinity; the least and the largest value tell, in one pass."""
    return x.is_meta or not x.numel() or all(math.isfinite(end.item()) for end in x.detach().aminmax())


@torch.no_grad()
def first_fault(model: Model, inputs: Tensor, state: ModelState | None, mask: Tensor | None) -> str:
    """Where NaN or infinity first appears in a reading, in words.

    inputs: [B, T] int64 or [B, T, input_size]; state and mask [B, T] as for `Model.read`.
    """
    if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
        row, token, _ = (~inputs.isfinite()).nonzero()[0].tolist()
        return f"the input holds NaN or infinity, first in row {row} at token {token}"
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"the model's parameter {name!r} holds NaN or infinity"
    found: list[str] = []

    def look(index: int, block: Any) -> Any:
        def hook(module: torch.nn.Module, given: Any, result: Any) -> None:
            if not found and not bool(result[0].isfinite().all()):
                row, token, _ = (~result[0].isfinite()).nonzero()[0].tolist()
                named = f"block {index} ({type(block.mixer).__name__})"
                found.append(f"{named} gives NaN or infinity, first in row {row} at token {token}")

        return block.register_forward_hook(hook)

    hooks = [look(i, block) for i, block in enumerate(model.blocks)]
    try:
        model._run(inputs, state, mask, keep_state=True)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "the read-out gives NaN or infinity"
