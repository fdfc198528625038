"""What stands in the place of a `transformers` cache's layers while a policy serves them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from contextlab.errors import InputError
from contextlab.state import State


class KeptLayer(CacheLayerMixin):
    """One layer of a transformers cache that holds what a policy left.

    `get_seq_length` counts the tokens read, not those held, so that positions stay true.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.open = False  # whether the attention that follows `update` will ask the policy
        self.new: Tensor | None = None  # the values that `update` was given last, until they are attended to

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Hand new keys and values, [B, Hkv, T, ...], on to the attention, which keeps what the policy says."""
        if not self.open:
            raise InputError(f"a {type(self.state).__name__} was left by a policy; attach that policy to continue it")
        self.open, self.new = False, value_states
        return key_states, value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is made ahead of the first tokens, [B, Hkv, T, ...]."""

    def get_seq_length(self) -> int:
        """Tokens read so far."""
        return 0 if self.state is None else self.state.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens read and new, and 0: the mask is over all of them, though not all are held."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """As if nothing had been read."""
        self.state = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows [N] int64, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, indices [N] int64."""
        if self.state is not None:
            self.state = self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        if self.state is not None:
            first = next(self.state.tensors())
            self.state = self.state.select(torch.arange(len(first), device=first.device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Only nothing can be taken back: what a policy dropped is gone."""
        if tokens_to_remove:
            raise InputError(
                "a cache that a policy compressed cannot be cropped (assisted and speculative decoding do that); "
                "generate without an assistant"
            )

    def offload(self) -> None:
        """Refused: states stay where they were made."""
        raise InputError("a policy's cache is not offloaded; use a DynamicCache without offloading")

    prefetch = offload


class KeptHybridLayer(LinearAttentionLayer, KeptLayer):
    """The same for a layer that runs a recurrence beside its attention; the recurrence keeps what it keeps."""

    is_croppable = False
    is_compileable = False

    def __init__(self, number_of_states: int = 1) -> None:
        KeptLayer.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def reset(self) -> None:
        """As if nothing had been read."""
        LinearAttentionLayer.reset(self)
        KeptLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows [N] int64, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, indices [N] int64."""
        LinearAttentionLayer.reorder_cache(self, indices)  # type: ignore[arg-type]
        KeptLayer.batch_select_indices(self, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        KeptLayer.batch_repeat_interleave(self, repeats)
        for states in (self.conv_states, self.recurrent_states):
            states.update({i: x.repeat_interleave(repeats, 0) for i, x in states.items() if x is not None})

    def crop(self, tokens_to_remove: int) -> None:
        """See `KeptLayer.crop`."""
        KeptLayer.crop(self, tokens_to_remove)

    def offload(self) -> None:
        """See `KeptLayer.offload`."""
        KeptLayer.offload(self)

    prefetch = offload


def kept_for(layer: Any) -> KeptLayer | None:
    """What stands in a layer's place in the cache, with its recurrence's states; None where policies serve none."""
    if type(layer) is DynamicLayer:
        return KeptLayer()
    if type(layer) is not LinearAttentionAndFullAttentionLayer:
        return None
    kept = KeptHybridLayer(getattr(layer, "number_of_states", 1))
    attention = vars(DynamicLayer())
    vars(kept).update({name: value for name, value in vars(layer).items() if name not in attention})
    kept.device, kept.dtype = layer.device, layer.dtype
    return kept


def own_cache(cache: Any) -> Any:
    """The cache of a decoder's own keys and values, where another of an encoder's lies beside it."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def layer_of(cache: Any, index: int) -> KeptLayer:
    """The layer of a cache, as one that holds a policy's states. Raises InputError where it holds something else."""
    if not isinstance(cache, Cache) or cache.offloading:
        raise InputError("policies serve a DynamicCache that is not offloaded; give the model no cache of your own")
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[index]
    kept = kept_for(layer)
    if kept is not None:
        if layer.get_seq_length():
            raise InputError(
                "the cache was filled without this policy; start from an empty one, or compress it by apply"
            )
        cache.layers[index] = layer = kept
    if not isinstance(layer, KeptLayer):
        raise InputError(
            f"policies serve a DynamicCache, but this one's layers are a {type(layer).__name__}; give no cache of "
            "your own and leave cache_implementation out"
        )
    return layer
