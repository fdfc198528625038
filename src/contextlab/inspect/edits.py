"""What is put in the place of what flows somewhere: values and functions, of all of it or of a part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from contextlab.errors import InputError
from contextlab.spec import describe
from contextlab.state import RecurrentState, State

PARTS = ("rows", "places", "heads", "channels")
Change = Tensor | State | Callable[[Any], Any]


@dataclass(frozen=True)
class Edit:
    """What is put into a place; see `only`."""

    change: Change
    rows: tuple[int, ...] | None = None
    places: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None

    def __call__(self, value: Any, read: int, name: str) -> Any:
        """What goes on in the place of `value`, [B, T, ...] or a State, which follows `read` tokens."""
        if not isinstance(value, Tensor):
            if any(getattr(self, part) is not None for part in PARTS):
                raise InputError(f"{name}: a state is edited as a whole; leave out rows, places, heads and channels")
            made = self.change(value) if callable(self.change) else self.change
            _alike(value, made, name)
            return made
        at = self._at(value, read, name)
        if isinstance(self.change, State):
            raise InputError(f"{name}: expected a value {list(value.shape)} or a function of it, got a State")
        made = self.change(value) if callable(self.change) else self._part(value, read, name)
        if not isinstance(made, Tensor) or made.shape != value.shape:
            found = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise InputError(f"{name}: expected a value {list(value.shape)}, got {found}")
        made = made.to(value)
        return made if at is None else torch.where(at, made, value)

    def _part(self, value: Tensor, read: int, name: str) -> Tensor:
        """What a given value has for this call: all of it, or its next tokens, where the model reads in pieces."""
        whole = self.change
        assert isinstance(whole, Tensor)
        alike = whole.ndim == value.ndim > 1 and whole.shape[0] == value.shape[0] and whole.shape[2:] == value.shape[2:]
        if not alike or whole.shape[1] < read + value.shape[1]:
            expected = [len(value), read + value.shape[1], *value.shape[2:]] if value.ndim > 1 else list(value.shape)
            raise InputError(f"{name}: expected a value {expected}, got {list(whole.shape)}")
        return whole[:, read : read + value.shape[1]]

    def _at(self, value: Tensor, read: int, name: str) -> Tensor | None:
        """Where `value` is edited, as a mask that broadcasts over it; None for everywhere."""
        found = None
        for part, dim in zip(PARTS, (0, 1, 2, -1), strict=True):
            wanted = getattr(self, part)
            if wanted is None:
                continue
            if part == "heads" and value.ndim < 4:
                raise InputError(f"{name}: has no heads, but is {list(value.shape)}; leave out heads")
            size, first = value.shape[dim], read if part == "places" else 0
            if part != "places" and (wrong := [each for each in wanted if not 0 <= each < size]):
                raise InputError(f"{name}: {part} go from 0 to {size - 1}, got {wrong[0]}")
            mask = torch.zeros(size, dtype=torch.bool, device=value.device)
            mask[[each - first for each in wanted if 0 <= each - first < size]] = True
            shape = [1] * value.ndim
            shape[dim] = size
            found = mask.view(shape) if found is None else found & mask.view(shape)
        return found


def edit_of(change: Change | Edit) -> Edit:
    """An edit as it is, or of all that flows through a place. Raises InputError of what is none."""
    if isinstance(change, Edit):
        return change
    if not (callable(change) or isinstance(change, Tensor | State)):
        raise InputError(f"patch: expected a tensor, a State or a function, got {type(change).__name__}")
    return Edit(change)


def only(
    change: Change,
    *,
    rows: Sequence[int] | None = None,
    places: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
) -> Edit:
    """A value, or a function of what is there, put in for a part of what flows through a place; the rest stays.

    change: as `patch` takes it, of the shape of all that flows there, [B, T, ...].
    rows: of the batch. places: of the text, from 0, whatever the pieces that it is read in.
    heads: of values [B, T, H, ...]. channels: of the last dimension. None for all.
    """
    edit, chosen = edit_of(change), dict[str, Any]()
    for name, part in zip(PARTS, (rows, places, heads, channels), strict=True):
        if part is None:
            continue
        found = whole_numbers(name, part)
        if not found or min(found) < 0:
            raise InputError(f"{name}: expected one or more from 0 on, got {found}")
        if getattr(edit, name) is not None:
            raise InputError(f"{name}: this edit is of {name} {list(getattr(edit, name))} already; give them once")
        chosen[name] = tuple(found)
    return replace(edit, **chosen)


def whole_numbers(name: str, given: Any) -> list[int]:
    """Whole numbers as a list; name: what they are. Raises InputError of anything else."""
    found = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
    if not isinstance(found, str) and isinstance(found, Iterable):
        found = list(found)
        if all(isinstance(each, int | np.integer) and not isinstance(each, bool) for each in found):
            return [int(each) for each in found]
    raise InputError(f"{name}: expected whole numbers in a list, got {describe(given)}")


def _alike(value: Any, made: Any, name: str) -> None:
    """Raises InputError where a state is replaced by something else, or tensors whose size is fixed by others."""
    if type(made) is not type(value):
        raise InputError(f"{name}: expected a {type(value).__name__}, got {type(made).__name__}")
    if not (isinstance(value, RecurrentState) and isinstance(made, RecurrentState)):
        return
    shapes, found = ({key: list(each.shape) for key, each in state.memory.items()} for state in (value, made))
    if shapes != found:
        raise InputError(f"{name}: expected a state of {shapes}, got one of {found}")


def ranks(count: int) -> Callable[[State], State]:
    """A function that leaves of each head's matrix in a state its `count` largest singular values, to `patch` with.

    Of states of linear attention, delta rules and state-space mixers, whose tensors [B, H, K, V] are matrices.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise InputError(f"ranks: expected a whole number from 0 on, got {describe(count)}")

    def cut(tensor: Tensor) -> Tensor:
        if tensor.ndim != 4:
            return tensor
        u, s, v = torch.linalg.svd(tensor, full_matrices=False)
        return (u[..., :count] * s[..., None, :count]) @ v[..., :count, :]

    def edit(state: State) -> State:
        found = [each for each in pytree.tree_leaves(state, is_leaf=_recurrent) if _recurrent(each)]
        if not any(tensor.ndim == 4 for each in found for tensor in each.tensors()):
            raise InputError(f"ranks: a {type(state).__name__} has no matrices [B, H, K, V]")
        return pytree.tree_map(lambda leaf: leaf.map(cut) if _recurrent(leaf) else leaf, state, is_leaf=_recurrent)

    return edit


def _recurrent(leaf: Any) -> bool:
    return isinstance(leaf, RecurrentState)
