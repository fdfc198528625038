"""Titans: a linear memory, fitted by gradient steps with momentum and forgetting."""

from __future__ import annotations

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.base import head_size
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.layers import RMSNorm
from contextlab.mixers.matrix import MatrixMixer, recurrent
from contextlab.ops.linear import working_dtype
from contextlab.ops.precision import unit_length
from contextlab.ops.titans import titans, titans_flops
from contextlab.registry import register
from contextlab.state import State, tensor_bytes


@register(
    "mixer",
    "titans",
    family="test-time",
    papers=("2501.00663",),
    cases=({}, {"heads": 2, "head_dim": 4, "expand_v": 2}, {"short_conv": 0, "heads": 3}),
)
class Titans(MatrixMixer):
    """Titans' neural memory with a matrix: gradient descent on what is read, with momentum and forgetting.

    The rate of a step, the momentum and the forgetting depend on the token, one of each for a head; queries and keys
    have unit length; the output is normalised and gated. Deep memories and the paper's persistent tokens are left out.

    width: size of a token's vector.
    heads: number of heads.
    head_dim: size of a head's key; default width / heads.
    expand_v: size of a head's value over that of its key.
    short_conv: width of the causal convolution before q, k and v; 0 for none.
    """

    tells_mixing = True

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
        expand_v: PositiveInt = 1,
        short_conv: NonNegativeInt = 4,
    ) -> None:
        key = head_size(width, heads) if head_dim is None else head_dim
        value = key * expand_v
        # q, k, v; the output gate; rate, momentum and what is kept of each head
        parts = [heads * (2 * key + value), heads * value, heads, heads, heads]
        super().__init__(width, heads, key, value, sum(parts), parts[0], short_conv)
        self.parts = parts
        # At the start steps of half the error, little momentum, and one part in a hundred forgotten a token.
        self.gate_bias = nn.Parameter(torch.tensor([0.0, -2.0, 4.6]).repeat(heads, 1).T.contiguous())
        self.norm = RMSNorm(value, eps=1e-6)
        self._project_out(heads * value)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. At padding k and v are zero, so that the state stays as it started."""
        before = recurrent(state)
        qkv, gate, *steps = self.in_proj(without_padding(x, mask)).split(self.parts, -1)
        qkv, conv = self._convolved(qkv, before, keep_state, "silu")
        q, k, v = _unit_queries_and_keys(qkv, self.heads, self.key)
        theta, m, g = (y + bias for y, bias in zip(steps, self.gate_bias, strict=True))
        q, k, v, theta = self.sites(q=q, k=k, v=v, beta=theta.sigmoid())
        m, g = self.sites(momentum=F.logsigmoid(m), g=F.logsigmoid(g))
        initial = None if before is None else before["matrix"]
        o, matrix = titans(q, k, v, theta, m, g, None, initial, keep_state)
        y = self._answer(self.norm(self.site("heads", o)).flatten(2) * F.silu(gate), x)
        return y, self._kept(x, before, matrix, conv) if keep_state else None

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: memory and momentum, the same at every length."""
        momentum = tensor_bytes(batch, self.heads, self.key, self.value, dtype=working_dtype(dtype))
        return super().state_nbytes(length, batch, dtype) + momentum

    def _op_flops(self, length: int) -> int:
        return titans_flops(length, self.heads, self.key, self.value)


def _unit_queries_and_keys(qkv: Tensor, heads: int, key: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k of unit length and v, [B, T, H, .], of their concatenation."""
    qk, v = qkv.split((2 * heads * key, qkv.shape[-1] - 2 * heads * key), -1)
    qk = qk.unflatten(-1, (2, heads, key))
    q, k = unit_length(qk).unbind(2)
    return q, k, v.unflatten(-1, (heads, -1))
