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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
)

from contextlab.compat import cache_argument
from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer, attend_cached
from contextlab.policies.core.adapters import Adapter, Places, register_adapter
from contextlab.policies.core.base import Policy, Served
from contextlab.policies.huggingface_cache import KeptLayer, kept_for, layer_of, own_cache
from contextlab.policies.huggingface_latent import attend_latent, entry, noting
from contextlab.policies.huggingface_layers import NAME, attends_often, attention_layers, forward_of, model_within
from contextlab.policies.huggingface_parts import answers, beside_zeros, check_part, in_a_row
from contextlab.policies.huggingface_torch import calls_torch, padding_of, through
from contextlab.policies.huggingface_visits import Noted, Visit
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
            AttentionInterface.register(name, functools.partial(_attend, before))
            AttentionMaskInterface.register(name, functools.partial(_mask, before))
            stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = name
        for module in own:
            stack.callback(through(module, _attend_torch))
        for module in modules:
            stack.callback(module.register_forward_pre_hook(_enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(_leave).remove)
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


@dataclass
class _Call:
    """One forward of a module that is served.

    kept: the layers of the cache that it may write into, by their index; none without a cache.
    noted: what is told of the cache where there is none, for modules that need it.
    asked: what attention was called with, where it will be called again; rest: the answers to these calls.
    """

    kept: dict[int, KeptLayer]
    noted: Noted | None = None
    answered: bool = False
    asked: tuple[Tensor, Tensor] | None = None
    rest: list[Tensor] = field(default_factory=list)

    def written(self) -> tuple[int, KeptLayer | None, Tensor | None]:
        """Into which layer of the cache the module just wrote: its index, itself, and the values written."""
        if self.noted is not None:
            return self.noted.index, None, self.noted.values
        for index, kept in self.kept.items():
            if not kept.open:
                return index, kept, kept.new
        return next(((index, kept, None) for index, kept in self.kept.items()), (-1, None, None))


def _enter(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Before a module's forward: the layers of the cache that it may write into become ours."""
    cache = next((x for x in (*args, *options.values()) if isinstance(x, (Cache, EncoderDecoderCache))), None)
    own = vars(module)  # a module's own way of setting attributes takes ten times as long
    own["call"] = call = _Call({})
    if cache is not None:
        indices = own.get("visits") or (module.layer_idx,)
        call.kept = {index: layer_of(own_cache(cache), index) for index in indices}
        for kept in call.kept.values():
            kept.open = True
    elif "notes" in own:
        call.noted = Noted()
        return args, {**options, own["notes"]: call.noted}
    return None


def _leave(module: Any, _args: Any, _result: Any) -> None:
    """After a module's forward."""
    call: _Call = vars(module).pop("call")
    if not call.answered:
        raise InputError(f"{type(module).__name__} did not call the attention of its configuration; it is not served")
    missed = call.kept and all(kept.open for kept in call.kept.values())
    for kept in call.kept.values():
        kept.open, kept.new = False, None
    if missed:
        raise InputError(f"{type(module).__name__} writes into another layer of the cache, not its own")


def _attend(
    before: str, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls; query [B, H, T, D], key and value [B, Hkv, T, D]."""
    served: Served | None = getattr(module, "served", None)
    if served is None:  # a module with a sliding window, say, that shares the configuration
        known = forward_of(module).__globals__
        plain = known["ALL_ATTENTION_FUNCTIONS"].get_interface(before, known.get("eager_attention_forward"))
        return plain(module, query, key, value, attention_mask, **options)
    return _answer(module, served, query, key, value, attention_mask, options), None


def _attend_torch(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The same where a module calls torch's attention: returns [B, H, T, V]. The mask says what `is_causal` does."""
    mask = padding_of(type(module).__name__, attn_mask, query.shape[2])
    options = {"scaling": scale, "dropout": dropout_p}
    return _answer(module, module.served, query, key, value, mask, options).transpose(1, 2)


def _answer(
    module: Any,
    served: Served,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """What the policy answers, [B, T, H, V]; see `_attend`. attention_mask: [B, T] bool, False at left padding."""
    call: _Call = vars(module)["call"]
    index, kept, values = call.written()
    served = vars(module).get("visits", {}).get(index, served)
    layer, name = served.layer, type(module).__name__
    if call.answered and not (call.rest and call.asked is not None and _same(call.asked, (query, key))):
        raise InputError(f"{name} calls attention more than once in a forward, so no policy can serve it")
    call.asked = query, key
    for option in ("position_bias", "head_mask"):
        if options.get(option) is not None:
            raise InputError(f"{name}: attention with {option} is not served by policies")
    if options.get("dropout"):
        raise InputError(f"{name}: a policy serves no attention with dropout; call model.eval()")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise InputError(f"attention_mask: expected [batch, tokens], got {list(attention_mask.shape)}")
    parts = 1 if layer.latent else max(1, layer.key_dim // key.shape[3])
    alike = parts == 1 and not layer.latent and key.shape[1] == layer.heads
    repeated = key.shape[1] // layer.kv_heads if alike else 1
    if repeated > 1:  # some repeat the row of key heads before they call: 0, 1, 0, 1 for the queries' heads in order
        key, value = (_once(name, x, layer.kv_heads) for x in (key, value))
        query = query.unflatten(1, (repeated, -1)).transpose(1, 2).flatten(1, 2)
    got = (query.shape[1], key.shape[1] // parts, key.shape[3] * parts, value.shape[3] * parts)
    if not layer.latent and got != (layer.heads, layer.kv_heads, layer.key_dim, layer.value_dim):
        raise InputError(f"{name}: heads, key heads, sizes of key and value are {got}, not as its configuration says")
    if options.get("scaling") not in (None, layer.scale):  # some scale the queries themselves
        layer = dataclasses.replace(layer, scale=float(options["scaling"]))
    if options.get("softcap") != layer.cap:
        layer = dataclasses.replace(layer, cap=options.get("softcap"))
    if layer is not served.layer:
        served = dataclasses.replace(served, layer=layer)
    if call.rest and values is not None:
        check_part(name, value, values, parts - len(call.rest), parts)
        return call.rest.pop(0)
    call.answered = True
    state = None if kept is None else kept.state
    if layer.latent:
        y, after = attend_latent(served, module, query, state, attention_mask, kept is not None)
    else:
        if parts > 1:
            if values is None:
                raise InputError(f"{name} writes into another layer of the cache, not its own")
            check_part(name, value, values, 0, parts)
            query = beside_zeros(query, layer.kv_heads, parts)
            key, value = in_a_row(key, parts), in_a_row(values, parts)
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        y, after = served.attend(q, k, v, state, attention_mask, kept is not None)
    if kept is not None:
        kept.state = after
    if parts > 1:
        y, *call.rest = (each.contiguous() for each in answers(y, layer.kv_heads, parts))
    if repeated > 1:
        y = y.unflatten(2, (-1, repeated)).transpose(2, 3).flatten(2, 3)
    return y.contiguous()  # as their own attention answers: some take a view of it


def _same(some: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]) -> bool:
    return all(one is other for one, other in zip(some, others, strict=True))


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
