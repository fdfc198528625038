"""The State protocol: all that a mixer remembers of the tokens it has read, and how many bytes that takes.

A state is a dataclass of tensors and a torch pytree, so it can be mapped, moved, saved, vmapped and counted.
Field values may be tensors, other states, None, or dicts / tuples / lists of these; `length` and fields marked
`field(metadata={"static": True})` are plain Python values. Every tensor has the batch as its first dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

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
        """Every tensor held, nested states included."""
        for leaf in pytree.tree_leaves(self):
            if isinstance(leaf, Tensor):
                yield leaf

    @property
    def nbytes(self) -> int:
        """Bytes really held: each storage counts once and whole, even where a tensor is a view of a part of it."""
        storages = {}
        for tensor in self.tensors():
            storage = tensor.untyped_storage()
            storages[(tensor.device, storage.data_ptr())] = storage.nbytes()
        return sum(storages.values())

    def map(self: S, function: Callable[[Tensor], Tensor]) -> S:
        """The same state with `function` applied to every tensor."""
        return pytree.tree_map_only(Tensor, function, self)

    def select(self: S, rows: Tensor) -> S:
        """Pick or repeat batch rows. rows: int64 [N] of row indices. Returns a state of batch N that shares nothing."""
        return self.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def to(self: S, *args: Any, **kwargs: Any) -> S:
        """Move or cast as `Tensor.to` does; a dtype applies to floating-point tensors only."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking)

        return self.map(move)

    def detach(self: S) -> S:
        """The same values, cut from the autograd graph (for truncated back-propagation through time)."""
        return self.map(Tensor.detach)


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
    """`tensor` itself when it fills its storage, else a copy: a state must not hold a large buffer by a small view."""
    filled = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if filled else tensor.clone(memory_format=torch.contiguous_format)


def tensor_bytes(*shape: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a dense tensor of this shape."""
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize
