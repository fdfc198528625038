"""One call of an attention module of `transformers`: what it asks of its attention, the policy that it has answers.

`enter` and `leave` run before and after the module's forward; `attend`, or `attend_torch`, is called in it in the
place of the model's own attention.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from contextlab.errors import InputError
from contextlab.policies.core.base import Served
from contextlab.policies.huggingface_cache import KeptLayer, layer_of, own_cache
from contextlab.policies.huggingface_latent import attend_latent
from contextlab.policies.huggingface_layers import forward_of
from contextlab.policies.huggingface_parts import answers, beside_zeros, check_part, in_a_row
from contextlab.policies.huggingface_torch import padding_of
from contextlab.policies.huggingface_visits import Noted


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


def enter(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
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


def leave(module: Any, _args: Any, _result: Any) -> None:
    """After a module's forward."""
    call: _Call = vars(module).pop("call")
    if not call.answered:
        raise InputError(f"{type(module).__name__} did not call the attention of its configuration; it is not served")
    missed = call.kept and all(kept.open for kept in call.kept.values())
    for kept in call.kept.values():
        kept.open, kept.new = False, None
    if missed:
        raise InputError(f"{type(module).__name__} writes into another layer of the cache, not its own")


def attend(
    before: str, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls; query [B, H, T, D], key and value [B, Hkv, T, D]."""
    served: Served | None = getattr(module, "served", None)
    if served is None:  # a module with a sliding window, say, that shares the configuration
        known = forward_of(module).__globals__
        plain = known["ALL_ATTENTION_FUNCTIONS"].get_interface(before, known.get("eager_attention_forward"))
        return plain(module, query, key, value, attention_mask, **options)
    return _answer(module, served, query, key, value, attention_mask, options), None


def attend_torch(
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
    """What the policy answers, [B, T, H, V]; see `attend`. attention_mask: [B, T] bool, False at left padding."""
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
