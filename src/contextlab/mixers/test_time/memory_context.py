"""Titans with the memory as context: attention within a segment over what a neural memory recalls for it."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.layers import Linear, RMSNorm, multiplications
from contextlab.mixers.segment.base import SegmentAttention
from contextlab.ops.linear import working_dtype
from contextlab.ops.precision import unit_length, wide_einsum
from contextlab.ops.softmax import attend
from contextlab.ops.titans import titans, titans_flops
from contextlab.registry import register
from contextlab.state import tensor_bytes


@register(
    "mixer",
    "titans_mac",
    family="test-time",
    papers=("2501.00663",),
    cases=({"segment": 8}, {"segment": 5, "persistent": 0, "heads": 2, "head_dim": 4}, {"segment": 1, "persistent": 2}),
)
class MemoryAsContext(SegmentAttention):
    """Titans, memory as context (MAC): a segment attends to persistent tokens, to what the memory recalls, to itself.

    Each token asks the memory that the segment begins with; its attention sees the persistent tokens, and the recalled
    and the real tokens up to itself. The memory then learns from the attention's outputs y, with momentum and
    forgetting, and what it answers to them gates them: norm(y) sigmoid(norm(M(y))). In the paper recalled tokens are
    seen by the whole segment, which would show a token its future when the memory is asked by the segment's own tokens.
    The memory is a matrix for each head; the paper's deep ones are left out.

    width: size of a token's vector.
    segment: tokens of a segment.
    persistent: learned tokens that every token sees.
    heads: number of heads, of the attention and of the memory.
    head_dim: size of a head; default width / heads.
    rope_base: base of the rotary frequencies, counted within the segment.
    """

    amplifies_rounding: ClassVar[bool] = True

    def __init__(
        self,
        width: PositiveInt,
        segment: PositiveInt = 32,
        persistent: NonNegativeInt = 4,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(width, segment, heads, head_dim, rope_base)
        inner = heads * self.head_dim
        self.values += inner
        self.recall_proj = Linear(width, inner)
        self.context_proj = Linear(inner, 2 * inner)  # keys and values of what is recalled
        self.persistent = nn.Parameter(torch.randn(persistent, 2, heads, self.head_dim)) if persistent else None
        self.memory_proj = Linear(inner, 3 * inner + 3 * heads)  # q, k, v; rate, momentum and what is kept
        # At the start steps of half the error, little momentum, and one part in a hundred forgotten a token.
        self.gate_bias = nn.Parameter(torch.tensor([0.0, -2.0, 4.6]).repeat(heads, 1).T.contiguous())
        self.norm, self.gate_norm = (RMSNorm(inner, eps=1e-6) for _ in range(2))
        seen = torch.ones(segment, segment, dtype=torch.bool).tril()
        self.sees: Tensor
        self.register_buffer("sees", torch.cat((seen.new_ones(segment, persistent), seen, seen), 1), persistent=False)

    def _project(self, x: Tensor) -> Tensor:
        return torch.cat((self.qkv_proj(x), self.recall_proj(x)), -1)

    def _start(self, x: Tensor) -> dict[str, Tensor]:
        shape = (x.shape[0], self.heads, 2, self.head_dim, self.head_dim)
        return {"memory": x.new_zeros(shape, dtype=working_dtype(x.dtype))}

    def _read(self, tokens: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        inner = self.heads * self.head_dim
        q, k, v = self._heads(tokens[..., : 3 * inner])
        asked = unit_length(tokens[..., 3 * inner :].unflatten(-1, (self.heads, self.head_dim)), eps=1e-12)
        matrix = memory["memory"][:, :, 0]
        recalled = wide_einsum("bshk,bhkv->bshv", asked.to(matrix.dtype), matrix).to(tokens.dtype).flatten(2)
        context = self.context_proj(recalled).unflatten(-1, (2, self.heads, self.head_dim))
        keys = [self._turned(context[:, :, 0]), self._turned(k)]
        values = [context[:, :, 1], v]
        if self.persistent is not None:
            fixed = self.persistent.to(tokens.dtype).expand(len(tokens), -1, -1, -1, -1)
            keys, values = [fixed[:, :, 0], *keys], [fixed[:, :, 1], *values]
        y = attend(self._turned(q), torch.cat(keys, 1), torch.cat(values, 1), None, self.sees[None, None]).flatten(2)
        parts = self.memory_proj(y).split((3 * inner, 3 * self.heads), -1)
        mq, mk, mv = parts[0].unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        theta, m, g = (parts[1].unflatten(-1, (3, self.heads)) + self.gate_bias).unbind(2)
        mq, mk = (unit_length(z, eps=1e-12) for z in (mq, mk))
        o, after = titans(mq, mk, mv, theta.sigmoid(), F.logsigmoid(m), F.logsigmoid(g), 1.0, memory["memory"], True)
        assert after is not None
        return self.out_proj(self.norm(y) * self.gate_norm(o.flatten(2)).sigmoid()), {"memory": after}

    def _memory_nbytes(self, length: int, batch: int, dtype: torch.dtype) -> int:
        return tensor_bytes(batch, self.heads, 2, self.head_dim, self.head_dim, dtype=working_dtype(dtype))

    def _extra_flops(self, segments: int, length: int) -> int:
        persistent = 0 if self.persistent is None else len(self.persistent)
        maps = sum(multiplications(part) for part in (self.recall_proj, self.context_proj, self.memory_proj))
        whole, rest = divmod(length, self.segment)
        pairs = whole * self.segment * (self.segment + 1) // 2 + rest * (rest + 1) // 2 + length * persistent
        recall = 2 * length * self.heads * self.head_dim**2
        memory = titans_flops(length, self.heads, self.head_dim, self.head_dim)
        return 2 * length * maps + 4 * pairs * self.heads * self.head_dim + recall + memory
