"""Policies at the attention layers of `transformers` models.

Their models call the attention of their configuration by name and keep keys and values in a cache of one layer each.
While a policy is attached, that name is of a function that asks the policy, and the cache's layers of full attention
hold the policy's states. So whatever drives the model (`generate`, a loop over pieces) need not know of it.

Needs the package `transformers`, as huggingface_layers.py does; nothing else in `contextlab.policies` needs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
)

from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer, attend_cached
from contextlab.policies.core.adapters import Adapter, Places, register_adapter
from contextlab.policies.core.base import Policy, Served
from contextlab.policies.huggingface_latent import attend_latent, entry, noting
from contextlab.policies.huggingface_layers import NAME, attention_layers, forward_of, model_within
from contextlab.state import KVState, State


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

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Hand new keys and values, [B, Hkv, T, ...], on to the attention, which keeps what the policy says."""
        if not self.open:
            raise InputError(f"a {type(self.state).__name__} was left by a policy; attach that policy to continue it")
        self.open = False
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


def _kept(layer: Any) -> KeptLayer | None:
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
        configs: dict[int, Any] = {id(m.config): m.config for m in modules}
        for config in configs.values():
            before = config._attn_implementation or "eager"
            if before not in ALL_MASK_ATTENTION_FUNCTIONS:
                known = ", ".join(sorted(n for n in ALL_MASK_ATTENTION_FUNCTIONS if not n.startswith(NAME)))
                raise InputError(f"the model's attention is {before!r}, which makes no masks; set one of {known}")
            name = f"{NAME}_{before}"
            AttentionInterface.register(name, functools.partial(_attend, before))
            AttentionMaskInterface.register(name, functools.partial(_mask, before))
            stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = name
        for module in modules:
            stack.callback(module.register_forward_pre_hook(_enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(_leave).remove)
            stack.callback(vars(module).pop, "kept", None)  # where an error left it
        stack.enter_context(noting(modules))
        yield


def applied(places: list[tuple[nn.Module, Served]], state: Any, model: Any) -> Any:
    """See `Policy.apply`; for a `HuggingFaceModel` and the state that its `read` returned."""
    if not callable(getattr(model, "recached", None)):
        raise InputError(
            f"apply: a {type(state).__name__} does not tell which tokens are padding; read with "
            "contextlab.models.HuggingFaceModel(model) and give its state"
        )

    def compress(cache: Cache, start: Tensor, padded: bool) -> None:
        for module, served in places:
            index: Any = module.layer_idx
            layers = _own(cache).layers
            layer: Any = layers[index]
            kept = _kept(layer)
            if kept is None:
                raise InputError(
                    "apply: a policy was attached when this state was read; give one that was read without"
                )
            keys, values = layer.keys, layer.values
            if served.layer.latent:
                keys = entry(keys, values).transpose(1, 2)
                values = keys[..., :0]
            plain = KVState(keys, values, start, padded, length=layer.get_seq_length())
            layers[index] = kept
            kept.state = served.policy.convert(served.layer, plain)

    return model.recached(state, compress)


def states(places: list[tuple[nn.Module, Served]], state: Any, model: Any) -> list[tuple[Served, State]]:
    """See `Policy.states`; for a `HuggingFaceModel` and the state that its `read` returned."""
    found: list[tuple[Served, State]] = []

    def look(cache: Cache, _start: Tensor, _padded: bool) -> None:
        for module, served in places:
            index: Any = module.layer_idx
            left = getattr(_own(cache).layers[index], "state", None)
            if left is not None:
                found.append((served, left))

    model.recached(state, look)
    return found


def _enter(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Before a module's forward: the layer of the cache that it will write into becomes one of ours."""
    cache = next((x for x in (*args, *options.values()) if isinstance(x, (Cache, EncoderDecoderCache))), None)
    kept = None
    if cache is not None:
        kept = _layer_of(_own(cache), module.layer_idx)
        kept.open = True
    vars(module).update(kept=kept, answered=False)  # a module's own way of setting attributes takes ten times as long


def _leave(module: Any, _args: Any, _result: Any) -> None:
    """After a module's forward."""
    own = vars(module)
    kept = own.pop("kept")
    if not own.pop("answered"):
        raise InputError(f"{type(module).__name__} did not call the attention of its configuration; it is not served")
    if kept is not None and kept.open:
        raise InputError(f"{type(module).__name__} writes into another layer of the cache, not its own")


def _own(cache: Any) -> Any:
    """The cache of a decoder's own keys and values, where another of an encoder's lies beside it."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _layer_of(cache: Any, index: int) -> KeptLayer:
    if not isinstance(cache, Cache) or cache.offloading:
        raise InputError("policies serve a DynamicCache that is not offloaded; give the model no cache of your own")
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[index]
    kept = _kept(layer)
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


def _attend(
    before: str, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls; query [B, H, T, D], key and value [B, Hkv, T, D]."""
    served: Served | None = getattr(module, "served", None)
    if served is None:  # a module with a sliding window, say, that shares the configuration
        known = forward_of(module).__globals__
        plain = known["ALL_ATTENTION_FUNCTIONS"].get_interface(before, known.get("eager_attention_forward"))
        return plain(module, query, key, value, attention_mask, **options)
    layer, name = served.layer, type(module).__name__
    for option in ("position_bias", "head_mask"):
        if options.get(option) is not None:
            raise InputError(f"{name}: attention with {option} is not served by policies")
    if options.get("dropout"):
        raise InputError(f"{name}: a policy serves no attention with dropout; call model.eval()")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise InputError(f"attention_mask: expected [batch, tokens], got {list(attention_mask.shape)}")
    repeated = key.shape[1] // layer.kv_heads if key.shape[1] == layer.heads and not layer.latent else 1
    if repeated > 1:  # some repeat the row of key heads before they call: 0, 1, 0, 1 for the queries' heads in order
        key, value = (_once(name, x, layer.kv_heads) for x in (key, value))
        query = query.unflatten(1, (repeated, -1)).transpose(1, 2).flatten(1, 2)
    got = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
    if not layer.latent and got != (layer.heads, layer.kv_heads, layer.key_dim, layer.value_dim):
        raise InputError(f"{name}: heads, key heads, sizes of key and value are {got}, not as its configuration says")
    if options.get("scaling") not in (None, layer.scale):  # some scale the queries themselves
        layer = dataclasses.replace(layer, scale=float(options["scaling"]))
    if options.get("softcap") != layer.cap:
        layer = dataclasses.replace(layer, cap=options.get("softcap"))
    if layer is not served.layer:
        served = dataclasses.replace(served, layer=layer)
    if vars(module)["answered"]:
        raise InputError(f"{name} calls attention more than once in a forward, so no policy can serve it")
    vars(module)["answered"] = True
    kept = module.kept
    state = None if kept is None else kept.state
    if layer.latent:
        y, after = attend_latent(served, module, query, state, attention_mask, kept is not None)
    else:
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        y, after = served.attend(q, k, v, state, attention_mask, kept is not None)
    if kept is not None:
        kept.state = after
    if repeated > 1:
        y = y.unflatten(2, (-1, repeated)).transpose(2, 3).flatten(2, 3)
    return y.contiguous(), None  # as their own attention answers: some take a view of it


def _once(name: str, x: Tensor, heads: int) -> Tensor:
    """The first heads of keys or values [B, H, T, D] that repeat them in a row, as jetmoe's do."""
    first = x[:, :heads]
    last = x[:, :, -1].unflatten(1, (-1, heads))
    if not torch.equal(last, first[:, None, :, -1].expand_as(last)):
        raise InputError(f"{name} has {x.shape[1]} different key heads, not {heads} as its configuration says")
    return first


def _mask(
    before: str,
    *,
    mask_function: Any,
    attention_mask: Tensor | None,
    q_length: int,
    kv_length: int,
    local_size: int | None = None,
    **options: Any,
) -> Any:
    """The mask function that transformers calls: [B, q_length] bool, False at left padding, or None without any."""
    if local_size is not None:  # of layers with a sliding window, which are not served
        return ALL_MASK_ATTENTION_FUNCTIONS[before](
            mask_function=mask_function, attention_mask=attention_mask, q_length=q_length, kv_length=kv_length,
            local_size=local_size, **options,
        )  # fmt: skip
    if mask_function is bidirectional_mask_function:  # of an encoder's states, made even where there is no encoder
        options["allow_is_bidirectional_skip"] = False  # None would say nothing to a layer that is served
        return ALL_MASK_ATTENTION_FUNCTIONS[before](
            mask_function=mask_function, attention_mask=attention_mask, q_length=q_length, kv_length=kv_length,
            **options,
        )  # fmt: skip
    if mask_function is not causal_mask_function:
        raise InputError("policies serve plain causal attention; packed sequences and other masks are refused")
    if attention_mask is None:
        return None
    if attention_mask.shape[1] != kv_length:
        raise InputError(f"attention_mask: expected all {kv_length} tokens read so far, got {attention_mask.shape[1]}")
    if bool(attention_mask.all()):
        return None
    if bool((attention_mask[:, 1:] < attention_mask[:, :-1]).any()):
        raise InputError("attention_mask: expected padding at the left only; set tokenizer.padding_side = 'left'")
    return attention_mask[:, -q_length:]


class Transformers(Adapter):
    """Models of `transformers`, and what wraps one."""

    everything = Everything()

    def serves(self, model: nn.Module) -> bool:
        """See `Adapter.serves`."""
        return model_within(model) is not None

    def layers(self, model: nn.Module) -> list[tuple[nn.Module, KVLayer]]:
        """See `Adapter.layers`."""
        return attention_layers(model)

    def attached(self, modules: list[nn.Module]) -> contextlib.AbstractContextManager[None]:
        """See `Adapter.attached`."""
        return attached(modules)

    def applied(self, places: Places, state: Any, model: nn.Module) -> Any:
        """See `Adapter.applied`."""
        return applied(places, state, model)

    def states(self, places: Places, state: Any, model: nn.Module) -> list[tuple[Served, State]]:
        """See `Adapter.states`."""
        return states(places, state, model)


register_adapter(Transformers())
