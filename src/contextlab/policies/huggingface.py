"""Policies at the attention layers of `transformers` models.

Their models call the attention of their configuration by name and keep keys and values in a cache of one layer each.
While a policy is attached, that name is of a function that asks the policy, and the cache's layers of full attention
hold the policy's states. So whatever drives the model (`generate`, a loop over pieces) need not know of it.

Needs the package `transformers`, as do the files huggingface_*.py; nothing else in `contextlab.policies` does.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from contextlab.compat import cache_argument
from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer, attend_cached
from contextlab.policies.core.adapters import Adapter, Places, register_adapter
from contextlab.policies.core.base import Policy, Served
from contextlab.policies.huggingface_cache import kept_for, own_cache
from contextlab.policies.huggingface_calls import attend, attend_torch, enter, leave
from contextlab.policies.huggingface_latent import entry, noting
from contextlab.policies.huggingface_layers import NAME, attends_often, attention_layers, forward_of, model_within
from contextlab.policies.huggingface_masks import padding_mask
from contextlab.policies.huggingface_parts import in_a_row
from contextlab.policies.huggingface_torch import calls_torch, through
from contextlab.policies.huggingface_visits import Visit
from contextlab.state import KVState, State


class Everything(Policy):
    """Keeps all: what serves the layers that a policy leaves alone."""

    serves_sinks = serves_caps = True

    @property
    def chunk_invariant(self) -> bool:
        """See `Policy.chunk_invariant`."""
        return True

    def attend(
        self,
        layer: KVLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: State | None,
        mask: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, State | None]:
        """See `Policy.attend`."""
        before = KVState.empty(k, v) if state is None else state
        if not isinstance(before, KVState):
            raise InputError(f"expected the state of this policy, a KVState, got {type(before).__name__}")
        after = before.append(k, v, mask)
        keys, values = (x.transpose(1, 2) for x in after.cached())
        places = after.positions()
        visible = None if places is None else places >= 0
        y = attend_cached(q, keys, values, scale=layer.scale, visible=visible, sink=layer.sink, cap=layer.cap)
        return y, after if keep_state else None

    def convert(self, layer: KVLayer, state: KVState) -> State:
        """See `Policy.convert`."""
        return state


@contextlib.contextmanager
def attached(modules: list[nn.Module]) -> Iterator[None]:
    """While open, these attention modules ask the `Served` that each has as its attribute `served`."""
    with contextlib.ExitStack() as stack:
        own = [m for m in modules if calls_torch(forward_of(m))]
        configs: dict[int, Any] = {id(m.config): m.config for m in modules if m not in own}
        for config in configs.values():
            before = config._attn_implementation or "eager"
            if before not in ALL_MASK_ATTENTION_FUNCTIONS:
                known = ", ".join(sorted(n for n in ALL_MASK_ATTENTION_FUNCTIONS if not n.startswith(NAME)))
                raise InputError(f"the model's attention is {before!r}, which makes no masks; set one of {known}")
            name = f"{NAME}_{before}"
            AttentionInterface.register(name, functools.partial(attend, before))
            AttentionMaskInterface.register(name, functools.partial(padding_mask, before))
            stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = name
        for module in own:
            stack.callback(through(module, attend_torch))
        for module in modules:
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
            stack.callback(vars(module).pop, "call", None)  # where an error left it
            if attends_often(module) or "visits" in vars(module):
                vars(module)["notes"] = cache_argument(module.forward)
                stack.callback(vars(module).pop, "notes")
        stack.enter_context(noting(modules))
        yield


def _index(place: Any) -> int:
    """The layer of the cache that a module, or a `Visit`, writes into."""
    index: int = place.index if isinstance(place, Visit) else place.layer_idx
    return index


def applied(places: list[tuple[Any, Served]], state: Any, model: Any) -> Any:
    """See `Policy.apply`; for a `HuggingFaceModel` and the state that its `read` returned."""
    if not callable(getattr(model, "recached", None)):
        raise InputError(
            f"apply: a {type(state).__name__} does not tell which tokens are padding; read with "
            "contextlab.models.HuggingFaceModel(model) and give its state"
        )

    def compress(cache: Cache, start: Tensor, padded: bool) -> None:
        for module, served in places:
            index = _index(module)
            layers = own_cache(cache).layers
            layer: Any = layers[index]
            kept = kept_for(layer)
            if kept is None:
                raise InputError(
                    "apply: a policy was attached when this state was read; give one that was read without"
                )
            keys, values = layer.keys, layer.values
            if served.layer.latent:
                keys = entry(keys, values).transpose(1, 2)
                values = keys[..., :0]
            elif (parts := served.layer.key_dim // keys.shape[3]) > 1:
                keys, values = in_a_row(keys, parts), in_a_row(values, parts)
            plain = KVState(keys, values, start, padded, length=layer.get_seq_length())
            layers[index] = kept
            kept.state = served.policy.convert(served.layer, plain)

    return model.recached(state, compress)


def states(places: list[tuple[Any, Served]], state: Any, model: Any) -> list[tuple[Served, State]]:
    """See `Policy.states`; for a `HuggingFaceModel` and the state that its `read` returned."""
    found: list[tuple[Served, State]] = []

    def look(cache: Cache, _start: Tensor, _padded: bool) -> None:
        for module, served in places:
            left = getattr(own_cache(cache).layers[_index(module)], "state", None)
            if left is not None:
                found.append((served, left))

    model.recached(state, look)
    return found


class Transformers(Adapter):
    """Models of `transformers`, and what wraps one."""

    everything = Everything()

    def serves(self, model: nn.Module) -> bool:
        """See `Adapter.serves`."""
        return model_within(model) is not None

    def layers(self, model: nn.Module) -> list[tuple[Any, KVLayer]]:
        """See `Adapter.layers`."""
        return attention_layers(model)

    def attached(self, modules: list[nn.Module]) -> contextlib.AbstractContextManager[None]:
        """See `Adapter.attached`."""
        real: list[Any] = [each.module if isinstance(each, Visit) else each for each in modules]
        return attached(list(dict.fromkeys(real)))

    def applied(self, places: Places, state: Any, model: nn.Module) -> Any:
        """See `Adapter.applied`."""
        return applied(places, state, model)

    def states(self, places: Places, state: Any, model: nn.Module) -> list[tuple[Served, State]]:
        """See `Adapter.states`."""
        return states(places, state, model)


register_adapter(Transformers())
