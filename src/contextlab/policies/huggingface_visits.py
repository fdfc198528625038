"""Layers of `transformers` models that run several times in a forward, each time with a memory of its own.

In looped models, or where layers share their weights, an attention module writes into another layer of the cache each
time. Policies serve each of these as a layer, so that a budget is divided among all that the model holds.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from contextlab.compat import cache_argument
from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer


class Visit:
    """An attention module as it writes into one layer of the cache: what serves it is `served`, as of a module.

    index: of that layer.
    """

    def __init__(self, module: Any, index: int) -> None:
        self.module, self.index = module, index

    @property
    def served(self) -> Any:
        """What serves the module here; None for nothing."""
        return vars(self.module).get("visits", {}).get(self.index)

    @served.setter
    def served(self, value: Any) -> None:
        visits = vars(self.module).setdefault("visits", {})
        visits.pop(self.index, None)
        if value is not None:
            visits[self.index] = value
        if not visits:
            del vars(self.module)["visits"]
        self.module.served = next(iter(visits.values()), None)


class Noted:
    """In a cache's place, keeps nothing of what it is given: which layer was written, and the values [B, Hkv, T, V]."""

    def __init__(self) -> None:
        self.index = -1
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As a cache's: keys and values [B, Hkv, T, ...], which are returned."""
        self.index, self.values = layer_idx, values
        return keys, values


class _Written(DynamicCache):
    """Notes into which of its layers each module writes."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.module: Any = None
        self.found: dict[int, list[int]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **options: Any) -> Any:
        if self.module is not None:  # else it is one that is not served
            self.found.setdefault(id(self.module), []).append(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **options)


def moves(module: Any) -> bool:
    """Whether a module takes by how much the layer of the cache that it writes into is moved."""
    return any(name.endswith("_offset") for name in inspect.signature(module.forward).parameters)


def told_layer(module: Any) -> bool:
    """Whether a module stands for several layers, and is told in each call for which (zamba)."""
    index = getattr(module, "layer_idx", None)
    return (index is None or index < 0) and "layer_idx" in inspect.signature(module.forward).parameters


@torch.no_grad()
def visits(model: PreTrainedModel, found: list[tuple[Any, KVLayer]]) -> list[tuple[Any, KVLayer]]:
    """The same modules, those that run several times once for each layer of the cache that they write into, in order.

    Found by one token that the model reads. Raises InputError where a module writes into none.
    """
    if not any(moves(module) or told_layer(module) for module, _ in found):
        return found
    cache = _Written(model.config)
    name = cache_argument(model.forward)
    if name is None:
        raise InputError(f"{model.config.model_type}: the model takes no cache, so no policy can serve it")
    with contextlib.ExitStack() as stack:
        for module, _ in found:
            stack.callback(module.register_forward_pre_hook(lambda each, _: setattr(cache, "module", each)).remove)
            stack.callback(module.register_forward_hook(lambda *_: setattr(cache, "module", None)).remove)
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        model(input_ids=token, use_cache=True, **{name: cache})
    for module, _ in found:
        if id(module) not in cache.found:
            raise InputError(f"{type(module).__name__} writes into no layer of the cache, so no policy can serve it")
    places = [(index, module, layer) for module, layer in found for index in cache.found[id(module)]]
    return [(Visit(module, index), layer) for index, module, layer in sorted(places, key=lambda each: each[0])]
