"""Layers of `transformers` models that cache one latent of all keys and values, and one rotary key, of each token.

Their modules (multi-head latent attention, as in DeepSeek V2 and V3) make the keys and values of all heads of what the
cache holds, by a linear map: `expand_kv`. A policy is given what the cache would hold, as one head whose keys are the
values, too, and queries that were mapped into that space; so what it keeps, drops and quantizes is the latent.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.policies.core.base import Served
from contextlab.state import State


def keeps_latent(module: nn.Module) -> bool:
    """Whether the module caches a latent."""
    return callable(getattr(module, "expand_kv", None))


def latent_sizes(module: Any) -> tuple[int, int]:
    """Numbers of a token's latent and of its rotary key.

    Raises InputError where the module does more than map them linearly.
    """
    sizes = int(module.kv_lora_rank), int(module.qk_rope_head_dim)
    like = next(module.parameters())
    none = [like.new_zeros(1, 1, 1, size) for size in sizes]
    with torch.no_grad():
        if any(bool(x.any()) for x in type(module).expand_kv(module, *none)):
            raise InputError(f"{type(module).__name__} adds a bias to its latent, so no policy can serve it")
    return sizes


def entry(latent: Tensor, rotary: Tensor) -> Tensor:
    """What is cached of tokens, as one: latent [B, 1, T, R], rotary [B, 1, T, P] -> [B, T, 1, R + P]."""
    return torch.cat((latent, rotary), -1).transpose(1, 2)


@contextlib.contextmanager
def noting(modules: list[nn.Module]) -> Iterator[None]:
    """While open, the modules among these that keep a latent leave what they are about to expand in `entry`."""
    with contextlib.ExitStack() as stack:
        for module in filter(keeps_latent, modules):
            vars(module)["expand_kv"] = functools.partial(_noted, module)
            stack.callback(lambda own: [own.pop(name, None) for name in ("expand_kv", "entry")], vars(module))
        yield


def _noted(module: Any, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    vars(module)["entry"] = entry(latent, rotary)
    return type(module).expand_kv(module, latent, rotary)


def attend_latent(
    served: Served, module: Any, query: Tensor, state: State | None, mask: Tensor | None, keep_state: bool
) -> tuple[Tensor, State | None]:
    """The answer [B, T, H, V] of a policy to queries [B, H, T, D] on the tokens just noted, and its next state."""
    held, rank = vars(module).pop("entry"), served.layer.latent
    size = held.shape[-1]
    basis = torch.eye(size, dtype=held.dtype, device=held.device)[None, None]
    # By what the module itself does, whatever stands before its weights. The cost is that of expanding `size` tokens.
    keys, values = type(module).expand_kv(module, basis[..., :rank], basis[..., rank:])
    q = torch.einsum("bhtd,hrd->bthr", query, keys[0].to(query.dtype))
    mean, after = served.attend(q, held, held[..., :0], state, mask, keep_state)
    return torch.einsum("bthr,hrv->bthv", mean[..., :rank], values[0, :, :rank].to(mean.dtype)), after
