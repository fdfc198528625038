"""Test-time training: the state is a small network, trained on the tokens as they are read."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.base import head_size
from contextlab.mixers.layers import Linear, multiplications
from contextlab.mixers.segment.base import SegmentMixer
from contextlab.ops.linear import working_dtype
from contextlab.ops.position import rope_table, rotary_size, rotate
from contextlab.ops.precision import with_room
from contextlab.ops.ttt import InnerNorm, ttt_linear, ttt_mlp
from contextlab.registry import register
from contextlab.state import tensor_bytes


class TttMixer(SegmentMixer):
    """Base of TTT's mixers: a mini-batch is a segment; the memory is the inner model's weights."""

    def __init__(
        self,
        width: int,
        batch_tokens: int,
        heads: int,
        head_dim: int | None,
        learning_rate: float,
        rope_base: float,
    ) -> None:
        size = head_size(width, heads) if head_dim is None else head_dim
        super().__init__(width, batch_tokens, 3 * heads * size + heads)
        self.heads, self.head_dim, self.learning_rate, self.rope_base = heads, size, learning_rate, rope_base
        self.rotary = rotary_size(size, 1.0)
        self.in_proj = Linear(width, self.values)  # q, k, v and the rates
        self.rate_bias = nn.Parameter(torch.zeros(heads))
        self.share = nn.Parameter(1 / torch.arange(1.0, batch_tokens + 1))  # of each place's answer in the steps
        self.gain, self.bias = nn.Parameter(torch.ones(heads, size)), nn.Parameter(torch.zeros(heads, size))
        self.norm_weight = nn.Parameter(torch.ones(heads * size))
        self.out_proj = Linear(heads * size, width)

    def _project(self, x: Tensor) -> Tensor:
        return self.in_proj(x)

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v [B, H, S, D] and the rates [B, H, S, S] of a mini-batch."""
        inner = self.heads * self.head_dim
        qkv, rate = tokens.split((3 * inner, self.heads), -1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        table = rope_table(torch.arange(tokens.shape[1], device=tokens.device), self.rotary, self.rope_base, q.dtype)
        q, k = (rotate(y.contiguous(), table) for y in (q, k))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        step = (with_room(rate) + self.rate_bias).sigmoid().transpose(1, 2) * (self.learning_rate / self.head_dim)
        return q, k, v, self.share.clamp_min(0)[:, None] * step.unsqueeze(-2)

    def _answer(self, o: Tensor) -> Tensor:
        """From the inner model's answers [B, H, S, D] to the mixer's."""
        o = o.transpose(1, 2).flatten(2)
        return self.out_proj(F.layer_norm(o, o.shape[-1:], eps=1e-6) * self.norm_weight)

    def _weights(self, x: Tensor, *names: str) -> dict[str, Tensor]:
        """The inner model at the start, for each sequence; in float32 at least, for it sums many small steps."""
        work = working_dtype(x.dtype)
        return {name: getattr(self, name).to(work).expand(x.shape[0], -1, -1, -1) for name in names}

    def _norm(self) -> InnerNorm:
        return InnerNorm(self.gain, self.bias)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`: mini-batches are filled up."""
        projections = multiplications(self.in_proj) + multiplications(self.out_proj)
        filled = -(-length // self.segment) * self.segment
        return 2 * length * projections + 2 * filled * self.heads * self._inner_products()

    def _inner_products(self) -> int:
        """Multiply-adds a token and head of the inner model's steps."""
        raise NotImplementedError


@register(
    "mixer",
    "ttt_linear",
    family="test-time",
    papers=("2407.04620",),
    cases=({"batch_tokens": 8}, {"batch_tokens": 5, "heads": 2, "head_dim": 4}, {"batch_tokens": 1}),
)
class TttLinear(TttMixer):
    """TTT-Linear: the state is a linear model that takes a gradient step for every mini-batch of tokens.

    The paper's short convolutions and output gate are left out.

    width: size of a token's vector.
    batch_tokens: tokens of a mini-batch.
    heads: number of heads.
    head_dim: size of a head; default width / heads.
    learning_rate: largest rate of a step, before the division by head_dim.
    rope_base: base of the rotary frequencies, counted within a mini-batch.
    """

    def __init__(
        self,
        width: PositiveInt,
        batch_tokens: PositiveInt = 16,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
        learning_rate: PositiveFloat = 1.0,
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(width, batch_tokens, heads, head_dim, learning_rate, rope_base)
        self.W = nn.Parameter(0.02 * torch.randn(heads, self.head_dim, self.head_dim))
        self.b = nn.Parameter(torch.zeros(heads, 1, self.head_dim))

    def _start(self, x: Tensor) -> dict[str, Tensor]:
        return self._weights(x, "W", "b")

    def _read(self, tokens: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        o, W, b = ttt_linear(*self._split(tokens), memory["W"], memory["b"], self._norm())
        return self._answer(o), {"W": W, "b": b}

    def _memory_nbytes(self, length: int, batch: int, dtype: torch.dtype) -> int:
        return tensor_bytes(batch, self.heads, self.head_dim + 1, self.head_dim, dtype=working_dtype(dtype))

    def _inner_products(self) -> int:
        return 3 * self.head_dim**2 + 3 * self.segment * self.head_dim


@register(
    "mixer",
    "ttt_mlp",
    family="test-time",
    papers=("2407.04620",),
    cases=({"batch_tokens": 8}, {"batch_tokens": 5, "heads": 2, "head_dim": 4, "expand": 2}, {"batch_tokens": 1}),
)
class TttMlp(TttMixer):
    """TTT-MLP: the state is a two-layer MLP that takes a gradient step for every mini-batch of tokens.

    The paper's short convolutions and output gate are left out.

    width: size of a token's vector.
    batch_tokens: tokens of a mini-batch.
    expand: hidden size of the inner MLP over head_dim.
    heads: number of heads.
    head_dim: size of a head; default width / heads.
    learning_rate: largest rate of a step, before the division by head_dim.
    rope_base: base of the rotary frequencies, counted within a mini-batch.
    """

    def __init__(
        self,
        width: PositiveInt,
        batch_tokens: PositiveInt = 16,
        expand: PositiveInt = 4,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
        learning_rate: PositiveFloat = 0.1,
        rope_base: Annotated[float, Field(gt=1)] = 10000.0,
    ) -> None:
        super().__init__(width, batch_tokens, heads, head_dim, learning_rate, rope_base)
        size, self.hidden = self.head_dim, expand * self.head_dim
        self.W1 = nn.Parameter(0.02 * torch.randn(heads, size, self.hidden))
        self.b1 = nn.Parameter(torch.zeros(heads, 1, self.hidden))
        self.W2 = nn.Parameter(0.02 * torch.randn(heads, self.hidden, size))
        self.b2 = nn.Parameter(torch.zeros(heads, 1, size))

    def _start(self, x: Tensor) -> dict[str, Tensor]:
        return self._weights(x, "W1", "b1", "W2", "b2")

    def _read(self, tokens: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        weights, biases = (memory["W1"], memory["W2"]), (memory["b1"], memory["b2"])
        o, (W1, W2), (b1, b2) = ttt_mlp(*self._split(tokens), weights, biases, self._norm())
        return self._answer(o), {"W1": W1, "b1": b1, "W2": W2, "b2": b2}

    def _memory_nbytes(self, length: int, batch: int, dtype: torch.dtype) -> int:
        size, hidden = self.head_dim, self.hidden
        return tensor_bytes(batch, self.heads, 2 * size * hidden + size + hidden, dtype=working_dtype(dtype))

    def _inner_products(self) -> int:
        return 6 * self.head_dim * self.hidden + 3 * self.segment * (self.head_dim + self.hidden)
