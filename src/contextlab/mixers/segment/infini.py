"""Infini-attention."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from contextlab.mixers.layers import elu1
from contextlab.mixers.segment.base import SegmentAttention
from contextlab.ops.precision import wide_einsum, working_dtype
from contextlab.ops.softmax import attend
from contextlab.registry import register
from contextlab.state import tensor_bytes


@register(
    "mixer",
    "infini_attention",
    family="segment",
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
        key = elu1(k)
        written = {
            "matrix": memory["matrix"] + wide_einsum("bshk,bshv->bhkv", key, new),
            "norm": memory["norm"] + key.sum(1),
        }
        return self.out_proj(y.flatten(2)), written

    @staticmethod
    def _recall(q: Tensor, memory: dict[str, Tensor]) -> Tensor:
        """What the memory answers to q [B, S, H, D]; zeros while nothing was written."""
        read = elu1(q)
        total = wide_einsum("bshk,bhk->bsh", read, memory["norm"]).unsqueeze(-1)
        return wide_einsum("bshk,bhkv->bshv", read, memory["matrix"]) / total.masked_fill(total == 0, 1.0)

    def _memory_nbytes(self, length: int, batch: int, dtype: torch.dtype) -> int:
        return tensor_bytes(batch, self.heads, self.head_dim, self.head_dim + 1, dtype=working_dtype(dtype))

    def _extra_flops(self, segments: int, length: int) -> int:
        return (6 if self.delta else 4) * length * self.heads * self.head_dim**2
