"""Recurrences with an elementwise state: HGRN, minGRU, minLSTM, Griffin's RG-LRU, and Mamba's selective scan."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.mixers.base import Mixer, head_size
from contextlab.mixers.convolution import ShortConv, without_padding
from contextlab.mixers.delta import initial_dt_bias
from contextlab.mixers.layers import Linear, TernaryLinear
from contextlab.mixers.linear import recurrent
from contextlab.ops.linear import working_dtype
from contextlab.ops.scan import linear_scan, selective_scan
from contextlab.registry import register
from contextlab.state import RecurrentState, State, own, tensor_bytes


class ElementwiseMixer(Mixer):
    """Base: project in, maybe convolve, recur h_t = exp(g_t) h_{t-1} + x_t in each channel, project out.

    width: size of a token's vector. inner: C, channels of the state. projected: outputs of the projection in.
    short_conv: width of the causal convolution over the first C of them; 0 for none. conv_bias: whether it has one.
    """

    parallel_form = "scan"

    activation: ClassVar[Literal["silu"] | None] = None  # of the convolution

    def __init__(self, width: int, inner: int, projected: int, short_conv: int = 0, conv_bias: bool = False) -> None:
        super().__init__(width)
        self.inner = inner
        self.in_proj = Linear(width, projected)
        self.conv = ShortConv(inner, short_conv, bias=conv_bias) if short_conv else None
        self.out_proj = Linear(inner, width)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. Padding writes zero, so that the state stays as it started."""
        before, dtype = recurrent(state), x.dtype
        projected, conv = self.in_proj(without_padding(x, mask)), None
        if self.conv is not None:
            first, rest = projected.split((self.inner, projected.shape[-1] - self.inner), -1)
            first, conv = self.conv(first, None if before is None else before["conv"], keep_state, self.activation)
            projected = torch.cat((first, rest), -1)
        y, h = self._recur(projected, None if before is None else before["h"], mask)
        y = self.out_proj(y.to(dtype))
        if not keep_state:
            return y, None
        memory = {"h": own(h)}
        if conv is not None:
            memory["conv"] = own(conv)
        return y, RecurrentState(memory, length=x.shape[1] + (0 if before is None else before.length))

    @abstractmethod
    def _recur(self, projected: Tensor, h: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """From the projection [B, T, ...] and the state: what is projected out [B, T, C], and the new state."""

    def _scan(self, write: Tensor, log_decay: Tensor, h: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """h_t = exp(log_decay_t) h_{t-1} + write_t in float32 at least."""
        work = working_dtype(write.dtype)
        write = without_padding(write, mask).to(work)
        if write.shape[1] == 0:
            return write, torch.zeros_like(write[:, :1].sum(1)) if h is None else h
        return linear_scan(write, log_decay.to(work), h)

    def _state_shape(self) -> tuple[int, ...]:
        return (self.inner,)

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length; h is kept in float32 at least."""
        h = tensor_bytes(batch, *self._state_shape(), dtype=working_dtype(dtype))
        return h + (0 if self.conv is None else self.conv.state_nbytes(batch, dtype))

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        products = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        products += 0 if self.conv is None else self.conv.weight.numel()
        return 2 * length * (products + self._products())

    def _products(self) -> int:
        """Multiply-adds a token beside the projections and the convolution."""
        return self.inner


@register(
    "mixer",
    "min_gru",
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


@register("mixer", "mlgru", papers=("2406.02528",), cases=({}, {"expand": 2, "short_conv": 4}))
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
            self.in_proj = TernaryLinear(width, 3 * expand * width)
            self.out_proj = TernaryLinear(expand * width, width)

    def _recur(self, projected: Tensor, h: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        candidate, forget, gate = projected.chunk(3, -1)
        h_all, h = self._scan((-forget).sigmoid() * F.silu(candidate), F.logsigmoid(forget), h, mask)
        return h_all * gate.sigmoid(), h


@register(
    "mixer",
    "hgrn",
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
        write = (1 - self.lower_bound) * (-forget).sigmoid()  # 1 - f
        hs, h = self._scan(write * F.silu(candidate), torch.log1p(-write), h, mask)
        return F.rms_norm(hs.to(gate.dtype), hs.shape[-1:], self.norm_weight, 1e-6) * F.silu(gate), h


@register(
    "mixer",
    "rg_lru",
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
        enter, forget = (gates + self.gate_bias).sigmoid().unbind(2)
        log_decay = -8 * F.softplus(self.Lambda) * forget
        hs, h = self._scan((-torch.expm1(2 * log_decay)).sqrt() * enter * x, log_decay, h, mask)
        return hs.to(branch.dtype) * F.gelu(branch, approximate="tanh"), h

    def _products(self) -> int:
        return self.inner + self.gate_weight.numel()


@register(
    "mixer",
    "mamba",
    papers=("2312.00752",),
    cases=({"state_size": 4}, {"state_size": 3, "expand": 1, "dt_rank": 2, "short_conv": 3}, {"short_conv": 0}),
)
class Mamba(ElementwiseMixer):
    """Mamba: a diagonal state-space model whose step size, writing and reading depend on the token.

    width: size of a token's vector.
    state_size: N, values of the state in each channel.
    expand: channels over width.
    dt_rank: rank of the map to the step sizes; default width / 16, rounded up.
    short_conv: width of the causal convolution before the scan; 0 for none.
    """

    family = "state space"
    activation = "silu"

    def __init__(
        self,
        width: PositiveInt,
        state_size: PositiveInt = 16,
        expand: PositiveInt = 2,
        dt_rank: PositiveInt | None = None,
        short_conv: NonNegativeInt = 4,
    ) -> None:
        inner = expand * width
        super().__init__(width, inner, 2 * inner, short_conv, conv_bias=True)
        self.state_size, self.dt_rank = state_size, math.ceil(width / 16) if dt_rank is None else dt_rank
        self.x_proj = Linear(inner, self.dt_rank + 2 * state_size)
        self.dt_proj = Linear(self.dt_rank, inner, bias=True)
        with torch.no_grad():
            self.dt_proj.bias.copy_(initial_dt_bias(inner))
        self.A_log = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))

    def _recur(self, projected: Tensor, h: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        x, gate = projected.chunk(2, -1)
        x = without_padding(x if self.conv is not None else F.silu(x), mask)
        low, B, C = self.x_proj(x).split((self.dt_rank, self.state_size, self.state_size), -1)
        y, h = selective_scan(x, F.softplus(self.dt_proj(low)), -self.A_log.exp(), B, C, self.D, h, True)
        assert h is not None
        return y * F.silu(gate), h

    def _state_shape(self) -> tuple[int, ...]:
        return (self.inner, self.state_size)

    def _products(self) -> int:
        return self.x_proj.weight.numel() + self.dt_proj.weight.numel() + 3 * self.inner * self.state_size


def _positive(x: Tensor) -> Tensor:
    """g of minGRU: x + 1/2 where x >= 0, else sigmoid(x)."""
    return torch.where(x >= 0, x + 0.5, x.sigmoid())
