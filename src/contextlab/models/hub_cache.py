"""The caches of transformers taken apart: the tensors that they hold, the form without them, and how they grow."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from contextlab.errors import InputError
from contextlab.state import State, own

MEASURED = (2, 3, 7)
"""The lengths at which the size of a state is measured."""


@dataclass(frozen=True)
class _Slot:
    """Where a tensor of a cache was.

    index: of the leaf that it became; a tensor that stands at two places is one leaf. fresh: whether the model writes
    into it in place. dim: its batch's dimension.
    """

    index: int
    fresh: bool
    dim: int = 0


BATCH_SECOND = ("indexer_position_ids", "position_ids")
"""Tensors of caches that have the batch second: [kinds of position, B, T]. The latter is its name before 5.24."""


def _is_cache(value: Any) -> bool:
    ours = type(value).__module__ == "contextlab.policies.huggingface_cache"
    return ours or (type(value).__module__.startswith("transformers.") and "Config" not in type(value).__name__)


def without_rows(leaf: Tensor, rows: Tensor) -> Tensor:
    """leaf [B, ...] with zeros in `rows` [B] bool, as before anything was read."""
    if not leaf.is_floating_point():
        return leaf
    return leaf.masked_fill(rows.view(-1, *(1,) * (leaf.ndim - 1)), 0)


def emptied(
    value: Any, batch: int, leaves: list[Tensor | State], name: str = "", seen: dict[int, _Slot] | None = None
) -> Any:
    """`value` with slots for the tensors [B, ...] and policies' states, all put into `leaves`."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, State):
        leaves.append(value)
        return _Slot(len(leaves) - 1, fresh=False)
    if isinstance(value, Tensor):
        dim = 1 if name in BATCH_SECOND and value.ndim == 3 else 0
        if value.ndim > 1 and value.shape[dim] == batch and value.numel():
            leaves.append(own(value.movedim(dim, 0)))
            slot = seen[id(value)] = _Slot(len(leaves) - 1, name not in ("keys", "values"), dim)
            return slot
        return value.clone()
    if isinstance(value, dict):
        return {key: emptied(each, batch, leaves, name, seen) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(emptied(each, batch, leaves, name, seen) for each in value)
    if _is_cache(value):
        shell = copy.copy(value)
        for key, each in vars(value).items():
            shell.__dict__[key] = emptied(each, batch, leaves, key, seen)
        return shell
    return value


def filled(form: Any, leaves: list[Any]) -> Any:
    """The cache again, with the tensors in their slots; those that the model overwrites are copies."""
    if isinstance(form, _Slot):
        leaf = leaves[form.index]
        if isinstance(leaf, State):
            return leaf
        return (leaf.clone() if form.fresh else leaf).movedim(0, form.dim)
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


@dataclass(frozen=True)
class Place:
    """Where a tensor of a cache stands: the layer that holds it, its name there, and the way to it from the cache."""

    path: str
    name: str
    layer: Any

    @property
    def key(self) -> str:
        """What it is called where it stands, as in a dictionary of tensors."""
        return self.path.rpartition(".")[2]


def places(form: Any, at: Place | None = None) -> Iterator[tuple[int, Place]]:
    """The leaf of each slot of an emptied cache, and where it stands; a leaf at two places comes twice."""
    at = Place("", "", None) if at is None else at
    if isinstance(form, _Slot):
        yield form.index, at
        return
    inner: Any = ()
    if isinstance(form, dict):
        inner = ((at.name, key, each, at.layer) for key, each in form.items())
    elif isinstance(form, list | tuple):
        inner = ((at.name, i, each, at.layer) for i, each in enumerate(form))
    elif _is_cache(form):
        inner = ((key, key, each, form) for key, each in vars(form).items())
    for name, key, each, layer in inner:
        yield from places(each, Place(f"{at.path}.{key}", name, layer))


@dataclass(frozen=True)
class Growth:
    """How many bytes a tensor of a cache takes once a row has read so many tokens: fixed + each * `count`.

    kind: what there is one of. "token"; "window": of the last `period` tokens; "block": of `period` tokens, complete;
        "rest": of the tokens after the last complete block; "any": whether a block is complete.
    """

    kind: Literal["token", "window", "block", "rest", "any"]
    each: int
    fixed: int = 0
    period: int = 1

    def count(self, length: int) -> int:
        """How many there are after `length` tokens."""
        if self.kind == "window":
            return min(length, self.period)
        blocks, rest = divmod(length, self.period)
        return {"token": length, "block": blocks, "rest": rest, "any": min(blocks, 1)}[self.kind]

    def nbytes(self, length: int) -> int:
        """Bytes of one row after `length` tokens."""
        return self.fixed + self.each * self.count(length)

    def reads(self, length: int) -> int:
        """Of how many of them `length` tokens read, one after the other: each sees those before it and its own."""
        if self.kind == "block":
            blocks, rest = divmod(length, self.period)
            return self.period * (blocks * (blocks - 1) // 2) + blocks * (rest + 1)
        near = min(length, self.period + 1) if self.kind == "window" else length
        return near * (near + 1) // 2 + (length - near) * near


def _growth(place: Place, sizes: dict[int, int]) -> Growth | None:
    """The rule that the bytes of a tensor follow, by the number of tokens read; None where no rule fits them all."""
    rules: list[Growth] = []
    if getattr(place.layer, "is_sliding", False) and place.name in ("keys", "values"):
        rules.append(Growth("window", 0, 0, place.layer.sliding_window - 1))
    if rate := _block_of(place):
        rules += [Growth("block", 0, 0, rate), Growth("rest", 0, 0, rate), Growth("any", 0, 0, rate)]
    found = []
    for rule in rules:
        longest = max((n for n in sizes if rule.count(n)), default=None)
        if longest is not None:
            found.append(replace(rule, each=sizes[longest] // rule.count(longest)))
    first, last = min(sizes), max(sizes)
    each = (sizes[last] - sizes[first]) // (last - first)
    found.append(Growth("token", each, sizes[first] - each * first))
    return next((rule for rule in found if all(rule.nbytes(n) == size for n, size in sizes.items())), None)


def _block_of(place: Place) -> int:
    """Tokens that the layer there makes one entry of; 0 where it keeps each by itself."""
    return int(getattr(place.layer, "compress_rate", 0))


def grown(read: Callable[[int], list[tuple[Place, int]]], kind: str) -> list[tuple[Place, Growth]]:
    """The tensors of a cache, and how each grows.

    read: the tensors after so many tokens of one row, and their bytes. kind: the model's type, for errors.

    Raises InputError where a tensor grows by no rule that is known.
    """
    measured = {length: read(length) for length in MEASURED}
    longest = max((_block_of(place) for found in measured.values() for place, _ in found), default=0)
    if longest:
        measured[longest + 2] = read(longest + 2)
    known = {place.path: place for found in measured.values() for place, _ in found}
    after = {length: {place.path: size for place, size in found} for length, found in measured.items()}
    rules = []
    for path, place in known.items():
        sizes = {length: found.get(path, 0) for length, found in after.items()}
        rule = _growth(place, sizes)
        if rule is None:
            said = ", ".join(f"{size} bytes after {length} tokens" for length, size in sizes.items())
            raise InputError(
                f"{kind}: its state's {path[1:]} grows by no rule that is known ({said}), so that its size is not "
                "foretold; read the tokens and take state.nbytes"
            )
        rules.append((place, rule))
    return rules


def products(rules: list[tuple[Place, Growth]], length: int, shared: int, heads: int, index_heads: int) -> int:
    """Products of queries and keys and of weights and values when `length` tokens are read, times bytes of a number.

    shared: query heads on a key head. heads, index_heads: query heads, and those of an indexer.
    """
    total = 0
    for place, rule in rules:
        if place.name in ("keys", "values"):
            readers = shared
        elif place.name in ("indexer_keys", "idx_keys") or (place.name, place.key) == ("compressed_kv", "indexer"):
            readers = index_heads
        elif place.name == "compressed_kv":
            readers = 2 * heads  # key and value at once, of one head
        else:
            continue
        total += readers * rule.each * rule.reads(length)
    return total
