"""The caches of transformers taken apart: the tensors that they hold, and the form without them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from contextlab.state import State, own


@dataclass(frozen=True)
class _Slot:
    """Where a tensor of a cache was; `fresh` when the model writes into it in place."""

    fresh: bool


def _is_cache(value: Any) -> bool:
    ours = type(value).__module__ == "contextlab.policies.huggingface"
    return ours or (type(value).__module__.startswith("transformers.") and "Config" not in type(value).__name__)


def without_rows(leaf: Tensor, rows: Tensor) -> Tensor:
    """leaf [B, ...] with zeros in `rows` [B] bool, as before anything was read."""
    if not leaf.is_floating_point():
        return leaf
    return leaf.masked_fill(rows.view(-1, *(1,) * (leaf.ndim - 1)), 0)


def emptied(value: Any, batch: int, leaves: list[Tensor | State], name: str = "") -> Any:
    """`value` with slots for the tensors [B, ...] and policies' states, all put into `leaves`."""
    if isinstance(value, State):
        leaves.append(value)
        return _Slot(fresh=False)
    if isinstance(value, Tensor):
        if value.ndim > 1 and value.shape[0] == batch and value.numel():
            leaves.append(own(value))
            return _Slot(fresh=name not in ("keys", "values"))
        return value.clone()
    if isinstance(value, dict):
        return {key: emptied(each, batch, leaves, name) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(emptied(each, batch, leaves, name) for each in value)
    if _is_cache(value):
        shell = copy.copy(value)
        for key, each in vars(value).items():
            shell.__dict__[key] = emptied(each, batch, leaves, key)
        return shell
    return value


def filled(form: Any, leaves: Iterator[Any]) -> Any:
    """The cache again, with the tensors in their slots; those that the model overwrites are copies."""
    if isinstance(form, _Slot):
        tensor = next(leaves)
        return tensor.clone() if form.fresh else tensor
    if isinstance(form, Tensor):
        return form.clone()
    if isinstance(form, dict):
        return {key: filled(each, leaves) for key, each in form.items()}
    if isinstance(form, list | tuple):
        return type(form)(filled(each, leaves) for each in form)
    if _is_cache(form):
        shell = copy.copy(form)
        for key, each in vars(form).items():
            shell.__dict__[key] = filled(each, leaves)
        return shell
    return form


def places(form: Any, leaves: Iterator[Any], holder: Any = None, name: str = "") -> Iterator[Any]:
    """(the layer that holds it, its name there, tensor) of each tensor of an emptied cache."""
    if isinstance(form, _Slot):
        yield holder, name, next(leaves)
    elif isinstance(form, dict):
        for each in form.values():
            yield from places(each, leaves, holder, name)
    elif isinstance(form, list | tuple):
        for each in form:
            yield from places(each, leaves, holder, name)
    elif _is_cache(form):
        for key, each in vars(form).items():
            yield from places(each, leaves, form, key)
