"""Normalised gated linear attention of convolved queries and keys: LAWCAT's layer."""

from __future__ import annotations

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from contextlab.mixers.convolution import without_padding
from contextlab.mixers.layers import Linear, multiplications
from contextlab.mixers.linear.features import Hedgehog, divided, with_ones
from contextlab.mixers.softmax.base import AttentionMixer, AttentionOptions, Tokens
from contextlab.ops.gla import gla, gla_flops
from contextlab.ops.precision import working_dtype
from contextlab.registry import register
from contextlab.state import RecurrentState, State, own, tensor_bytes

FLOOR = 1e-10
"""Added to the sum of the weights before it divides, as in the public code."""


@register(
    "mixer",
    "lawcat",
    family="linear",
    papers=("2509.18467", "2402.04347"),
    cases=(
        {},
        {"heads": 2, "gate_rank": 3, "gate_scale": 1.0, "short_conv": 2, "output_gate": True},
        {"heads": 4, "kv_heads": 2, "head_dim": 3, "qk_norm": True, "bias": True, "short_conv": 0},
    ),
)
class Lawcat(AttentionMixer):
    """Gated linear attention of Hedgehog's features, divided by the sum of its weights, behind a convolution (LAWCAT).

    o_t = S_t^T phi(q_t) / (z_t . phi(q_t) + 1e-10) with S_t = diag(a_t) S_t-1 + phi(k_t) v_t^T, z_t = a_t z_t-1 +
    phi(k_t), phi(x) = softmax(W x), softmax(-W x) with a W of each head for q and for k, and the decay a_t =
    sigmoid(W2 W1 x_t + b)^(1 / gate_scale). It has no positions but the convolution's. In the public code q and k of
    every query head are convolved; here q, k and v, as they are projected. There W halves the size of a head, so that
    the state is half as large.

    width: size of a token's vector.
    heads: query heads.
    kv_heads: key, value and decay heads, a divisor of heads; default heads.
    head_dim: size of a head; default width / heads.
    gate_rank: rank of the map to the decays.
    gate_scale: a large one forgets slowly.
    short_conv: width of a causal depthwise convolution over q, k and v; 0 for none.
    qk_norm: RMS-normalise queries and keys in each head.
    norm_eps: of that normalisation; None takes PyTorch's default.
    output_gate: multiply the heads' outputs by a sigmoid gate of the token.
    bias: whether the projections have biases.
    """

    parallel_form = "chunks"

    def __init__(
        self,
        width: PositiveInt,
        *,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        gate_rank: PositiveInt = 16,
        gate_scale: PositiveFloat = 16.0,
        short_conv: NonNegativeInt = 4,
        qk_norm: bool = False,
        norm_eps: PositiveFloat | None = None,
        output_gate: bool = False,
        bias: bool = False,
    ) -> None:
        options = AttentionOptions(
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, position="none", qk_norm=qk_norm, norm_eps=norm_eps,
            output_gate=output_gate, bias=bias, short_conv=short_conv,
        )  # fmt: skip
        super().__init__(width, options)
        self.gate_scale = gate_scale
        self.feature = Hedgehog(self.head_dim, heads)
        self.decay_in = Linear(width, gate_rank)
        self.decay_out = Linear(gate_rank, self.kv_heads * self.feature.features, bias=True)

    def _attend(self, new: Tokens, state: State | None, keep_state: bool) -> tuple[Tensor, State | None]:
        assert state is None or isinstance(state, RecurrentState)
        work, shared = working_dtype(new.v.dtype), self.heads // self.kv_heads
        places = torch.arange(new.q.shape[1], device=new.q.device)  # Hedgehog's map asks for none
        k = self.feature(new.k.to(work).repeat_interleave(shared, 2), places, False)
        low = self.decay_in(without_padding(new.x, new.mask))
        g = F.logsigmoid(self.decay_out(low).to(work)).unflatten(-1, (self.kv_heads, -1)) / self.gate_scale
        v = with_ones(without_padding(new.v, new.mask)).repeat_interleave(shared, 2)
        o, matrix = gla(
            self.feature(new.q.to(work), places, True), without_padding(k, new.mask), v,
            g.repeat_interleave(shared, 2), 1.0, None if state is None else state["matrix"], keep_state,
        )  # fmt: skip
        y = divided(o, FLOOR).to(new.v.dtype)
        if matrix is None:
            return y, None
        length = new.q.shape[1] + (0 if state is None else state.length)
        return y, RecurrentState({"matrix": own(matrix)}, length=length)

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length. The matrix is kept in float32 at least."""
        sides = self.feature.features, self.head_dim + 1
        return tensor_bytes(batch, self.heads, *sides, dtype=working_dtype(dtype)) + self._conv_nbytes(batch, dtype)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        gates = multiplications(self.decay_in) + multiplications(self.decay_out)
        made = gla_flops(length, self.heads, self.feature.features, self.head_dim + 1)
        return super().flops(length) + 2 * length * (gates + self.feature.products) + made

    def _pairs(self, length: int) -> int:
        return 0
