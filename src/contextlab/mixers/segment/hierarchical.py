"""The Hierarchical Memory Transformer's three memories, within one layer."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.mixers.layers import Linear, RMSNorm, multiplications
from contextlab.mixers.segment.base import SegmentAttention
from contextlab.ops.softmax import attend
from contextlab.registry import register
from contextlab.state import tensor_bytes


@register(
    "mixer",
    "hierarchical_memory",
    family="segment",
    papers=("2405.06067",),
    cases=(
        {"segment": 8},
        {"segment": 5, "sensory": 2, "memories": 3, "heads": 2, "head_dim": 4},
        {"segment": 3, "sensory": 0, "memories": 2},
    ),
)
class HierarchicalMemory(SegmentAttention):
    """HMT: the last tokens before, a summary of the segment before, and a search through the last segments' memories.

    A segment H is read as [P, the last tokens of the segment before, H, P]. What the P at the end reads becomes the
    segment's memory and joins a queue of the last N, M; the oldest leaves. The next P is recalled from it:
    P = softmax(S W_q (M W_k)^T / sqrt(width)) M, where S is a summary: what a learned topic prompt T reads at the
    end of [T, H, T]. The first segment's P is learned.

    What differs from the paper: there P, T and the tokens pass through a whole model, here through the attention of
    one layer, and the memory and the summary are normed sums of the prompt and what it read. There S is the summary
    of the first half of the segment that is about to be read, which inside a layer would show a token the
    future; here it is that of the whole segment before. Positions are rotary.

    width: size of a token's vector and of a memory.
    segment: tokens of a segment.
    sensory: last tokens of the segment before that a segment sees.
    memories: length of the queue of long-term memories, one a segment.
    heads: number of heads; the queue is searched by one head of size width.
    head_dim: size of a head; default width / heads.
    rope_base: base of the rotary frequencies, by which the prompt stands before the sensory tokens.
    """

    def __init__(
        self,
        width: PositiveInt,
        segment: PositiveInt = 64,
        sensory: NonNegativeInt = 8,
        memories: Annotated[int, Field(ge=2)] = 32,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(width, segment, heads, head_dim, rope_base)
        if sensory > segment:
            raise InputError(f"sensory {sensory} is more than the {segment} tokens of a segment; the most is {segment}")
        self.sensory, self.memories = sensory, memories
        self.initial, self.topic = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.memory_out = Linear(heads * self.head_dim, width)
        self.norm = RMSNorm(width, eps=1e-6)
        self.search_q, self.search_k = Linear(width, width), Linear(width, width)
        places = torch.arange(sensory + segment + 2)  # of the keys P, the sensory tokens, the segment, P
        sees = places <= 1 + sensory + torch.arange(segment + 1)[:, None]
        self.sees: Tensor
        self.bridge: Tensor  # which keys are the sensory memory's
        self.register_buffer("sees", sees, persistent=False)
        self.register_buffer("bridge", (places >= 1) & (places <= sensory), persistent=False)

    def _start(self, x: Tensor) -> dict[str, Tensor]:
        batch = x.shape[0]
        return {
            "sensory": x.new_zeros(batch, self.sensory, 2 * self.heads * self.head_dim),
            "prompt": self.initial.to(x.dtype).expand(batch, -1),
            "memories": x.new_zeros(batch, self.memories, self.width),
            "count": torch.zeros(batch, dtype=torch.int64, device=x.device),
        }

    def _read(self, tokens: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        prompt, count = memory["prompt"], memory["count"]
        q, k, v = self._heads(tokens)
        old_k, old_v = memory["sensory"].unflatten(-1, (2, self.heads, self.head_dim)).unbind(2)
        prompt_q, prompt_k, prompt_v = self._heads(self.qkv_proj(prompt)[:, None])
        keys, values = torch.cat((prompt_k, old_k, k, prompt_k), 1), torch.cat((prompt_v, old_v, v, prompt_v), 1)
        mask = self.sees & ((count > 0)[:, None] | ~self.bridge)[:, None, None]
        queries = self._turned(torch.cat((q, prompt_q), 1), 1 + self.sensory)
        read = attend(queries, self._turned(keys), values, None, mask).flatten(2)
        new = self.norm(prompt + self.memory_out(read[:, -1]))
        queue = torch.cat((memory["memories"][:, 1:], new[:, None]), 1)
        after = {
            "sensory": tokens[:, self.segment - self.sensory :, self.heads * self.head_dim :],
            "prompt": self._recalled(self._summary(k, v), queue, count + 1),
            "memories": queue,
            "count": count + 1,
        }
        return self.out_proj(read[:, :-1]), after

    def _summary(self, k: Tensor, v: Tensor) -> Tensor:
        """What the topic prompt makes of a segment's keys and values [B, S, H, D]: [B, width]."""
        topic = self.topic.expand(k.shape[0], 1, -1)
        topic_q, topic_k, topic_v = self._heads(self.qkv_proj(topic))
        keys, values = torch.cat((topic_k, k, topic_k), 1), torch.cat((topic_v, v, topic_v), 1)
        read = attend(self._turned(topic_q, 1 + k.shape[1]), self._turned(keys), values, None)
        return self.norm(topic + self.memory_out(read.flatten(2)))[:, 0]

    def _recalled(self, summary: Tensor, queue: Tensor, count: Tensor) -> Tensor:
        """What a summary [B, width] finds in the queue [B, N, width], of which the last `count` are memories."""
        scores = torch.einsum("bd,bnd->bn", self.search_q(summary), self.search_k(queue)) * self.width**-0.5
        empty = torch.arange(self.memories, device=count.device) < self.memories - count[:, None]
        return torch.einsum("bn,bnd->bd", scores.masked_fill(empty, -torch.inf).softmax(-1), queue)

    def _memory_nbytes(self, length: int, batch: int, dtype: torch.dtype) -> int:
        floats = self.sensory * 2 * self.heads * self.head_dim + (self.memories + 1) * self.width
        return tensor_bytes(batch, floats, dtype=dtype) + tensor_bytes(batch, dtype=torch.int64)

    def _extra_flops(self, segments: int, length: int) -> int:
        begun, inner = -(-length // self.segment), self.heads * self.head_dim
        pairs = length * (1 + self.sensory) + begun * (2 * self.segment + self.sensory + 4)
        prompts = 2 * (multiplications(self.qkv_proj) + multiplications(self.memory_out))
        search = (1 + self.memories) * self.width**2 + 2 * self.memories * self.width
        return 4 * pairs * inner + 2 * begun * (prompts + search)
