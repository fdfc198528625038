"""A `ModelState` where transformers expects a cache."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from contextlab.compat import cache_name
from contextlab.errors import InputError
from contextlab.models.pretrained.prefix import state_of
from contextlab.models.stack import Model, ModelState

CACHE: Any = cache_name(field.name for field in dataclasses.fields(CausalLMOutputWithPast))
"""What the installed transformers calls the cache of an output, and hands on from step to step of `generate`."""


class StateCache:
    """A `ModelState` where transformers expects a cache.

    One that a model returned never changes but by `reorder_cache`: each call of the model returns another. An empty
    one, `StateCache()`, is filled by the call that it is given to and goes on with each further one, as caches of
    transformers do.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # it counts the tokens read, as caches of attention do

    def __init__(self, state: ModelState | None = None, prefix: bool = False) -> None:
        self.state = state
        self.prefix = prefix  # whether it holds what no token left, before any text
        self._filled = state is None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far."""
        return 0 if self.state is None else self.state.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, for beam search. beam_idx: [B] int64."""
        if self.state is not None:
            self.state = self.state.select(beam_idx)

    def after(self, state: ModelState) -> StateCache:
        """The cache of what was read on from this one: itself, filled, or another."""
        if not self._filled:
            return StateCache(state)
        self.state = state
        return self


def one_cache(cache: Any, past_key_values: Any, model: Model | None = None) -> StateCache | None:
    """The cache, under whichever of its two names it came.

    model: whose layers hold the keys and values of a `DynamicCache` in which there are some; None takes no such cache.

    Raises InputError for two, for one of another kind, and where the model cannot hold what it has.
    """
    if cache is not None and past_key_values is not None:
        raise InputError("cache and past_key_values are two names of one argument; give one of them")
    found = past_key_values if cache is None else cache
    if model is not None and isinstance(found, DynamicCache) and found.get_seq_length():
        return StateCache(state_of(model, found), prefix=True)
    if found is not None and not isinstance(found, StateCache):
        raise InputError(
            f"cache: expected what use_cache=True returned, got a {type(found).__name__}; leave it out at the start, "
            "or give contextlab.models.pretrained.StateCache()"
        )
    return found
