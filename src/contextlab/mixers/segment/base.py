"""The base of mixers that read a stream in segments."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.mixers.base import Mixer, head_size
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.layers import Linear, multiplications
from contextlab.ops.position import rope_table, rotary_size, rotate
from contextlab.state import RecurrentState, State, own, tensor_bytes

Memory = dict[str, Tensor]
"""A mixer's memory by name, each [B, ...]."""


@dataclass
class SegmentState(RecurrentState):
    """The memory after the last complete segment, and the tokens of the incomplete one.

    memory: "tokens" [B, segment - 1, P], the projections of the incomplete segment's tokens; "waiting" [B] int64, how
        many these are; and the mixer's own tensors. padded: whether any piece came with a mask.
    """

    padded: bool = dataclasses.field(default=False, metadata={"static": True})


class SegmentMixer(Mixer):
    """Base: `_project` makes P values of each token, `_read` mixes one segment and writes the memory.

    width: size of a token's vector. segment: tokens of a segment. values: P.
    """

    parallel_form = "loop over segments"

    def __init__(self, width: int, segment: int, values: int) -> None:
        super().__init__(width)
        self.segment, self.values = segment, values

    @abstractmethod
    def _project(self, x: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, values]: all that a segment needs of its tokens, each from itself alone."""

    @abstractmethod
    def _start(self, x: Tensor) -> dict[str, Tensor]:
        """The memory before the first segment, each tensor [B, ...]."""

    @abstractmethod
    def _read(self, tokens: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens [B, segment, values] -> outputs [B, segment, width] and the memory after the segment.

        A segment may be filled with zeros at its end: the memory is then not kept.
        """

    def _read_line(
        self, line: Tensor, memory: dict[str, Tensor], done: int, complete: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """All segments of rows that are alike: line [B, n segment, values] -> [B, n segment, width] and the memory.

        done: segments that were read before. complete: of the n, those whose tokens are all there; at most the last is
        not, and its memory is not kept. Here one after another, which a mixer may do better.
        """
        return self._one_by_one(line, memory, lambda n, before, written: written if n < complete else before)

    def _one_by_one(
        self, line: Tensor, memory: Memory, after: Callable[[int, Memory, Memory], Memory]
    ) -> tuple[Tensor, Memory]:
        """The segments in a loop. after: the memory after the nth, from that before it and what it wrote."""
        outputs = []
        for n, tokens in enumerate(line.split(self.segment, 1)):
            y, written = self._read(tokens, memory)
            outputs.append(y)
            memory = after(n, memory, written)
        return torch.cat(outputs, 1), memory

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        batch, length, _ = x.shape
        before = state if isinstance(state, SegmentState) else None
        tokens = self._project(without_padding(x, mask))
        memory = self._start(x)
        old, waiting = tokens[:, :0], torch.zeros(batch, dtype=torch.int64, device=x.device)
        if before is not None:
            memory = {name: before[name] for name in memory}
            old, waiting = before["tokens"], before["waiting"]
        read = 0 if before is None else before.length
        memory = self._grown(memory, read + length)
        padded = mask is not None or (before is not None and before.padded)
        size, count = self.segment, read % self.segment  # without padding as many tokens wait in every row
        if padded:
            real = length if mask is None else mask.sum(1)
            count = min(read, size - 1)
            place = self._places(old.shape[1], length, waiting, real, count)
            whole = torch.cat((old, tokens), 1)
            line = torch.where((place >= 0)[..., None], _taken(whole, place.clamp_min(0)), 0.0)
            total = waiting + real
        else:
            line = torch.cat((old[:, :count], tokens), 1)
            total = waiting + length
        line = F.pad(line, (0, 0, 0, -line.shape[1] % size))
        some = line.shape[1] > 0
        y = x
        if some and padded:

            def of_rows(n: int, before: Memory, written: Memory) -> Memory:
                complete = (n + 1) * size <= total
                return {name: _where(complete, written[name], before[name]) for name in before}

            y, memory = self._one_by_one(line, memory, of_rows)
        elif some:
            y, memory = self._read_line(line, memory, read // size, (count + length) // size)
        if padded:
            back = torch.arange(length, device=x.device) - (length - total + waiting)[:, None] + waiting[:, None]
            y = _taken(y, back.clamp(0, y.shape[1] - 1)) if some else y
        else:
            y = y[:, count : count + length]
        if not keep_state:
            return y, None
        first = total.div(size, rounding_mode="floor") * size
        left = total - first
        rest = first[:, None] + torch.arange(size - 1, device=x.device)
        kept = _taken(F.pad(line, (0, 0, 0, size)), rest) if line.shape[1] else old
        kept = torch.where(torch.arange(size - 1, device=x.device)[:, None] < left[:, None, None], kept, 0.0)
        kept_memory = {name: own(tensor) for name, tensor in memory.items()}
        after = SegmentState({"tokens": own(kept), "waiting": left, **kept_memory}, padded, length=read + length)
        return y, after

    @staticmethod
    def _places(old: int, length: int, waiting: Tensor, real: Tensor | int, most: int) -> Tensor:
        """For each place of a row, the index of its token among the old and the new ones, or -1: [B, most + length]."""
        line = torch.arange(most + length, device=waiting.device)[None]
        waiting = waiting[:, None]
        count = real[:, None] if isinstance(real, Tensor) else real
        new = old + (length - count) + line - waiting
        return torch.where(line < waiting, line, torch.where(line < waiting + count, new, -1))

    def _memory_nbytes(self, length: int, batch: int, dtype: torch.dtype) -> int:
        """Bytes of the memory after `length` tokens."""
        raise NotImplementedError

    def _grown(self, memory: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        """The memory with room for what `length` tokens in all can write."""
        return memory

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length."""
        waiting = tensor_bytes(batch, self.segment - 1, self.values, dtype=dtype) + tensor_bytes(
            batch, dtype=torch.int64
        )
        return waiting + self._memory_nbytes(length, batch, dtype)


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, P] at index [B, N] -> [B, N, P]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _where(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a in the rows [B] that are True, else b."""
    return torch.where(rows.view(-1, *[1] * (a.ndim - 1)), a, b)


class SegmentAttention(SegmentMixer):
    """Base: attention within the segment, with rotary positions counted from where the keys begin."""

    def __init__(
        self,
        width: int,
        segment: int,
        heads: int,
        head_dim: int | None,
        rope_base: float,
    ) -> None:
        size = head_size(width, heads) if head_dim is None else head_dim
        super().__init__(width, segment, 3 * heads * size)
        self.heads, self.head_dim, self.rope_base = heads, size, rope_base
        self.rotary = rotary_size(size, 1.0)
        self.qkv_proj = Linear(width, self.values)
        self.out_proj = Linear(heads * size, width)

    def _project(self, x: Tensor) -> Tensor:
        return self.qkv_proj(x)

    def _heads(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, S, H, D], unrotated."""
        q, k, v = tokens.unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        return q, k, v

    def _turned(self, x: Tensor, first: int = 0) -> Tensor:
        """x [B, S, H, D] rotated by the places first, first + 1, ..."""
        places = torch.arange(first, first + x.shape[1], device=x.device)
        return rotate(x.contiguous(), rope_table(places, self.rotary, self.rope_base, x.dtype))

    def flops(self, length: int) -> int:
        """See `Mixer.flops`; of the pairs within segments, and what `_extra_flops` adds for a segment."""
        segments, rest = divmod(length, self.segment)
        pairs = segments * self.segment * (self.segment + 1) // 2 + rest * (rest + 1) // 2
        projections = multiplications(self.qkv_proj) + multiplications(self.out_proj)
        attention = 4 * pairs * self.heads * self.head_dim
        return 2 * length * projections + attention + self._extra_flops(segments, length)

    def _extra_flops(self, segments: int, length: int) -> int:
        return 0
