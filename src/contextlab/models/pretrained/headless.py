"""A wrapped model without its head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from contextlab.errors import InputError
from contextlab.models.pretrained.cache import CACHE

if TYPE_CHECKING:
    from contextlab.models.pretrained.causal_lm import ContextlabForCausalLM


class Headless:
    """A wrapped model without its head, for programs that score the hidden vectors themselves.

    Whatever else is asked of it is the model's own.
    """

    def __init__(self, wrapped: ContextlabForCausalLM) -> None:
        self._wrapped = wrapped

    def __call__(self, *args: Any, return_dict: bool | None = None, **options: Any) -> Any:
        """As `ContextlabForCausalLM.forward`, without labels."""
        for name in ("labels", "shift_labels", "logits_to_keep"):
            if options.pop(name, None) is not None:
                raise InputError(f"{name}: the model without its head has no logits; leave it out")
        asked = bool(options.pop("output_hidden_states", None))
        whole = self._wrapped(
            *args, logits_to_keep=torch.zeros(0, dtype=torch.int64), output_hidden_states=True, **options
        )
        hidden = whole.hidden_states
        handed_on: dict[str, Any] = {CACHE: whole.get(CACHE)}
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden[-1], hidden_states=hidden if asked else None, **handed_on
        )
        return output.to_tuple() if return_dict is False else output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped.model, name)
