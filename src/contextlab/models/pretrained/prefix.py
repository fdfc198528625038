"""Keys and values that are given to each layer before a text, as peft's prefix tuning learns them (2101.00190)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from contextlab.errors import InputError
from contextlab.models.padding import padding, tokens_first
from contextlab.models.pretrained.config import ContextlabConfig
from contextlab.models.stack import Model, ModelState, Within
from contextlab.ops.kv_layer import KVLayer


def state_of(model: Model, cache: DynamicCache) -> ModelState:
    """The state of a model whose layers hold the keys and values of a cache, as if so many tokens had been read.

    cache: a layer for each of the model's, keys [B, H, n, D] and values [B, H, n, V] each, rotary positions in them.

    Raises InputError where a layer of the model does not hold keys and values, or others in number or size.
    """
    if model.spec.loops > 1 or any(block.reads_shared or block.router is not None for block in model.blocks):
        raise InputError("prefix tuning: not for models that run layers several times, share keys or skip tokens")
    depth = len(model.blocks)
    held: list[Any] = [each for each in cache.layers if getattr(each, "keys", None) is not None]
    if len(held) != depth:
        raise InputError(
            f"prefix tuning: the model has {depth} layers, the prefix {len(held)}; give num_layers={depth}"
        )
    layers = []
    for i, (block, given) in enumerate(zip(model.blocks, held, strict=True)):
        mixer: Any = block.mixer
        keys, values = (each.transpose(1, 2) for each in (given.keys, given.values))
        shape = _shape(mixer)
        if shape is None:
            name = type(mixer).__name__
            raise InputError(
                f"prefix tuning: layer {i} ({name}) does not keep all keys and values; prompt tuning serves any mixer"
            )
        if tuple(keys.shape[2:]) != shape or keys.shape != values.shape:
            heads, size = shape
            raise InputError(
                f"prefix tuning: layer {i} holds {heads} key heads of {size}; give num_attention_heads={heads} and "
                f"token_dim={heads * size}"
            )
        layers.append(mixer.state_of(keys, values))
    batch, length = held[0].keys.shape[0], cache.get_seq_length()
    # Places are counted from the first token, which those of the prefix are.
    start = torch.zeros(batch, dtype=torch.int64, device=held[0].keys.device) if model.spec.counts_padding else None
    return ModelState(layers=layers, start=start, length=length)


def tell_sizes(config: ContextlabConfig, model: Model) -> None:
    """Say in a configuration of which keys a prefix consists, as peft asks for, where the layers agree on it."""
    shapes = {_shape(block.mixer) for block in model.blocks}
    shape = shapes.pop() if len(shapes) == 1 else None
    if shape is not None:
        config.num_key_value_heads, config.head_dim = shape


def _shape(mixer: Any) -> tuple[int, int] | None:
    """Key heads of a layer and the size of each, where it keeps all keys and values, each by itself; else None."""
    layer: KVLayer | None = getattr(mixer, "kv_layer", lambda: None)()
    if layer is None or layer.latent or layer.key_dim != layer.value_dim:
        return None
    return layer.kv_heads, layer.key_dim


def read_padded(model: Model, tokens: Tensor, state: ModelState, mask: Tensor, within: Within) -> Tensor:
    """Logits of whole texts, tokens [B, T] with padding at either end of a row, each after the same prefix.

    A row's tokens are moved to the front, where what follows them is not seen: a state has padding before all that it
    holds, and so none between a prefix and a text.
    """
    padding(mask, tokens, begun=False, waiting=None)  # refuses padding between tokens
    placed = tokens_first(mask)
    embedded = None if within.embedded is None else placed.moved(within.embedded)
    each = Within(embedded, None if within.hidden is None else [])
    logits = placed.back(model.read(placed.moved(tokens), state, within=each)[0])
    if within.hidden is not None and each.hidden is not None:
        within.hidden.extend(placed.back(x) for x in each.hidden)
    return logits if within.last is None else logits[:, within.last]
