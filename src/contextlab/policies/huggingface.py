"""Policies at the attention layers of `transformers` models.

Their models call the attention of their configuration by name and keep keys and values in a cache of one layer each.
While a policy is attached, that name is of a function that asks the policy, and the cache's layers of full attention
hold the policy's states. So whatever drives the model (`generate`, a loop over pieces) need not know of it.

Needs the package `transformers`; nothing else in `contextlab.policies` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from contextlab.compat import cache_argument
from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer, attend_cached
from contextlab.policies.core.adapters import Adapter, Places, register_adapter
from contextlab.policies.core.base import Policy, Served
from contextlab.state import KVState, State

NAME = "contextlab"
UNTURNED = ("dynamic", "longrope")
"""Rotary positions whose frequencies change with the length, so that a key cannot be turned further."""


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


class Everything(Policy):
    """Keeps all: what serves the layers that a policy leaves alone."""

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
        y = attend_cached(q, keys, values, scale=layer.scale, visible=visible)
        return y, after if keep_state else None

    def convert(self, layer: KVLayer, state: KVState) -> State:
        """See `Policy.convert`."""
        return state


def model_within(model: nn.Module) -> Any | None:
    """The outermost transformers model of these modules; None when there is none."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)


def attention_layers(model: nn.Module) -> list[tuple[nn.Module, KVLayer]]:
    """The attention modules that keep all keys and values, in order, and what a policy needs to know of each.

    model: of transformers, or one that wraps it. Modules with a sliding window or chunks are left to their own cache.
    Raises InputError where a module keeps all keys and values but not so that a policy can take its place.
    """
    theirs = model_within(model)
    if theirs is None:
        raise InputError(f"{type(model).__name__}: expected a model of transformers")
    if theirs.config.is_encoder_decoder or getattr(theirs.config, "add_cross_attention", False):
        raise InputError(f"{theirs.config.model_type}: policies serve decoders without cross-attention")
    caches = {}
    found = []
    for module in theirs.modules():
        causal = getattr(module, "is_causal", type(module).__name__.endswith("Attention"))
        if not (causal and isinstance(getattr(module, "layer_idx", None), int)):
            continue
        config: Any = getattr(module, "config", theirs.config)
        if id(config) not in caches:
            caches[id(config)] = DynamicCache(config=config).layers
        kept = caches[id(config)][module.layer_idx]
        if isinstance(kept, DynamicSlidingWindowLayer):
            continue
        name = type(module).__name__
        if type(kept) is not DynamicLayer or module.layer_idx < 0:
            raise InputError(f"{name} keeps keys and values together with other memory, so no policy can serve it")
        if "ALL_ATTENTION_FUNCTIONS" not in _forward_of(module).__code__.co_names:
            raise InputError(f"{name} computes attention by itself (no attention interface), so no policy can serve it")
        for option, what in (("attn_logit_softcapping", "soft-capped scores"), ("sinks", "learned sinks")):
            if getattr(module, option, None) is not None:
                raise InputError(f"{name} has {what} ({option}), which policies do not serve")
        found.append((module, _described(theirs, module)))
    return found


def _forward_of(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def _described(model: PreTrainedModel, module: Any) -> KVLayer:
    config = module.config
    heads = config.num_attention_heads
    kv_heads = heads // (getattr(module, "num_key_value_groups", 1) or 1)
    size = getattr(module, "head_dim", None) or getattr(module, "head_size", None) or config.hidden_size // heads
    key_dim = getattr(module, "qk_head_dim", None) or size
    return KVLayer(
        index=0, count=1, heads=heads, kv_heads=kv_heads, key_dim=key_dim,
        value_dim=getattr(module, "v_head_dim", None) or size, scale=float(getattr(module, "scaling", key_dim**-0.5)),
        turn=_turn(model, module, key_dim), by_row=True,
    )  # fmt: skip


def _turn(model: PreTrainedModel, module: Any, size: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The model's own rotation of keys, as `KVLayer.turn`; None where there is none, or none that adds up."""
    rotary: Any = next((m.rotary_emb for m in model.modules() if hasattr(m, "rotary_emb")), None)
    apply = _forward_of(module).__globals__.get("apply_rotary_pos_emb")
    kind = getattr(rotary, "rope_type", None)
    by_layer = {"layer_type": module.layer_type} if hasattr(module, "layer_type") else {}
    if isinstance(kind, dict):
        kind = kind.get(by_layer.get("layer_type"))
    if rotary is None or apply is None or kind is None or kind in UNTURNED:
        return None
    if "layer_type" not in inspect.signature(rotary.forward).parameters:
        by_layer = {}
    sharpen = getattr(rotary, f"{by_layer['layer_type']}_attention_scaling" if by_layer else "attention_scaling", 1.0)

    def turn(x: Tensor, steps: Tensor, last: bool = False) -> Tensor:
        batch, length, heads, _ = x.shape
        steps = steps.expand(batch, length, heads).flatten(1)  # [B, T H]: each head's token is one with its own place
        exact = x if x.dtype == torch.float64 else x.float()
        cos, sin = rotary(exact, steps, **by_layer)
        flat = exact.reshape(batch, 1, length * heads, -1)
        part = flat.split((size - cos.shape[-1], cos.shape[-1]) if last else (cos.shape[-1], size - cos.shape[-1]), -1)
        turned = apply(part[last], part[last], cos / sharpen, sin / sharpen)[0]
        return torch.cat((part[0], turned) if last else (turned, part[1]), -1).view_as(x).to(x.dtype)

    # Conventions differ, and some layers of rotary models are not rotated: the module's own keys decide.
    try:
        near, far = (_key_at(module, rotary, by_layer, place, model.dtype) for place in (3, 12))
        if torch.equal(near, far):
            return None
        steps = torch.full((1, 1, 1), 9, device=near.device)
        bound = 4 * max(torch.finfo(near.dtype).eps, 1e-6) * float(far.abs().max())
        for candidate in (turn, functools.partial(turn, last=True)):
            if float((candidate(near, steps) - far).abs().max()) <= bound:
                return candidate
    except (TypeError, RuntimeError, AttributeError):  # a rotation of another form
        pass
    return None


class _Asked(Exception):
    """Carries the keys that a module asked its attention function to use out of the module's forward."""

    def __init__(self, key: Tensor) -> None:
        super().__init__()
        self.key = key


def _raise(_module: Any, _query: Tensor, key: Tensor, *_: Any, **__: Any) -> Any:
    raise _Asked(key)


@torch.no_grad()
def _key_at(module: Any, rotary: Any, by_layer: dict[str, Any], place: int, dtype: torch.dtype) -> Tensor:
    """The key [1, 1, Hkv, D] that a module makes of one token at a place."""
    device = next(module.parameters()).device
    token = torch.linspace(-1, 1, module.config.hidden_size, device=device).sin().to(dtype)[None, None]
    where = rotary(token, torch.full((1, 1), place, device=device), **by_layer)
    before = module.config._attn_implementation
    AttentionInterface.register(f"{NAME}_keys", _raise)
    try:
        module.config._attn_implementation = f"{NAME}_keys"
        cache = cache_argument(module.forward)
        module(hidden_states=token, position_embeddings=where, attention_mask=None, **({cache: None} if cache else {}))
    except _Asked as asked:
        return asked.key.transpose(1, 2)
    finally:
        module.config._attn_implementation = before
    raise TypeError(f"{type(module).__name__} makes no keys for its attention")


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
            layer: Any = cache.layers[index]
            keys, values = layer.keys, layer.values
            if type(layer) is not DynamicLayer:
                raise InputError(
                    "apply: a policy was attached when this state was read; give one that was read without"
                )
            plain = KVState(keys, values, start, padded, length=layer.get_seq_length())
            kept = cache.layers[index] = KeptLayer()
            kept.state = served.policy.convert(served.layer, plain)

    return model.recached(state, compress)


def states(places: list[tuple[nn.Module, Served]], state: Any, model: Any) -> list[tuple[Served, State]]:
    """See `Policy.states`; for a `HuggingFaceModel` and the state that its `read` returned."""
    found: list[tuple[Served, State]] = []

    def look(cache: Cache, _start: Tensor, _padded: bool) -> None:
        for module, served in places:
            index: Any = module.layer_idx
            left = getattr(cache.layers[index], "state", None)
            if left is not None:
                found.append((served, left))

    model.recached(state, look)
    return found


def _enter(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Before a module's forward: the layer of the cache that it will write into becomes one of ours."""
    cache = next((x for x in (*args, *options.values()) if isinstance(x, (Cache, EncoderDecoderCache))), None)
    kept = None
    if cache is not None:
        kept = _layer_of(cache, module.layer_idx)
        kept.open = True
    vars(module).update(kept=kept, answered=False)  # a module's own way of setting attributes takes ten times as long


def _leave(module: Any, _args: Any, _result: Any) -> None:
    """After a module's forward."""
    own = vars(module)
    del own["kept"]
    if not own.pop("answered"):
        raise InputError(f"{type(module).__name__} did not call the attention of its configuration; it is not served")


def _layer_of(cache: Any, index: int) -> KeptLayer:
    if not isinstance(cache, Cache) or cache.offloading:
        raise InputError("policies serve a DynamicCache that is not offloaded; give the model no cache of your own")
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if type(layer) is DynamicLayer:
        if layer.get_seq_length():
            raise InputError(
                "the cache was filled without this policy; start from an empty one, or compress it by apply"
            )
        cache.layers[index] = layer = KeptLayer()
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
        known = _forward_of(module).__globals__
        plain = known["ALL_ATTENTION_FUNCTIONS"].get_interface(before, known.get("eager_attention_forward"))
        return plain(module, query, key, value, attention_mask, **options)
    layer, name = served.layer, type(module).__name__
    for option in ("softcap", "s_aux", "position_bias", "head_mask"):
        if options.get(option) is not None:
            raise InputError(f"{name}: attention with {option} is not served by policies")
    if options.get("dropout"):
        raise InputError(f"{name}: a policy serves no attention with dropout; call model.eval()")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise InputError(f"attention_mask: expected [batch, tokens], got {list(attention_mask.shape)}")
    got = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
    if got != (layer.heads, layer.kv_heads, layer.key_dim, layer.value_dim):
        raise InputError(f"{name}: heads, key heads, sizes of key and value are {got}, not as its configuration says")
    if options.get("scaling") not in (None, layer.scale):  # some scale the queries themselves
        served = dataclasses.replace(served, layer=dataclasses.replace(layer, scale=float(options["scaling"])))
    vars(module)["answered"] = True
    kept = module.kept
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    y, after = served.attend(q, k, v, None if kept is None else kept.state, attention_mask, kept is not None)
    if kept is not None:
        kept.state = after
    return y, None


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
