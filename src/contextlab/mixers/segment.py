"""Mixers that read a sequence segment by segment and hand a memory from one to the next.

Segments are counted from each row's own first token. The state holds the memory after the last complete segment and
what is needed of the tokens of the incomplete one; a segment's tokens are mixed with each other causally, and its
memory is written when it is complete.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.base import Mixer, head_size
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.layers import Linear, RMSNorm
from contextlab.ops.linear import working_dtype
from contextlab.ops.position import rope_table, rotary_size, rotate
from contextlab.ops.softmax import attend
from contextlab.registry import register
from contextlab.state import RecurrentState, State, own, tensor_bytes


@dataclass
class SegmentState(RecurrentState):
    """The memory after the last complete segment, and the tokens of the incomplete one.

    memory: "tokens" [B, segment - 1, P], what was made of each token that waits; "waiting" [B] int64, how many do;
        and the mixer's own tensors. padded: whether any piece came with a mask.
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
        outputs = []
        for n in range(line.shape[1] // size):
            y, written = self._read(line[:, n * size : (n + 1) * size], memory)
            outputs.append(y)
            if padded:
                complete = (n + 1) * size <= total
                memory = {name: _where(complete, written[name], memory[name]) for name in memory}
            elif (n + 1) * size <= count + length:
                memory = written
        y = torch.cat(outputs, 1) if outputs else x
        if padded:
            back = torch.arange(length, device=x.device) - (length - total + waiting)[:, None] + waiting[:, None]
            y = _taken(y, back.clamp(0, y.shape[1] - 1)) if outputs else y
        else:
            y = y[:, count : count + length]
        if not keep_state:
            return y, None
        first = total.div(size, rounding_mode="floor") * size
        left = total - first
        rest = first[:, None] + torch.arange(size - 1, device=x.device)
        kept = _taken(F.pad(line, (0, 0, 0, size)), rest) if line.shape[1] else old
        kept = torch.where(torch.arange(size - 1, device=x.device)[:, None] < left[:, None, None], kept, 0.0)
        held = {name: own(tensor) for name, tensor in memory.items()}
        after = SegmentState({"tokens": own(kept), "waiting": left, **held}, padded, length=read + length)
        return y, after

    @staticmethod
    def _places(held: int, length: int, waiting: Tensor, real: Tensor | int, most: int) -> Tensor:
        """Where each place of a row's line comes from in [old, new]; -1 for nowhere. [B, most + length]."""
        line = torch.arange(most + length, device=waiting.device)[None]
        waiting = waiting[:, None]
        count = real[:, None] if isinstance(real, Tensor) else real
        new = held + (length - count) + line - waiting
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
        projections = self.qkv_proj.weight.numel() + self.out_proj.weight.numel()
        attention = 4 * pairs * self.heads * self.head_dim
        return 2 * length * projections + attention + self._extra_flops(segments, length)

    def _extra_flops(self, segments: int, length: int) -> int:
        return 0


@register(
    "mixer",
    "infini_attention",
    papers=("2404.07143",),
    cases=({"segment": 8}, {"segment": 5, "heads": 2, "head_dim": 4, "delta": False}, {"segment": 1}),
)
class InfiniAttention(SegmentAttention):
    """Infini-attention: softmax attention within a segment, and a linear-attention memory of all segments before.

    A query reads A = sigma(q) M / (sigma(q) z), sigma = elu + 1, from what the segments before its own have written,
    and a gate of its head mixes that with the local attention; a complete segment writes M += sigma(K)^T (V - A(K))
    and z += sum sigma(k).

    width: size of a token's vector.
    segment: tokens of a segment.
    heads: number of heads.
    head_dim: size of a head; default width / heads.
    delta: write what the memory does not know yet (the paper's Linear + Delta); False writes all.
    rope_base: base of the rotary frequencies of the local attention.
    """

    def __init__(
        self,
        width: PositiveInt,
        segment: PositiveInt = 64,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
        delta: bool = True,
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(width, segment, heads, head_dim, rope_base)
        self.delta = delta
        self.gate = nn.Parameter(torch.zeros(heads))

    def _start(self, x: Tensor) -> dict[str, Tensor]:
        shape, work = (x.shape[0], self.heads, self.head_dim), working_dtype(x.dtype)
        return {"matrix": x.new_zeros(*shape, self.head_dim, dtype=work), "norm": x.new_zeros(shape, dtype=work)}

    def _read(self, tokens: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self._heads(tokens)
        local = attend(self._turned(q), self._turned(k), v, None, is_causal=True)
        gate = self.gate.sigmoid()[:, None]
        # The memory sums over the whole stream, so it is kept and read in float32 at least.
        q, k, value = (x.to(memory["matrix"].dtype) for x in (q, k, v))
        y = gate * self._recall(q, memory).to(v.dtype) + (1 - gate) * local
        new = value - self._recall(k, memory) if self.delta else value
        key = F.elu(k) + 1
        written = {
            "matrix": memory["matrix"] + torch.einsum("bshk,bshv->bhkv", key, new),
            "norm": memory["norm"] + key.sum(1),
        }
        return self.out_proj(y.flatten(2)), written

    @staticmethod
    def _recall(q: Tensor, memory: dict[str, Tensor]) -> Tensor:
        """What the memory answers to q [B, S, H, D]; zeros while nothing was written."""
        read = F.elu(q) + 1
        total = torch.einsum("bshk,bhk->bsh", read, memory["norm"]).unsqueeze(-1)
        return torch.einsum("bshk,bhkv->bshv", read, memory["matrix"]) / total.masked_fill(total == 0, 1.0)

    def _memory_nbytes(self, length: int, batch: int, dtype: torch.dtype) -> int:
        return tensor_bytes(batch, self.heads, self.head_dim, self.head_dim + 1, dtype=working_dtype(dtype))

    def _extra_flops(self, segments: int, length: int) -> int:
        return (6 if self.delta else 4) * length * self.heads * self.head_dim**2


@register(
    "mixer",
    "transformer_xl",
    papers=("1901.02860", "2104.09864"),
    cases=({"segment": 8}, {"segment": 5, "heads": 2, "head_dim": 4, "stop_gradient": True}, {"segment": 1}),
)
class TransformerXL(SegmentAttention):
    """Transformer-XL: attention to the tokens before in the own segment and to the whole segment before it.

    Positions are relative by rotation, in place of the paper's sinusoids with learned biases.

    width: size of a token's vector.
    segment: tokens of a segment.
    heads: number of heads.
    head_dim: size of a head; default width / heads.
    stop_gradient: send no gradient into the segment before, as the paper does for segments of other batches.
    rope_base: base of the rotary frequencies.
    """

    def __init__(
        self,
        width: PositiveInt,
        segment: PositiveInt = 64,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
        stop_gradient: bool = False,
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(width, segment, heads, head_dim, rope_base)
        self.stop_gradient = stop_gradient
        seen = torch.ones(segment, 2 * segment, dtype=torch.bool).tril(segment)
        self.sees: Tensor
        self.register_buffer("sees", seen, persistent=False)

    def _start(self, x: Tensor) -> dict[str, Tensor]:
        kv = x.new_zeros(x.shape[0], self.segment, 2 * self.heads * self.head_dim)
        return {"previous": kv, "has": x.new_zeros(x.shape[0])}

    def _read(self, tokens: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self._heads(tokens)
        kv = tokens[..., self.heads * self.head_dim :]
        previous = memory["previous"].detach() if self.stop_gradient else memory["previous"]
        old_k, old_v = previous.unflatten(-1, (2, self.heads, self.head_dim)).unbind(2)
        k, v = torch.cat((old_k, k), 1), torch.cat((old_v, v), 1)
        there = torch.cat((memory["has"][:, None].expand(-1, self.segment), k.new_ones(k.shape[0], self.segment)), 1)
        mask = self.sees & (there > 0)[:, None, None]
        y = attend(self._turned(q, self.segment), self._turned(k), v, None, mask)
        return self.out_proj(y.flatten(2)), {"previous": kv, "has": torch.ones_like(memory["has"])}

    def _memory_nbytes(self, length: int, batch: int, dtype: torch.dtype) -> int:
        return tensor_bytes(batch, 2 * self.segment * self.heads * self.head_dim + 1, dtype=dtype)

    def _extra_flops(self, segments: int, length: int) -> int:
        return 4 * max(0, length - self.segment) * self.segment * self.heads * self.head_dim


@register(
    "mixer",
    "recurrent_memory",
    papers=("2207.06881",),
    cases=({"segment": 8}, {"segment": 5, "slots": 1, "heads": 2, "head_dim": 4}, {"segment": 3, "slots": 2}),
)
class RecurrentMemory(SegmentAttention):
    """Recurrent memory tokens (RMT) within one layer: read before each segment, rewritten after it.

    The tokens of a segment attend to the memory and causally to each other; when the segment is complete, the memory
    attends to itself and to the whole segment, and what it reads is added and normalised. In the paper the memory
    tokens pass through all layers and the last layer's go before the next segment; here every layer has its own.

    width: size of a token's vector.
    segment: tokens of a segment.
    slots: memory tokens.
    heads: number of heads.
    head_dim: size of a head; default width / heads.
    rope_base: base of the rotary frequencies, by which the memory stands before the segment.
    """

    def __init__(
        self,
        width: PositiveInt,
        segment: PositiveInt = 64,
        slots: PositiveInt = 8,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(width, segment, heads, head_dim, rope_base)
        self.slots = slots
        self.initial = nn.Parameter(torch.randn(slots, width))
        self.memory_out = Linear(heads * self.head_dim, width)
        self.norm = RMSNorm(width, eps=1e-6)
        sees = torch.ones(segment, slots + segment, dtype=torch.bool).tril(slots)
        self.sees: Tensor
        self.register_buffer("sees", sees, persistent=False)

    def _start(self, x: Tensor) -> dict[str, Tensor]:
        return {"slots": self.initial.to(x.dtype).expand(x.shape[0], -1, -1)}

    def _read(self, tokens: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self._heads(torch.cat((self.qkv_proj(memory["slots"]), tokens), 1))
        q, k = self._turned(q), self._turned(k)
        y = attend(q[:, self.slots :], k, v, None, self.sees[None, None])
        written = self.memory_out(attend(q[:, : self.slots], k, v, None).flatten(2))
        return self.out_proj(y.flatten(2)), {"slots": self.norm(memory["slots"] + written)}

    def _memory_nbytes(self, length: int, batch: int, dtype: torch.dtype) -> int:
        return tensor_bytes(batch, self.slots, self.width, dtype=dtype)

    def _extra_flops(self, segments: int, length: int) -> int:
        inner = self.heads * self.head_dim
        reads = 4 * inner * self.slots * (length + segments * (self.slots + self.segment))
        maps = 2 * segments * self.slots * (self.qkv_proj.weight.numel() + self.memory_out.weight.numel())
        return reads + maps
