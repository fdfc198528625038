"""The State protocol: all that a mixer remembers of the tokens it has read, and how many bytes that takes.

A state is a dataclass of tensors and a torch pytree, so it can be mapped, moved, saved, vmapped and counted.
Field values may be tensors, other states, None, or dicts / tuples / lists of these; `length` and fields marked
`field(metadata={"static": True})` are plain Python values. Every tensor has the batch as its first dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

S = TypeVar("S", bound="State")


@dataclass
class State:
    """Base of every state.

    length: tokens read so far (padding counts as read).
    """

    length: int = dataclasses.field(default=0, metadata={"static": True}, kw_only=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytree.register_pytree_node(
            cls,
            _flatten,
            lambda children, context: _unflatten(cls, children, context),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the state, [B, ...], nested ones too; one by one, as often only the first is asked for."""
        return _tensors(self)

    @property
    def nbytes(self) -> int:
        """Bytes really held: each storage counts once and whole, even where a tensor is a view of a part of it."""
        storages = {}
        for tensor in self.tensors():
            storage = tensor.untyped_storage()
            storages[(tensor.device, storage.data_ptr())] = storage.nbytes()
        return sum(storages.values())

    def map(self: S, function: Callable[[Tensor], Tensor]) -> S:
        """The same state with `function`, [B, ...] -> any shape, applied to every tensor."""
        return pytree.tree_map_only(Tensor, function, self)

    def select(self: S, rows: Tensor) -> S:
        """Pick or repeat batch rows. rows: int64 [N] of row indices. Returns a state of batch N that shares nothing."""

        def pick(leaf: Any) -> Any:
            if isinstance(leaf, State):  # it may hold what all rows share
                return leaf.select(rows)
            return leaf.index_select(0, rows.to(leaf.device)) if isinstance(leaf, Tensor) else leaf

        return pytree.tree_map(pick, self, is_leaf=lambda leaf: isinstance(leaf, State) and leaf is not self)

    def to(self: S, *args: Any, **kwargs: Any) -> S:
        """Move or cast as `Tensor.to` does; a dtype applies to floating-point tensors only."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking)

        return self.map(move)

    def reclaim(self) -> None:
        """Say that no state that went on from this one is used any more, so that it may write over their tokens."""
        for part in pytree.tree_leaves(self, is_leaf=lambda leaf: isinstance(leaf, State) and leaf is not self):
            if isinstance(part, State):
                part.reclaim()

    def cut(self: S, length: int) -> S | None:
        """The state after its first `length` tokens; None where what later ones wrote cannot be taken out.

        No padding may be among the later ones. This state must not be used any more (`reclaim`).
        """
        return None

    def detach(self: S) -> S:
        """The same values, cut from the autograd graph (for truncated back-propagation through time)."""
        return self.map(Tensor.detach)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a field's value, in the order of the pytree's leaves."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, State):
        for name in _tensor_fields(type(value)):  # type: ignore[arg-type]  # a class hashes, whatever its instances do
            yield from _tensors(getattr(value, name))
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


@cache
def _tensor_fields(cls: type[State]) -> tuple[str, ...]:
    """The names of the fields that hold tensors."""
    return tuple(each.name for each in dataclasses.fields(cls) if not each.metadata.get("static"))


def _flatten(state: State) -> tuple[list[Any], tuple[Any, ...]]:
    children, names, static = [], [], []
    for each in dataclasses.fields(state):
        value = getattr(state, each.name)
        if each.metadata.get("static"):
            static.append((each.name, value))
        else:
            names.append(each.name)
            children.append(value)
    return children, (tuple(names), tuple(static))


def _unflatten(cls: type[State], children: Any, context: tuple[Any, ...]) -> State:
    names, static = context
    return cls(**dict(zip(names, children, strict=True)), **dict(static))


@dataclass
class RecurrentState(State):
    """A state whose size does not depend on the length: named tensors, each [B, ...]."""

    memory: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.memory[name]


@dataclass
class StackState(State):
    """The states of a stack of mixers, in order of use."""

    layers: list[State] = dataclasses.field(default_factory=list)


def own(tensor: Tensor) -> Tensor:
    """`tensor`, of any shape, when it fills its storage, else a copy: a small view would keep a large buffer alive."""
    filled = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if filled else tensor.clone(memory_format=torch.contiguous_format)


def tensor_bytes(*shape: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a dense tensor of this shape."""
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize


@dataclass
class KVState(State):
    """Every key and value read: buffers that grow by a quarter, so that adding a token costs O(1) on average.

    The capacity is a function of the length alone, so the bytes do not depend on the pieces that were read.
    Without gradients tokens are written in place; states that share a buffer (one continues the other) share
    a high-water mark, and a state that finds tokens beyond its own length copies before it writes.

    keys: [B, Hkv, capacity, D]; the first `length` are held. Rotary positions are already applied.
    values: [B, Hkv, capacity, V].
    start: [B] int64, the left-padding tokens of each row.
    padded: whether any piece came with a mask; False lets attention do without one.
    """

    keys: Tensor
    values: Tensor
    start: Tensor
    padded: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self) -> None:
        # Tokens written in the shared buffer; None: anyone may share the buffer (a detached copy, say). It is
        # no dataclass field, so that it does not travel through the pytree: what comes out starts at None.
        self._written: list[int] | None = None

    @classmethod
    def empty(cls, k: Tensor, v: Tensor) -> Self:
        """A state that has read nothing, for tokens like k [B, T, Hkv, D] and v [B, T, Hkv, V]."""
        batch, _, heads, _ = k.shape
        return cls(
            k.new_empty(batch, heads, 0, k.shape[-1]),
            v.new_empty(batch, heads, 0, v.shape[-1]),
            torch.zeros(batch, dtype=torch.int64, device=k.device),
        )

    @staticmethod
    @lru_cache(maxsize=64)  # all layers ask the same
    def capacity(length: int) -> int:
        """Tokens that the buffers have room for: 32, then 1.25 times more, in multiples of 32."""
        return _room(length)

    @staticmethod
    def bytes_at(length: int, batch: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """The exact `nbytes` after `length` tokens."""
        kept = tensor_bytes(batch, heads, KVState.capacity(length), key_dim + value_dim, dtype=dtype)
        return kept + tensor_bytes(batch, dtype=torch.int64)

    def append(self, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Self:
        """The state after reading k [B, T, Hkv, D] and v [B, T, Hkv, V]; this one stays valid.

        mask: [B, T] bool, False at left padding.
        """
        length = self.length + k.shape[1]
        room = _room(length) if torch.compiler.is_compiling() else self.capacity(length)  # a cache has no graph
        mark: list[int] | None = None
        if torch.is_grad_enabled():
            keys = _extended(self.keys[:, :, : self.length], k, room)
            values = _extended(self.values[:, :, : self.length], v, room)
        else:
            keys, values, mark = self.keys, self.values, self._written
            if mark is None or mark[0] > self.length or keys.shape[2] != room or frozen(keys):
                keys, values = _moved(keys, self.length, room), _moved(values, self.length, room)
            # A new list when the buffer is new, else the one that the other holders of this buffer see.
            mark = mark if mark is not None and keys is self.keys else [0]
            keys[:, :, self.length : length] = k.transpose(1, 2)
            values[:, :, self.length : length] = v.transpose(1, 2)
            mark[0] = length
        start = self.start if mask is None else self.start + (~mask).sum(1)
        after = type(self)(keys, values, start, self.padded or mask is not None, length=length)
        after._written = mark
        return after

    def reclaim(self) -> None:
        """See `State.reclaim`."""
        if self._written is not None:
            self._written[0] = min(self._written[0], self.length)

    def cut(self, length: int) -> Self:
        """See `State.cut`: the same buffers, whose later tokens are written over."""
        kept = dataclasses.replace(self, length=length)
        kept._written = self._written
        kept.reclaim()
        return kept

    def cached(self) -> tuple[Tensor, Tensor]:
        """The keys [B, length, Hkv, D] and values [B, length, Hkv, V], as views of the buffers."""
        return self.keys[:, :, : self.length].transpose(1, 2), self.values[:, :, : self.length].transpose(1, 2)

    def positions(self) -> Tensor | None:
        """Each row's token positions [B, length], negative at padding; None when nothing is padded."""
        if not self.padded:
            return None
        return torch.arange(self.length, device=self.start.device) - self.start[:, None]


@dataclass
class WindowState(State):
    """The last tokens, and the first ones as attention sinks, in a fixed number of slots.

    A token is held once: it moves to its sink slot when it leaves the window, if it is one of the first.

    keys: [B, Hkv, sinks + window - 1, D]: the sink slots, then the window's, the latest last.
    values: [B, Hkv, sinks + window - 1, V].
    position: [B, sinks + window - 1] int64, the place of each slot's token in its row; -1 for none.
    start: [B] int64, the left-padding tokens of each row.
    sinks: number of sink slots.
    padded: whether any piece came with a mask; False lets attention do without one.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    start: Tensor
    sinks: int = dataclasses.field(default=0, metadata={"static": True})
    padded: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def empty(cls, k: Tensor, v: Tensor, window: int, sinks: int = 0) -> WindowState:
        """A state that has read nothing, for tokens like k [B, T, Hkv, D] and v [B, T, Hkv, V]."""
        batch, _, heads, _ = k.shape
        slots = sinks + window - 1
        return cls(
            k.new_zeros(batch, heads, slots, k.shape[-1]),
            v.new_zeros(batch, heads, slots, v.shape[-1]),
            torch.full((batch, slots), -1, device=k.device),
            torch.zeros(batch, dtype=torch.int64, device=k.device),
            sinks,
        )

    @staticmethod
    def bytes_for(
        window: int, sinks: int, batch: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
    ) -> int:
        """The exact `nbytes`, at any length."""
        slots = sinks + window - 1
        kept = tensor_bytes(batch, heads, slots, key_dim + value_dim, dtype=dtype)
        return kept + tensor_bytes(batch, slots + 1, dtype=torch.int64)

    def append(self, k: Tensor, v: Tensor, position: Tensor, mask: Tensor | None = None) -> WindowState:
        """The state after reading k [B, T, Hkv, D] and v [B, T, Hkv, V]; this one stays valid.

        position: [B or 1, T] int64, of each token in its row, negative at padding.
        mask: [B, T] bool, False at left padding.
        """
        batch, read = k.shape[:2]
        keys = torch.cat([self.keys, k.transpose(1, 2)], 2)
        values = torch.cat([self.values, v.transpose(1, 2)], 2)
        at = torch.cat([self.position, position.clamp_min(-1).expand(batch, -1)], 1)
        cut = self.sinks + read  # from here on the tokens of the new window
        if self.sinks:
            # Each sink slot takes the token of its position among those that are no longer in the window.
            match = at[:, None, :cut] == torch.arange(self.sinks, device=k.device)[:, None]
            window = torch.arange(cut, at.shape[1], device=k.device).expand(batch, -1)
            chosen = torch.cat([match.to(torch.uint8).argmax(-1), window], 1)
            at = at.gather(1, chosen)
            at[:, : self.sinks].masked_fill_(~match.any(-1), -1)
            slot = chosen[:, None, :, None]
            keys = keys.gather(2, slot.expand(-1, keys.shape[1], -1, keys.shape[3]))
            values = values.gather(2, slot.expand(-1, values.shape[1], -1, values.shape[3]))
        else:
            keys, values, at = own(keys[:, :, cut:]), own(values[:, :, cut:]), own(at[:, cut:])
        start = self.start if mask is None else self.start + (~mask).sum(1)
        padded = self.padded or mask is not None
        return WindowState(keys, values, at, start, self.sinks, padded, length=self.length + read)

    def cached(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [B, n, Hkv, D], values [B, n, Hkv, V], places [B, n]; unpadded, only the slots in use."""
        keys, values, at = self.keys.transpose(1, 2), self.values.transpose(1, 2), self.position
        slots = at.shape[1]
        if not self.padded and self.length < slots:
            # Then the slots in use follow from the length: the first of the sinks', the last of the window's.
            sunk = min(self.sinks, max(0, self.length - (slots - self.sinks)))
            first = max(self.sinks, slots - self.length)
            keys = torch.cat([keys[:, :sunk], keys[:, first:]], 1)
            values = torch.cat([values[:, :sunk], values[:, first:]], 1)
            at = torch.cat([at[:, :sunk], at[:, first:]], 1)
        return keys, values, at


def _room(length: int) -> int:
    """See `KVState.capacity`."""
    room = 0
    while room < length:
        room = -(-max(room * 5 // 4, room + 1) // 32) * 32
    return room


def _extended(old: Tensor, new: Tensor, room: int) -> Tensor:
    """old [B, H, L, D] and new [B, T, H, D] in one fresh buffer [B, H, room, D], differentiably."""
    rest = old.new_zeros(*old.shape[:2], room - old.shape[2] - new.shape[1], old.shape[3])
    return torch.cat([old, new.transpose(1, 2), rest], 2)


def _moved(old: Tensor, length: int, room: int) -> Tensor:
    """The first `length` of old [B, H, capacity, D] in a fresh buffer [B, H, room, D]."""
    buffer = old.new_zeros(*old.shape[:2], room, old.shape[3])
    buffer[:, :, :length] = old[:, :, :length]
    return buffer


def frozen(tensor: Tensor) -> bool:
    """Whether PyTorch forbids writing in place: a tensor of any shape made under inference_mode, used outside it."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()
