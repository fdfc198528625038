"""Transformer-XL."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from contextlab.mixers.segment.base import SegmentAttention
from contextlab.ops.softmax import attend
from contextlab.registry import register
from contextlab.state import tensor_bytes


@register(
    "mixer",
    "transformer_xl",
    family="segment",
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
