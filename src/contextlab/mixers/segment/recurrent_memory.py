"""The recurrent memory transformer."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from contextlab.mixers.layers import Linear, RMSNorm, multiplications
from contextlab.mixers.segment.base import SegmentAttention
from contextlab.ops.softmax import attend
from contextlab.registry import register
from contextlab.state import tensor_bytes


@register(
    "mixer",
    "recurrent_memory",
    family="segment",
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

    amplifies_rounding: ClassVar[bool] = True

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
        maps = 2 * segments * self.slots * (multiplications(self.qkv_proj) + multiplications(self.memory_out))
        return reads + maps
