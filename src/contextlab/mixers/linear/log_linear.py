"""Log-linear attention: O(log T) matrix states, so that the recent past is kept apart from the distant."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers.base import head_size
from contextlab.mixers.layers import Linear, RMSNorm, multiplications, project_wide
from contextlab.mixers.segment.base import SegmentMixer
from contextlab.ops.linear import working_dtype
from contextlab.ops.log_linear import log_linear_chunk, log_linear_chunks
from contextlab.ops.precision import roomy, wide_einsum
from contextlab.registry import register
from contextlab.state import tensor_bytes


@register(
    "mixer",
    "log_linear_attention",
    family="linear",
    papers=("2506.04761",),
    cases=({"chunk": 8}, {"chunk": 2, "heads": 2, "head_dim": 4}, {"chunk": 16, "levels": 6, "heads": 3}),
)
class LogLinearAttention(SegmentMixer):
    """Log-linear attention: gated linear attention with one state for each binary digit of what was read.

    The state of a head is a matrix for every power of two of complete chunks, so it grows with the logarithm of the
    length. A query weighs each level by a factor that depends on the token; the gates are a scalar decay for each head
    and token, as in Mamba-2 and gated retention.

    width: size of a token's vector.
    chunk: tokens that are read by one quadratic form, a power of two.
    heads: number of heads.
    head_dim: size of a head; default width / heads.
    levels: levels with weights of their own; what lies farther back than they reach has the weight of the last.
    """

    parallel_form = "chunks"

    def __init__(
        self,
        width: PositiveInt,
        chunk: PositiveInt = 64,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
        levels: Annotated[int, Field(ge=2)] = 20,
    ) -> None:
        size = head_size(width, heads) if head_dim is None else head_dim
        if chunk & (chunk - 1):
            raise InputError(
                f"chunk must be a power of two, got {chunk}; the nearest below is {2 ** (chunk.bit_length() - 1)}"
            )
        if levels < chunk.bit_length():
            raise InputError(f"levels: a chunk of {chunk} tokens needs at least {chunk.bit_length()}")
        inner = heads * size
        super().__init__(width, chunk, 4 * inner + heads + heads * levels)
        self.heads, self.head_dim, self.levels = heads, size, levels
        self.in_proj = Linear(width, self.values)  # q, k, v, the output gate, the decay, the levels' weights
        self.decay_bias = nn.Parameter(torch.linspace(2.0, 6.0, heads))
        self.level_scale = nn.Parameter(torch.ones(heads, levels))
        self.norm = RMSNorm(size, eps=1e-6)
        self.out_proj = Linear(inner, width)

    def _project(self, x: Tensor) -> Tensor:
        return self.in_proj(x)

    def _start(self, x: Tensor) -> dict[str, Tensor]:
        matrix = x.new_zeros(x.shape[0], 0, self.heads, self.head_dim, self.head_dim, dtype=working_dtype(x.dtype))
        return {"matrices": matrix, "chunks": torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)}

    def _grown(self, memory: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        matrices = memory["matrices"]
        more = (length // self.segment).bit_length() - matrices.shape[1]
        if more <= 0:
            return memory
        new = matrices.new_zeros(matrices.shape[0], more, *matrices.shape[2:])
        return {**memory, "matrices": torch.cat((matrices, new), 1)}

    def _read(self, tokens: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        matrices, chunks = memory["matrices"], memory["chunks"]
        q, k, v, g, weights, gate = self._parts(tokens, matrices.dtype)
        o, made, decayed = log_linear_chunk(q, k, v, g, weights)
        bits = [(chunks >> j & 1).bool() for j in range(matrices.shape[1])]
        first = self.segment.bit_length()  # the level of one complete chunk
        for j, bit in enumerate(bits):
            weight = weights[..., min(first + j, self.levels - 1)] * decayed * bit[:, None, None]
            o = o + wide_einsum("bthk,bhkv->bthv", q * weight.unsqueeze(-1), matrices[:, j])
        # Adding one to a binary number: the new state moves up past every digit that is set.
        whole, after = decayed[:, -1, :, None, None], []
        carry, moving = made, torch.ones_like(chunks, dtype=torch.bool)
        for j, bit in enumerate(bits):
            kept = matrices[:, j] * whole
            here, on = (moving & ~bit)[:, None, None, None], (moving & bit)[:, None, None, None]
            after.append(torch.where(here, carry, torch.where(on, 0.0, kept)))
            carry, moving = torch.where(on, carry + kept, carry), moving & bit
        written = torch.stack(after, 1) if after else matrices
        return self._answer(o, gate), {"matrices": written, "chunks": chunks + 1}

    def _read_line(
        self, line: Tensor, memory: dict[str, Tensor], done: int, complete: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        count, matrices = line.shape[1] // self.segment, memory["matrices"]
        if count == 1:  # as in decoding: the state is read, and no tree is made
            return super()._read_line(line, memory, done, complete)
        *parts, gate = self._parts(line, matrices.dtype)
        q, k, v, g, weights = (part.unflatten(1, (count, self.segment)) for part in parts)
        o, written = log_linear_chunks(q, k, v, g, weights, matrices, done, complete)
        return self._answer(o.flatten(1, 2), gate), {"matrices": written, "chunks": memory["chunks"] + complete}

    def _parts(self, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """q, k, v, log decays and the levels' weights in this dtype, and the output gate, of tokens [B, T, values]."""
        inner = self.heads * self.head_dim
        qkv, gate, decay, weights = tokens.split((3 * inner, inner, self.heads, self.heads * self.levels), -1)
        qkv, decay, weights = (y.to(dtype) for y in (qkv, decay, weights))
        q, k, v = qkv.unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        weights = F.softplus(self.level_scale * weights.unflatten(-1, (self.heads, self.levels)))
        return q * self.head_dim**-0.5, k, v, F.logsigmoid(decay + self.decay_bias), weights, gate

    def _answer(self, o: Tensor, gate: Tensor) -> Tensor:
        """o [B, T, H, V] and its gate [B, T, H V], in the dtype of the input -> [B, T, width]."""
        y = self.norm(o.to(roomy(gate.dtype))).flatten(2) * F.silu(gate)
        return project_wide(y, self.out_proj, gate.dtype)

    def _memory_nbytes(self, length: int, batch: int, dtype: torch.dtype) -> int:
        count = (length // self.segment).bit_length()
        matrices = tensor_bytes(batch, count, self.heads, self.head_dim, self.head_dim, dtype=working_dtype(dtype))
        return matrices + tensor_bytes(batch, dtype=torch.int64)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`: chunks are filled up."""
        chunks = -(-length // self.segment)
        within = 4 * self.segment**2 * self.head_dim + 2 * self.segment * self.head_dim**2
        states = 2 * self.segment * self.head_dim**2 * chunks.bit_length()
        projections = multiplications(self.in_proj) + multiplications(self.out_proj)
        return 2 * length * projections + chunks * self.heads * (within + states)
