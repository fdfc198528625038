"""What a model predicts for a prompt, also one that reads it whole: an encoder, or one with a pooled read-out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.models.spec import ModelSpec
from contextlab.models.within import Within
from contextlab.prompt import Prompt


def answer(model: Any, prompt: Prompt, within: Within | None = None) -> Tensor:
    """The predictions [B, T, k] of a model, or of any function of the prompt's inputs.

    A causal model reads the inputs as they are, vectors in the dtype of its parameters. One that sees later tokens, or
    has one prediction for all, reads each prompt up to its last scored position, as the rest could hold the answer; a
    pooled prediction stands at every place.

    model: it may be compiled or wrapped in DistributedDataParallel. within: what else is asked of a model of ours.

    Raises InputError for a pooled read-out where a prompt has more than one scored position.
    """
    own = unwrapped(model)
    mask, spec, inputs = readable(model, prompt), getattr(own, "spec", None), prompt.inputs
    if isinstance(spec, ModelSpec) and inputs.is_floating_point():
        inputs = inputs.to(next(own.parameters()).dtype)
    more = {} if within is None else {"within": within}
    return spread(spec, model(inputs, **more) if mask is None else model(inputs, mask, **more), prompt.length)


def spread(spec: Any, predicted: Tensor, length: int) -> Tensor:
    """What a model of this spec predicts for prompts of so many tokens, at every place: [B, T, k].

    predicted: [B, T, k], or of a pooled read-out [B, k].
    """
    if not isinstance(spec, ModelSpec) or spec.pool is None:
        return predicted
    return predicted.unsqueeze(1).expand(-1, length, -1)


def readable(model: Any, prompt: Prompt) -> Tensor | None:
    """What a model that reads whole prompts may read of these, [B, T] bool; None: all. Raises as `answer` does."""
    spec = getattr(unwrapped(model), "spec", None)
    if not isinstance(spec, ModelSpec) or not spec.reads_whole:
        return None
    scored, length = prompt.scored, prompt.length
    if spec.pool is not None and bool((scored.sum(1) > 1).any()):
        most = int(scored.sum(1).max())
        raise InputError(f"pool: the model predicts once a prompt, but {most} predictions are to be scored in this one")
    rest = scored.flip(1).int().argmax(1, keepdim=True)  # places after the last scored one; 0 where none is
    mask = torch.arange(length, device=scored.device) < length - rest
    return None if bool(mask.all()) else mask


def unwrapped(model: Any) -> Any:
    """The model within what wraps it."""
    while (inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None)) is not None:
        model = inner
    return model
