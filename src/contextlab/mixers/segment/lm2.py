"""LM2: attention within segments beside a bank of memory slots that is read by attention and written through gates."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.mixers.layers import Linear, multiplications
from contextlab.mixers.segment.base import SegmentAttention
from contextlab.ops.linear import working_dtype
from contextlab.ops.softmax import attend
from contextlab.registry import register
from contextlab.state import tensor_bytes


@register(
    "mixer",
    "lm2",
    family="segment",
    papers=("2502.06049",),
    cases=(
        {"segment": 8},
        {"segment": 5, "slots": 3, "heads": 2, "head_dim": 4, "top": 2},
        {"segment": 1, "slots": 30},
    ),
)
class Lm2(SegmentAttention):
    """LM2's memory bank: every token reads the slots by attention; a complete segment writes them through LSTM gates.

    With A = softmax(E W_q (M W_k)^T / sqrt(width)), R = A M W_v is what the tokens E read of the slots M, and
    sigma(R W_out) R is added to the output of the attention. A complete segment writes
    M = sigma(E W_in) tanh(R) + sigma(R W_forget) M, input, forget and output gate as in an LSTM.

    We know the paper through several accounts, which agree on these formulas; this is what differs from them.
    Its update adds terms of one row a token to a memory of one row a slot and leaves open how; here a slot takes the
    mean of both terms over the segment's tokens, weighted by A, by how much each token read of that slot. Its output
    gate is written to multiply M, which has no row a token; here it multiplies R. Its slots start as identity
    matrices and are counted as vectors elsewhere; here they are vectors, learned, that start random and near
    unit length. Tokens attend to each other within their segment only, so that the memory is all that
    earlier segments leave.

    width: size of a token's vector and of a slot.
    segment: tokens of a segment.
    slots: memory slots.
    top: slots that a token reads, those with the largest scores; default all.
    heads: number of heads of the attention within the segment; the slots are read by one head of size width.
    head_dim: size of a head; default width / heads.
    rope_base: base of the rotary frequencies of the attention within the segment.
    """

    amplifies_rounding: ClassVar[bool] = True

    def __init__(
        self,
        width: PositiveInt,
        segment: PositiveInt = 64,
        slots: PositiveInt = 16,
        top: PositiveInt | None = None,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(width, segment, heads, head_dim, rope_base)
        if top is not None and top > slots:
            raise InputError(f"top {top} is more than the {slots} slots; the most is {slots}")
        self.slots, self.top = slots, top
        self.initial = nn.Parameter(torch.randn(slots, width) * width**-0.5)
        self.query_in_proj = Linear(width, 2 * width)  # W_q, W_in: all that the memory needs of a token
        self.slot_proj = Linear(width, 2 * width)  # W_k, W_v
        self.out_gate, self.forget_gate = Linear(width, width), Linear(width, width)
        self.values += 2 * width

    def _project(self, x: Tensor) -> Tensor:
        return torch.cat((self.qkv_proj(x), self.query_in_proj(x)), -1)

    def _start(self, x: Tensor) -> dict[str, Tensor]:
        return {"slots": self.initial.to(working_dtype(x.dtype)).expand(x.shape[0], -1, -1)}

    def _read(self, tokens: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, query, enter = tokens.split((self.values - 2 * self.width, self.width, self.width), -1)
        q, k, v = self._heads(tokens)
        local = attend(self._turned(q), self._turned(k), v, None, is_causal=True)
        slots = memory["slots"]
        key, value = self.slot_proj(slots.to(tokens.dtype)).chunk(2, -1)
        scores = query @ key.mT * self.width**-0.5
        if self.top is not None and self.top < self.slots:
            kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(self.top).indices, True)
            scores = scores.masked_fill(~kept, -torch.inf)
        weights = scores.softmax(-1)
        read = weights @ value
        y = self.out_proj(local.flatten(2)) + self.out_gate(read).sigmoid() * read
        return y, {"slots": self._written(slots, weights, enter, read)}

    def _written(self, slots: Tensor, weights: Tensor, enter: Tensor, read: Tensor) -> Tensor:
        """The slots [B, N, width] after a segment whose tokens read them with `weights` [B, S, N]."""
        new, keep = enter.sigmoid() * read.tanh(), self.forget_gate(read).sigmoid()
        weights, new, keep = (x.to(slots.dtype) for x in (weights.mT, new, keep))
        total = weights.sum(-1, keepdim=True)
        # A slot that no token read (by `top`, or for its weight is as good as nothing) stays what it was.
        unread = total <= torch.finfo(total.dtype).tiny ** 0.5
        share = weights / total.masked_fill(unread, 1.0)
        return torch.where(unread, slots, share @ new + (share @ keep) * slots)

    def _memory_nbytes(self, length: int, batch: int, dtype: torch.dtype) -> int:
        return tensor_bytes(batch, self.slots, self.width, dtype=working_dtype(dtype))

    def _extra_flops(self, segments: int, length: int) -> int:
        begun = -(-length // self.segment)
        maps = length * (multiplications(self.query_in_proj) + multiplications(self.out_gate))
        maps += begun * self.slots * multiplications(self.slot_proj)
        maps += begun * self.segment * multiplications(self.forget_gate)
        reads = 2 * length * self.slots * self.width
        writes = 2 * begun * self.segment * self.slots * self.width
        return 2 * (maps + reads + writes)
