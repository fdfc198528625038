"""ATLAS: a memory that learns from a window of tokens while it reads."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.base import head_size
from contextlab.mixers.layers import Linear, RMSNorm, multiplications, project_wide
from contextlab.mixers.segment.base import SegmentMixer
from contextlab.ops.atlas import atlas
from contextlab.ops.linear import working_dtype
from contextlab.ops.precision import roomy, unit_length, with_room
from contextlab.registry import register
from contextlab.state import tensor_bytes


@register(
    "mixer",
    "atlas",
    family="test-time",
    papers=("2505.23735",),
    cases=(
        {"batch_tokens": 8, "degree": 1},
        {"batch_tokens": 3, "heads": 2, "head_dim": 3, "window": 6, "muon_steps": 0},
        {"batch_tokens": 1, "window": 1, "muon_steps": 0},
    ),
)
class Atlas(SegmentMixer):
    """ATLAS: a memory trained on the last `window` tokens at once, with momentum, forgetting and Muon's steps.

    Keys and queries pass through polynomial features with learned coefficients, which enlarges what a matrix can hold;
    all gradients of a mini-batch are taken at the memory it begins with. The steps that Muon makes near orthogonal
    are scaled by a learned factor of each head. The paper's deep memories and short convolutions are left out.

    width: size of a token's vector.
    batch_tokens: tokens of a mini-batch.
    window: tokens whose errors make one step (the Omega rule); 1 as in Titans.
    degree: of the polynomial features; 2 makes the state about head_dim / 2 times larger.
    muon_steps: Newton-Schulz iterations of each step; 0 for plain gradients with momentum (OmegaNet).
    heads: number of heads.
    head_dim: size of a head; default width / heads.
    """

    def __init__(
        self,
        width: PositiveInt,
        batch_tokens: PositiveInt = 16,
        window: PositiveInt = 4,
        degree: Literal[1, 2] = 2,
        muon_steps: Annotated[int, Field(ge=0, le=10)] = 5,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
    ) -> None:
        size = head_size(width, heads) if head_dim is None else head_dim
        super().__init__(width, batch_tokens, heads * (3 * size + 4))
        self.window, self.degree, self.muon_steps = window, degree, muon_steps
        self.heads, self.head_dim = heads, size
        # Plain steps follow the mean error: the sum over windows and a mini-batch of like keys would overshoot and grow
        # without bound. Muon's steps have a size of their own.
        self.rate = 1.0 if muon_steps else 1 / (window * batch_tokens)
        self.features = 1 + size + (size * (size + 1) // 2 if degree == 2 else 0)
        self.in_proj = Linear(width, self.values)  # q; k, v and the window's gate; rate, momentum, forgetting
        # At the start steps of half the error, little momentum, and one part in a hundred forgotten a token.
        self.gate_bias = nn.Parameter(torch.tensor([0.0, -2.0, 4.6]).repeat(heads, 1).T.contiguous())
        self.coefficients = nn.Parameter(torch.tensor([1.0, 1.0, 0.5])[: degree + 1].sqrt().repeat(heads, 1))
        self.step = nn.Parameter(torch.full((heads,), 0.5)) if muon_steps else None
        self.norm = RMSNorm(size, eps=1e-6)
        self.out_proj = Linear(heads * size, width)
        rows, columns = torch.triu_indices(size, size)
        self.rows: Tensor
        self.columns: Tensor
        self.twice: Tensor
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("twice", torch.where(rows == columns, 1.0, 2.0**0.5), persistent=False)

    def _project(self, x: Tensor) -> Tensor:
        q, past, steps = self.in_proj(x).split(self._parts(), -1)
        inner = 2 * self.heads * self.head_dim
        # The gate is stored as it is used, so that zeros before the first token weigh nothing.
        # Slopes of a gate that is shut are large before the sigmoid makes them small.
        q, past, steps = with_room(q), with_room(past), with_room(steps)
        return torch.cat((q, past[..., :inner], past[..., inner:].sigmoid(), steps), -1)

    def _parts(self) -> tuple[int, int, int]:
        return self.heads * self.head_dim, self.heads * (2 * self.head_dim + 1), 3 * self.heads

    def _start(self, x: Tensor) -> dict[str, Tensor]:
        shape, work = (x.shape[0], self.heads, self.features, self.head_dim), working_dtype(x.dtype)
        return {
            "matrix": x.new_zeros(shape, dtype=work),
            "momentum": x.new_zeros(shape, dtype=work),
            "past": x.new_zeros(x.shape[0], self.window - 1, self._parts()[1], dtype=roomy(x.dtype)),
        }

    def _read(self, tokens: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        work = memory["matrix"].dtype
        q, seen, steps = tokens.split(self._parts(), -1)
        seen = torch.cat((memory["past"], seen), 1)
        inner = self.heads * self.head_dim
        k, v, gate = seen.to(work).split((inner, inner, self.heads), -1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q.to(work), k, v))
        biased = steps.to(work).unflatten(-1, (3, self.heads)) + self.gate_bias
        theta, m, g = (x.transpose(1, 2) for x in biased.unbind(2))
        o, matrix, momentum = atlas(
            self._features(q), self._features(k), v, theta.sigmoid() * self.rate, F.logsigmoid(m), F.logsigmoid(g),
            gate.transpose(1, 2), memory["matrix"], memory["momentum"], self.window, self.muon_steps, self.step,
        )  # fmt: skip
        o = self.norm(o.transpose(1, 2).to(tokens.dtype)).flatten(2)
        kept = seen[:, seen.shape[1] - self.window + 1 :]
        o = project_wide(o, self.out_proj, self.norm.weight.dtype)
        return o, {"matrix": matrix, "momentum": momentum, "past": kept}

    def _features(self, x: Tensor) -> Tensor:
        """x [B, H, S, D] -> monomials up to `degree` of x / |x|, weighted, of unit length: [B, H, S, F]."""
        x = unit_length(x, eps=1e-12)
        parts = [torch.ones_like(x[..., :1]), x]
        if self.degree == 2:
            parts.append(x[..., self.rows] * x[..., self.columns] * self.twice.to(x.dtype))
        weights = self.coefficients[:, None, :, None]
        return unit_length(torch.cat([w * p for w, p in zip(weights.unbind(2), parts, strict=True)], -1), eps=1e-12)

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length; float16 tokens are kept in float32."""
        return super().state_nbytes(length, batch, roomy(dtype))

    def _memory_nbytes(self, length: int, batch: int, dtype: torch.dtype) -> int:
        past = tensor_bytes(batch, self.window - 1, self._parts()[1], dtype=dtype)
        return past + 2 * tensor_bytes(batch, self.heads, self.features, self.head_dim, dtype=working_dtype(dtype))

    def flops(self, length: int) -> int:
        """See `Mixer.flops`: mini-batches are filled up."""
        projections = multiplications(self.in_proj) + multiplications(self.out_proj)
        filled = -(-length // self.segment) * self.segment
        matrix, sources = self.features * self.head_dim, self.segment + self.window - 1
        products = 3 * self.segment * self.segment  # the weights of the errors
        if self.muon_steps:
            small, large = sorted((self.features, self.head_dim))
            iteration = 2 * small * small * large + small**3
            products += matrix * (3 + 2 * sources + 2 * self.segment) + self.muon_steps * iteration
        else:
            products += 5 * matrix + sources * (self.features + self.head_dim)
        return 2 * length * projections + 2 * filled * self.heads * products
