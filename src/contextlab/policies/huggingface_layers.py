"""The attention layers of a `transformers` model that policies can serve, and what policies must know of each."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from contextlab.compat import cache_argument
from contextlab.errors import InputError
from contextlab.ops.kv import KVLayer
from contextlab.policies.huggingface_latent import entry, keeps_latent, latent_sizes
from contextlab.policies.huggingface_parts import each_turned, parts_of
from contextlab.policies.huggingface_torch import Instead, calls_torch, check_torch
from contextlab.policies.huggingface_visits import Noted, moves, told_layer, visits

NAME = "contextlab"
SERVED = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
"""Layers of a cache in whose place a policy's states may stand."""
UNTURNED = ("dynamic", "longrope")
"""Rotary positions whose frequencies change with the length, so that a key cannot be turned further."""


def model_within(model: nn.Module) -> Any | None:
    """The outermost transformers model of these modules; None when there is none."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)


def attention_layers(model: nn.Module) -> list[tuple[Any, KVLayer]]:
    """The attention modules that keep all keys and values, in order, and what a policy needs to know of each.

    model: of transformers, or one that wraps it. Modules with a sliding window or chunks, and recurrences, are left to
        their own cache. A module that runs several times in a forward is there as a `Visit` for each.
    Raises InputError where a module keeps all keys and values but not so that a policy can take its place.
    """
    theirs = model_within(model)
    if theirs is None:
        raise InputError(f"{type(model).__name__}: expected a model of transformers")
    if theirs.config.is_encoder_decoder or getattr(theirs.config, "add_cross_attention", False):
        raise InputError(f"{theirs.config.model_type}: policies serve decoders without cross-attention")
    caches = {}
    found: list[tuple[Any, KVLayer]] = []
    windows = False
    for module in theirs.modules():
        causal = getattr(module, "is_causal", type(module).__name__.endswith("Attention"))
        index: Any = getattr(module, "layer_idx", None)
        if not causal or not (isinstance(index, int) or told_layer(module)):
            continue
        config: Any = getattr(module, "config", theirs.config)
        if id(config) not in caches:
            caches[id(config)] = DynamicCache(config=config).layers
        if told_layer(module):  # one of those that it stands for
            index = next((i for i, each in enumerate(caches[id(config)]) if isinstance(each, CacheLayerMixin)), -1)
        if index < 0:
            raise InputError(f"{type(module).__name__} stands for several layers, so no policy can serve it")
        kept = caches[id(config)][index]
        if isinstance(kept, DynamicSlidingWindowLayer):
            windows = True
            continue
        if isinstance(kept, LinearAttentionCacheLayerMixin) and not isinstance(kept, CacheLayerMixin):
            continue  # a recurrence
        name = type(module).__name__
        if type(kept).__name__ == "DummyLayer":
            raise InputError(f"{name} reads the keys and values of another layer, so no policy can serve it")
        if type(kept) not in SERVED:
            raise InputError(f"{name} keeps keys and values together with other memory, so no policy can serve it")
        if calls_torch(forward_of(module)):
            check_torch(name, config)
        elif "ALL_ATTENTION_FUNCTIONS" not in forward_of(module).__code__.co_names:
            raise InputError(f"{name} computes attention by itself (no attention interface), so no policy can serve it")
        twice = any(other.layer_idx == module.layer_idx and other.config is module.config for other, _ in found)
        if twice and not (moves(module) or told_layer(module)):
            raise InputError(
                f"{theirs.config.model_type} runs its layers more than once in a forward, each time with a memory of "
                "its own, so no policy can serve it"
            )
        found.append((module, _described(theirs, module)))
    if windows and not found:
        raise InputError(
            f"{theirs.config.model_type}: all of its attention layers have windows, which bound what they keep; "
            "policies serve layers that keep all keys and values"
        )
    if not found and (itself := _by_itself(theirs)):
        raise InputError(f"{itself} computes attention by itself (no attention interface), so no policy can serve it")
    return visits(theirs, found)


def _by_itself(model: PreTrainedModel) -> str | None:
    """A module of a model with a cache of keys and values that attends, and says not for which layer."""
    name = cache_argument(model.forward)
    keeps = any(type(each) in SERVED for each in DynamicCache(config=model.config).layers)
    if name not in ("cache", "past_key_values") or not keeps:
        return None
    names = (type(module).__name__ for module in model.modules() if hasattr(module, "config"))
    return next((each for each in names if each.endswith("Attention")), None)


def forward_of(module: nn.Module) -> Any:
    """The module's forward, without what decorates it."""
    return inspect.unwrap(type(module).forward)


def _described(model: PreTrainedModel, module: Any) -> KVLayer:
    config = module.config
    heads = getattr(module, "num_heads", None) or config.num_attention_heads  # some layers have more than others
    if keeps_latent(module):
        rank, rotary = latent_sizes(module)
        return KVLayer(
            index=0, count=1, heads=heads, kv_heads=1, key_dim=rank + rotary, value_dim=0, latent=rank,
            scale=float(module.scaling), turn=_turn(model, module, rank + rotary), by_row=True,
        )  # fmt: skip
    kv_heads = heads // (getattr(module, "num_key_value_groups", 1) or 1)
    size = getattr(module, "head_dim", None) or getattr(module, "head_size", None) or config.hidden_size // heads
    key_dim = getattr(module, "qk_head_dim", None) or size
    sinks = getattr(module, "sinks", None)
    if calls_torch(forward_of(module)):
        kv_heads, key_dim = _key_at(module, _rotary(model), {}, 0, model.dtype).shape[2:]
        size = key_dim
    elif kv_heads == heads and getattr(module, "num_key_value_heads", None):
        kv_heads = module.num_key_value_heads  # of modules that repeat them on their own
    parts, value_dim = _parts(model, module), getattr(module, "v_head_dim", None) or size
    return KVLayer(
        index=0, count=1, heads=heads, kv_heads=kv_heads // parts, key_dim=key_dim * parts, value_dim=value_dim * parts,
        scale=float(getattr(module, "scaling", key_dim**-0.5)),
        turn=each_turned(_turn(model, module, key_dim), parts), by_row=True,
        sink=None if sinks is None else sinks.detach(), cap=getattr(module, "attn_logit_softcapping", None),
    )  # fmt: skip


def _rotary(model: PreTrainedModel) -> Any:
    """What makes the rotations of a model's positions; None for none."""
    return next((m.rotary_emb for m in model.modules() if hasattr(m, "rotary_emb")), None)


def _turn(model: PreTrainedModel, module: Any, size: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The model's own rotation of keys, as `KVLayer.turn`; None where there is none, or none that adds up."""
    rotary = _rotary(model)
    apply = forward_of(module).__globals__.get("apply_rotary_pos_emb")
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


def _raise_entry(latent: Tensor, rotary: Tensor) -> Any:
    raise _Asked(entry(latent, rotary).transpose(1, 2))


@torch.no_grad()
def _key_at(module: Any, rotary: Any, by_layer: dict[str, Any], place: int, dtype: torch.dtype) -> Tensor:
    """The key [1, 1, Hkv, D] that a module makes of one token at a place; of a latent, what is cached of the token."""
    if keeps_latent(module):
        vars(module)["expand_kv"] = _raise_entry
    try:
        _forward(module, _raise, rotary, by_layer, place, dtype)
    except _Asked as asked:
        return asked.key.transpose(1, 2)
    finally:
        vars(module).pop("expand_kv", None)
    raise TypeError(f"{type(module).__name__} makes no keys for its attention")


def _forward(
    module: Any,
    attend: Callable[..., Any],
    rotary: Any,
    by_layer: dict[str, Any],
    place: int,
    dtype: torch.dtype,
    noted: Noted | None = None,
) -> None:
    """Run a module on one token at a place, with `attend` for its attention and perhaps `noted` for its cache."""
    device = next(module.parameters()).device
    token = torch.linspace(-1, 1, module.config.hidden_size, device=device).sin().to(dtype)[None, None]
    where = rotary(token, torch.full((1, 1), place, device=device), **by_layer)
    cache = cache_argument(module.forward)
    given = {"hidden_states": token, "position_embeddings": where, **({cache: noted} if cache else {})}
    for name, each in inspect.signature(module.forward).parameters.items():
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD:
            given.setdefault(name, None)
    given["attention_mask"] = None
    if calls_torch(forward_of(module)):
        with Instead(functools.partial(attend, module)):
            module(**given)
        return
    before = module.config._attn_implementation
    AttentionInterface.register(f"{NAME}_keys", attend)
    try:
        module.config._attn_implementation = f"{NAME}_keys"
        module(**given)
    finally:
        module.config._attn_implementation = before


def attends_often(module: Any) -> bool:
    """Whether the module's forward names attention more than once, as far as its code tells."""
    loads = [each.argval for each in dis.get_instructions(forward_of(module)) if each.opname.startswith("LOAD_FAST")]
    names = [name for each in loads for name in (each if isinstance(each, tuple) else (each,))]  # some load two
    return names.count("attention_interface") > 1


@torch.no_grad()
def _parts(model: PreTrainedModel, module: Any) -> int:
    """`parts_of` the module, by one token on its own."""
    if not attends_often(module):
        return 1
    rotary = _rotary(model)
    calls, noted = [], Noted()

    def note(_module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        calls.append((query, key, value))
        return query.new_zeros(*query.transpose(1, 2).shape[:3], value.shape[3]), None

    # Where it cannot be run so, what attends while a policy is attached finds it out.
    with contextlib.suppress(TypeError, RuntimeError, AttributeError):
        _forward(module, note, rotary, {}, 3, model.dtype, noted)
    return parts_of(type(module).__name__, calls, noted.values)
