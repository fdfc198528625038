"""Blocks of chunks: how the engines of `ops` read and write their tensors, as much at a time as stays in the caches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

ELEMENTS = 2**17
"""Elements of keys or of values in one block: 512 KiB of float32, so that twenty such tensors stay in the caches."""


def blocks(count: int, sequences: int, size: int, width: int) -> list[tuple[int, int]]:
    """(first chunk, chunks) of each block.

    count: chunks of the sequence. sequences: batch x heads. size: tokens a chunk. width: channels of a token.
    """
    if count == 1:
        return [(0, 1)]
    step = max(1, ELEMENTS // max(1, sequences * size * width))
    return [(n, min(step, count - n)) for n in range(0, count, step)]


class Chunks:
    """x [B, T, H, D] in chunks of `size` tokens: the views of a block of them, made once, as they take time."""

    def __init__(self, x: Tensor, size: int) -> None:
        whole, self.left = divmod(x.shape[1], size)
        self.whole = x[:, : whole * size].unflatten(1, (whole, size)).permute(1, 0, 3, 2, 4)
        self.rest = x[:, whole * size :].transpose(1, 2)
        self.of_one = (x.shape[0] * x.shape[2], size, x.shape[3])

    def shape(self, count: int) -> tuple[int, int, int]:
        """Of `count` chunks: [count B H, size, D]."""
        return (count * self.of_one[0], *self.of_one[1:])

    def read(self, first: int, count: int, out: Tensor) -> Tensor:
        """`count` chunks from chunk `first` on, into `out` [count B H, size, D], zeros after the end. Returns `out`."""
        chunks, whole = out.view(count, *self.whole.shape[1:]), len(self.whole) - first
        if whole >= count:
            chunks.copy_(self.whole[first : first + count])
            return out
        chunks[:whole].copy_(self.whole[first:])
        chunks[whole, :, :, : self.left].copy_(self.rest)
        chunks[whole, :, :, self.left :].zero_()
        return out

    def write(self, first: int, chunks: Tensor, factor: Tensor | None = None) -> None:
        """Put chunks [N B H, size, D] there from chunk `first` on; what is past the end is dropped.

        factor: of each token, [N B H, size, 1].
        """
        if not chunks.numel():  # of no sequences: how many chunks those are cannot be told, nor need be
            return
        lie = (-1, *self.whole.shape[1:3])
        chunks, factor = chunks.unflatten(0, lie), None if factor is None else factor.unflatten(0, lie)
        count, whole = len(chunks), len(self.whole) - first
        _set(self.whole[first : first + count], chunks[:whole], factor if factor is None else factor[:whole])
        if whole < count:
            last = (whole, slice(None), slice(None), slice(self.left))
            _set(self.rest, chunks[last], factor if factor is None else factor[last])


def _set(into: Tensor, x: Tensor, factor: Tensor | None) -> None:
    into.copy_(x) if factor is None else torch.mul(x, factor, out=into)


class Scratch:
    """Memory for temporaries that is used again: to get new pages costs more than to fill them."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.found: dict[str, Tensor] = {}
        self.views: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor of `shape`, in the memory that this name had before if that suffices."""
        view = self.views.get((name, shape))
        if view is not None:
            return view
        size = math.prod(shape)
        held = self.found.get(name)
        if held is None or len(held) < size:
            held = self.found[name] = self.like.new_empty(size)
        view = self.views[name, shape] = held[:size].view(shape)
        return view


def inputs_of(scratch: Scratch, given: list[Chunks], first: int, count: int) -> list[Tensor]:
    """`count` chunks of each from chunk `first` on as [N B H, L, D], contiguous."""
    return [x.read(first, count, scratch(f"input {i}", *x.shape(count))) for i, x in enumerate(given)]


def folded(
    function: Any, size: int, in_dims: Any, inputs: Any, axes: tuple[int, ...], out_axes: tuple[int, ...]
) -> tuple[Any, Any]:
    """The vmap rule of an autograd function: one more batch dimension of `size` is so many more sequences.

    axes, out_axes: where the sequences lie in the inputs (what follows them is passed on) and in the outputs, all of
    which get the dimension.
    """
    given = [
        (x.expand(size, *x.shape).movedim(0, axis) if dim is None else x.movedim(dim, axis)).flatten(axis, axis + 1)
        if isinstance(x, Tensor)
        else x
        for x, dim, axis in zip(inputs, in_dims, axes, strict=False)
    ]
    outputs = function.apply(*given, *inputs[len(axes) :])
    pairs = zip(outputs, out_axes, strict=True)
    found = [y.unflatten(axis, (size, -1)) if isinstance(y, Tensor) else None for y, axis in pairs]
    return tuple(found), tuple(axis if y is not None else None for y, axis in zip(found, out_axes, strict=True))
