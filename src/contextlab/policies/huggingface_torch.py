"""Attention modules of `transformers` that call torch's attention, not that of their configuration (falcon).

While such a module runs, torch's attention is a function of ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from contextlab.errors import InputError


def calls_torch(forward: Any) -> bool:
    """Whether a module's forward calls torch's attention, and not that of its configuration."""
    names = forward.__code__.co_names
    return "scaled_dot_product_attention" in names and "ALL_ATTENTION_FUNCTIONS" not in names


def check_torch(name: str, config: Any) -> None:
    """Raises InputError where a module of this name that calls torch's attention would do something else."""
    if getattr(config, "alibi", False):
        raise InputError(
            f"{name} adds ALiBi to its scores by itself (no attention interface), so no policy can serve it"
        )
    if config._attn_implementation != "sdpa":
        raise InputError(f"{name} is served where it calls torch's attention; set attn_implementation='sdpa'")


class Instead(TorchFunctionMode):
    """While open, torch's attention is `attend`; what it calls itself is torch's own."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.attend if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def through(module: Any, attend: Callable[..., Tensor]) -> Callable[[], None]:
    """Let torch's attention be attend(module, query, key, value, ...) whenever the module runs.

    attend: takes queries [B, H, T, D], and keys and values [B, H, L, D], as torch's function does.

    Returns what puts the module back.
    """
    own, forward = vars(module).get("forward"), module.forward

    @functools.wraps(forward)
    def run(*args: Any, **options: Any) -> Any:
        with Instead(functools.partial(attend, module)):
            return forward(*args, **options)

    def back() -> None:
        vars(module).pop("forward")
        if own is not None:
            vars(module)["forward"] = own

    vars(module)["forward"] = run
    return back


def padding_of(name: str, mask: Tensor | None, queries: int) -> Tensor | None:
    """The padding [B, T] bool, True at tokens, that a mask [B, 1, T, N] bool of T queries says; None for none.

    Raises InputError on anything but causal attention with padding at the left.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1:
        raise InputError(f"{name} adds a bias to its scores; policies serve plain causal attention")
    real = mask[:, 0, -1]  # what the last token sees: all of its row
    past = torch.ones(queries, real.shape[1], dtype=torch.bool, device=mask.device).tril(real.shape[1] - queries)
    own = real[:, -queries:]
    if not torch.equal(mask[:, 0][own], (real[:, None] & past)[own]) or bool((real[:, 1:] < real[:, :-1]).any()):
        raise InputError("policies serve plain causal attention; packed sequences and other masks are refused")
    return None if bool(real.all()) else own
