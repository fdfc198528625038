"""MesaNet: the answer of the ridge regression on everything read."""

from __future__ import annotations

import math

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.base import head_size
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.layers import RMSNorm
from contextlab.mixers.matrix import MatrixMixer, recurrent
from contextlab.mixers.test_time.titans import _unit_queries_and_keys
from contextlab.ops.linear import simple_gla_flops, working_dtype
from contextlab.ops.mesa import mesa
from contextlab.registry import register
from contextlab.state import RecurrentState, State, own, tensor_bytes


@register(
    "mixer",
    "mesa_net",
    family="test-time",
    papers=("2506.05233", "2309.05858"),
    cases=({}, {"heads": 2, "head_dim": 4, "steps": 6}, {"short_conv": 0, "heads": 3, "steps": 12}),
)
class MesaNet(MatrixMixer):
    """MesaNet: every token is answered by the ridge regression of all values on all keys so far.

    width: size of a token's vector.
    heads: number of heads.
    head_dim: size of a head; default width / heads.
    steps: of conjugate gradients, by which the regressions are solved.
    least_ridge: lower bound of the learned strength of the ridge.
    short_conv: width of the causal convolution before q and k; 0 for none.
    """

    tells_mixing = True

    trains_alone = "its solver's backward holds on to the tensors of the forward, which vmap does not take"

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        head_dim: PositiveInt | None = None,
        steps: PositiveInt = 30,
        least_ridge: PositiveFloat = 0.25,
        short_conv: NonNegativeInt = 4,
    ) -> None:
        size = head_size(width, heads) if head_dim is None else head_dim
        inner = heads * size
        # q, k; v; the weight and the decay of each head
        parts = [2 * inner, inner, heads, heads]
        super().__init__(width, heads, size, size, sum(parts), parts[0], short_conv)
        self.parts, self.steps, self.least_ridge = parts, steps, least_ridge
        self.gate_bias = nn.Parameter(torch.tensor([0.0, 4.6]).repeat(heads, 1).T.contiguous())
        start = math.log(math.expm1(max(1.0 - least_ridge, 0.1)))  # a ridge of 1
        self.ridge = nn.Parameter(torch.full((heads, size), start))
        self.norm = RMSNorm(size, eps=1e-5)
        self._project_out(inner)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. At padding k and v are zero, so that the state stays as it started."""
        before = recurrent(state)
        qk, v, beta, g = self.in_proj(without_padding(x, mask)).split(self.parts, -1)
        qk, conv = self._convolved(qk, before, keep_state, "silu")
        q, k, v = _unit_queries_and_keys(torch.cat((qk, v), -1), self.heads, self.key)
        beta, g = (y + bias for y, bias in zip((beta, g), self.gate_bias, strict=True))
        initial = None if before is None else (before["keys"], before["matrix"])
        ridge = F.softplus(self.ridge) + self.least_ridge
        q, k, v, g, beta = self.sites(q=q, k=k, v=v, g=F.logsigmoid(g), beta=beta.sigmoid())
        o, after = mesa(q, k, v, g, beta, ridge, initial, keep_state, self.steps)
        y = self._answer(self.norm(self.site("heads", o)).flatten(2), x)
        if after is None:
            return y, None
        kept = self._kept(x, before, after[1], conv)
        keys = own(after[0].to(working_dtype(x.dtype)))
        return y, RecurrentState({**kept.memory, "keys": keys}, length=kept.length)

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the products of the keys beside those with the values, the same at every length."""
        keys = tensor_bytes(batch, self.heads, self.key, self.key, dtype=working_dtype(dtype))
        return super().state_nbytes(length, batch, dtype) + keys

    def _op_flops(self, length: int) -> int:
        return (self.steps + 2) * simple_gla_flops(length, self.heads, self.key, self.key)
