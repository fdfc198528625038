"""Recurrences of single elements, gated by the token alone: one linear scan each."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.base import head_size
from contextlab.mixers.elementwise import ElementwiseMixer
from contextlab.mixers.gates import bounded_forget, root_of_rest
from contextlab.mixers.layers import TernaryLinear
from contextlab.ops.linear import working_dtype
from contextlab.ops.precision import roomy
from contextlab.registry import register


@register(
    "mixer",
    "min_gru",
    family="recurrent",
    papers=("2410.01201",),
    cases=({}, {"expand": 2, "short_conv": 4}),
)
class MinGru(ElementwiseMixer):
    """minGRU: a GRU whose gate and candidate depend on the token only, so that it trains as a scan.

    h_t = (1 - z_t) h_{t-1} + z_t c_t with z = sigmoid(W_z x) and c = g(W_h x), g(a) = a + 1/2 for a >= 0, else
    sigmoid(a) (the paper's appendix B).

    width: size of a token's vector.
    expand: channels of the state over width.
    short_conv: width of the causal convolution before the candidate; 0 for none.
    """

    def __init__(self, width: PositiveInt, expand: PositiveInt = 1, short_conv: NonNegativeInt = 0) -> None:
        super().__init__(width, expand * width, 2 * expand * width, short_conv)

    def _recur(self, projected: Tensor, h: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        candidate, gate = projected.chunk(2, -1)
        return self._scan(gate.sigmoid() * _positive(candidate), F.logsigmoid(-gate), h, mask)


@register(
    "mixer",
    "min_lstm",
    family="recurrent",
    papers=("2410.01201",),
    cases=({}, {"expand": 2, "short_conv": 4}),
)
class MinLstm(ElementwiseMixer):
    """minLSTM: an LSTM whose gates depend on the token only and add up to one, so that it trains as a scan.

    h_t = f' h_{t-1} + i' c_t with f' = f / (f + i), i' = i / (f + i), sigmoid gates f and i, and minGRU's candidate.

    width: size of a token's vector.
    expand: channels of the state over width.
    short_conv: width of the causal convolution before the candidate; 0 for none.
    """

    def __init__(self, width: PositiveInt, expand: PositiveInt = 1, short_conv: NonNegativeInt = 0) -> None:
        super().__init__(width, expand * width, 3 * expand * width, short_conv)

    def _recur(self, projected: Tensor, h: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        candidate, forget, enter = projected.chunk(3, -1)
        share = F.logsigmoid(enter) - F.logsigmoid(forget)  # log(i / f)
        return self._scan(share.sigmoid() * _positive(candidate), -F.softplus(share), h, mask)


@register("mixer", "mlgru", family="recurrent", papers=("2406.02528",), cases=({}, {"expand": 2, "short_conv": 4}))
class MlGru(ElementwiseMixer):
    """MLGRU of the MatMul-free language model: a GRU without recurrent matrices, with a gated output.

    h_t = f_t h_{t-1} + (1 - f_t) c_t with f = sigmoid(W_f x), c = SiLU(W_c x), and h times sigmoid(W_g x) is projected
    out. With `ternary` every matrix has weights of -1, 0 and 1 times one scale, and its inputs, RMS-normalised, have
    8 bits; gradients pass straight through the rounding.

    width: size of a token's vector.
    expand: channels of the state over width.
    short_conv: width of the causal convolution before the candidate; 0 for none, as in the paper.
    ternary: round weights and inputs of the projections as above.
    """

    def __init__(
        self,
        width: PositiveInt,
        expand: PositiveInt = 1,
        short_conv: NonNegativeInt = 0,
        ternary: bool = False,
    ) -> None:
        super().__init__(width, expand * width, 3 * expand * width, short_conv)
        if ternary:
            self.in_proj = TernaryLinear(width, 3 * expand * width)  # type: ignore[assignment]
            self.out_proj = TernaryLinear(expand * width, width)  # type: ignore[assignment]

    def _recur(self, projected: Tensor, h: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        candidate, forget, gate = projected.chunk(3, -1)
        h_all, h = self._scan((-forget).sigmoid() * F.silu(candidate), F.logsigmoid(forget), h, mask)
        return h_all * gate.sigmoid(), h


@register(
    "mixer",
    "hgrn",
    family="recurrent",
    papers=("2311.04823",),
    cases=({}, {"lower_bound": 0.5, "expand": 2}, {"short_conv": 3}),
)
class Hgrn(ElementwiseMixer):
    """HGRN with a real state: a forget gate with a lower bound, an input gate tied to it, a gated output.

    h_t = f_t h_{t-1} + (1 - f_t) silu(W_c x_t), f = b + (1 - b) sigmoid(W_f x); out: RMS norm of h times silu(W_g x).

    width: size of a token's vector.
    expand: channels of the state over width.
    lower_bound: b, below which no gate forgets; the paper lets it grow with depth from 0 towards 1.
    short_conv: width of the causal convolution before the candidate; 0 for none, as in the paper.
    """

    def __init__(
        self,
        width: PositiveInt,
        expand: PositiveInt = 1,
        lower_bound: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        short_conv: NonNegativeInt = 0,
    ) -> None:
        super().__init__(width, expand * width, 3 * expand * width, short_conv)
        self.lower_bound = lower_bound
        self.norm_weight = nn.Parameter(torch.ones(expand * width))

    def _recur(self, projected: Tensor, h: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        candidate, forget, gate = projected.chunk(3, -1)
        write, log_f = bounded_forget(forget, self.lower_bound)
        hs, h = self._scan(write * F.silu(candidate), log_f, h, mask)
        return F.rms_norm(hs.to(gate.dtype), hs.shape[-1:], self.norm_weight, 1e-6) * F.silu(gate), h


@register(
    "mixer",
    "rg_lru",
    family="recurrent",
    papers=("2402.19427",),
    cases=({}, {"heads": 2, "expand": 2}, {"short_conv": 0, "heads": 1}),
)
class RgLru(ElementwiseMixer):
    """Griffin's recurrent block: a convolved branch through the real-gated linear recurrent unit, times a GELU branch.

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t), log a_t = -8 softplus(Lambda) r_t, sigmoid gates r and i of x_t by
    block-diagonal matrices (eqs. 1 to 4).

    width: size of a token's vector.
    heads: blocks of the gates' matrices, a divisor of expand * width.
    expand: channels of the state over width (the paper's is 4/3 rounded).
    short_conv: width of the causal convolution before the recurrence; 0 for none.
    """

    def __init__(
        self,
        width: PositiveInt,
        heads: PositiveInt = 4,
        expand: PositiveInt = 1,
        short_conv: NonNegativeInt = 4,
    ) -> None:
        inner = expand * width
        super().__init__(width, inner, 2 * inner, short_conv, conv_bias=True)
        block = head_size(inner, heads)
        self.heads = heads
        self.gate_weight = nn.Parameter(torch.randn(heads, block, 2, block) * block**-0.5)
        self.gate_bias = nn.Parameter(torch.zeros(2, inner))
        # a = exp(-8 softplus(Lambda)) at r = 1 starts uniformly in [0.9, 0.999] (section 2.4).
        rate = -torch.empty(inner).uniform_(0.9, 0.999).log() / 8
        self.Lambda = nn.Parameter(torch.log(torch.expm1(rate)))

    def _recur(self, projected: Tensor, h: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        x, branch = projected.chunk(2, -1)
        gates = torch.einsum("bthi,hixo->btxho", x.unflatten(-1, (self.heads, -1)), self.gate_weight).flatten(-2)
        gates = gates + self.gate_bias
        enter, forget = gates.to(working_dtype(gates.dtype)).sigmoid().unbind(2)
        log_decay = -8 * F.softplus(self.Lambda) * forget
        hs, h = self._scan(root_of_rest(log_decay) * enter * x, log_decay, h, mask)
        return hs.to(roomy(branch.dtype)) * F.gelu(branch, approximate="tanh"), h

    def _products(self) -> int:
        return self.inner + self.gate_weight.numel()


def _positive(x: Tensor) -> Tensor:
    """g of minGRU: x + 1/2 where x >= 0, else sigmoid(x)."""
    return torch.where(x >= 0, x + 0.5, x.sigmoid())
