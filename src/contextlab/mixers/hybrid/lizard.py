"""Gated linear attention of everything and a softmax window with learned sinks, added up: Lizard's layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.convolution import without_padding
from contextlab.mixers.layers import Linear
from contextlab.mixers.linear.features import Hedgehog, divided, with_ones
from contextlab.mixers.softmax.base import Tokens
from contextlab.mixers.softmax.sliding_window import SlidingWindow
from contextlab.ops.linear import simple_gla, simple_gla_flops
from contextlab.ops.precision import working_dtype
from contextlab.registry import register
from contextlab.state import State, WindowState, own, tensor_bytes

FLOOR = 1e-10
"""Added to the sum of the gated weights before it divides, which the paper does not do."""


@dataclass
class LizardState(State):
    """What both parts remember.

    local: the window's tokens. matrix: [B, H, F, D + 1], gated sums of features times values and, in the last column,
    of features.
    """

    local: WindowState
    matrix: Tensor


@register(
    "mixer",
    "lizard",
    family="hybrid",
    papers=("2507.09025", "2402.04347"),
    cases=(
        {"window": 8},
        {"window": 1, "heads": 2, "meta_tokens": 0},
        {"window": 5, "heads": 4, "kv_heads": 2, "head_dim": 3, "qk_norm": True, "bias": True, "output_gate": True},
        {"window": 20, "short_conv": 3, "heads": 3, "gate_bias": 3.0},
    ),
)
class Lizard(SlidingWindow):
    """Gated linear attention of Hedgehog's features plus a softmax window with learned sinks, no positions (Lizard).

    y_t = S_t^T phi(q_t) / (z_t . phi(q_t) + 1e-10) + alpha sum_near exp(s) v / (sum_near exp(s) + sum_j exp(m_j)) with
    S_t = g_t S_t-1 + phi(k_t) v_t^T, z_t = g_t z_t-1 + phi(k_t), one gate g_t = sigmoid(w . x_t) a token for all heads
    in place of rotary positions, and phi(x) = softmax(W x), softmax(-W x), a W of each head for q and for k. The meta
    tokens m_j are scores that take attention in the window and give nothing, the same for all heads.

    The paper writes sum_j m_j in the denominator, which can be negative, and calls m_j a logit; it has a formula of the
    gated part with its denominator and one without; it does not say where w, m and alpha start (here 0, 0 and 1, so
    that g is 1/2 unless gate_bias is given), nor whether alpha is learned (here it is).

    width: size of a token's vector.
    window: tokens that a query sees by softmax, its own counted.
    meta_tokens: learned scores beside those of the window.
    gate_bias: what a learned bias of the gate starts from, for slow forgetting such as 4; None for none, as in the
        paper.
    heads: query heads.
    kv_heads: key and value heads, a divisor of heads; default heads.
    head_dim: size of a head; default width / heads.
    qk_norm: RMS-normalise queries and keys in each head.
    norm_eps: of that normalisation; None takes PyTorch's default.
    output_gate: multiply the heads' outputs by a sigmoid gate of the token.
    bias: whether the projections have biases.
    short_conv: width of a causal depthwise convolution over q, k and v; 0 for none, as in the paper.
    """

    parallel_form = "chunks"
    trains_alone = "PyTorch's attention under vmap gives a learned sink no gradient on a CPU"

    def __init__(
        self,
        width: PositiveInt,
        *,
        window: PositiveInt = 128,
        meta_tokens: NonNegativeInt = 4,
        gate_bias: float | None = None,
        heads: PositiveInt = 4,
        kv_heads: PositiveInt | None = None,
        head_dim: PositiveInt | None = None,
        qk_norm: bool = False,
        norm_eps: PositiveFloat | None = None,
        output_gate: bool = False,
        bias: bool = False,
        short_conv: NonNegativeInt = 0,
    ) -> None:
        super().__init__(
            width, window=window, heads=heads, kv_heads=kv_heads, head_dim=head_dim, position="none", qk_norm=qk_norm,
            norm_eps=norm_eps, output_gate=output_gate, bias=bias, short_conv=short_conv,
        )  # fmt: skip
        self.feature = Hedgehog(self.head_dim, heads)
        self.decay_proj = Linear(width, 1, bias=gate_bias is not None)
        nn.init.zeros_(self.decay_proj.weight)
        if gate_bias is not None:
            nn.init.constant_(self.decay_proj.bias, gate_bias)
        self.meta = nn.Parameter(torch.zeros(meta_tokens)) if meta_tokens else None
        self.alpha = nn.Parameter(torch.ones(1))

    @property
    def sink_score(self) -> Tensor | None:
        """See `SlidingWindow.sink_score`: that of all meta tokens together."""
        return None if self.meta is None else self.meta.logsumexp(0).expand(self.heads)

    def _attend(self, new: Tokens, state: State | None, keep_state: bool) -> tuple[Tensor, State | None]:
        assert state is None or isinstance(state, LizardState)
        near, after = super()._attend(new, None if state is None else state.local, keep_state)
        far, matrix = self._gated(new, None if state is None else state.matrix, keep_state)
        y = (far + self.alpha.to(far.dtype) * near).to(near.dtype)
        if after is None or matrix is None:
            return y, None
        assert isinstance(after, WindowState)
        return y, LizardState(after, own(matrix), length=after.length)

    def _gated(self, new: Tokens, matrix: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        """The gated linear attention's answers [B, T, H, V], in float32 at least, and the matrix after them."""
        work, shared = working_dtype(new.v.dtype), self.heads // self.kv_heads
        places = torch.arange(new.q.shape[1], device=new.q.device)  # Hedgehog's map asks for none
        k = self.feature(new.k.to(work).repeat_interleave(shared, 2), places, False)
        g = F.logsigmoid(self.decay_proj(without_padding(new.x, new.mask)).to(work)).expand(-1, -1, self.heads)
        v = with_ones(without_padding(new.v, new.mask)).repeat_interleave(shared, 2)
        q, k = self.feature(new.q.to(work), places, True), without_padding(k, new.mask)
        o, matrix = simple_gla(q, k, v, g, None, 1.0, matrix, keep)
        return divided(o, FLOOR), matrix

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length. The matrix is kept in float32 at least."""
        sides = self.feature.features, self.head_dim + 1
        return super().state_nbytes(length, batch, dtype) + tensor_bytes(
            batch, self.heads, *sides, dtype=working_dtype(dtype)
        )

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        far = simple_gla_flops(length, self.heads, self.feature.features, self.head_dim + 1)
        return super().flops(length) + 2 * length * (self.width + self.feature.products) + far
