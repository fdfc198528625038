"""Static mixers: which tokens are mixed, and with what weights, does not depend on what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import repeat
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from contextlab.mixers.base import Mixer
from contextlab.mixers.convolution import ShortConv, without_padding
from contextlab.mixers.layers import Linear, in_dtype_of, multiplications, project_wide
from contextlab.ops.linear import working_dtype
from contextlab.ops.long_convolution import fast_size, long_convolution
from contextlab.ops.precision import roomy, with_room
from contextlab.registry import register
from contextlab.state import State, own, tensor_bytes


@dataclass
class HyenaState(State):
    """What Hyena remembers: the inputs of its convolutions.

    past: the short convolution's last inputs [B, W-1, C], if there is one; then of each long convolution the inputs
        that its filter reaches, [B, n, D], where n grows with the tokens read up to filter_length - 1.
    """

    past: list[Tensor] = field(default_factory=list)


@register(
    "mixer",
    "hyena",
    family="static",
    papers=("2302.10866",),
    cases=(
        {"filter_length": 200},
        {"filter_length": 20, "order": 3, "bands": 2},
        {"filter_length": 1, "short_conv": 0, "filter_width": 8},
        {"filter_length": 64, "order": 4, "short_conv": 2, "filter_width": 5, "frequency": 1.0},
    ),
)
class Hyena(Mixer):
    """Hyena: products of the token with long convolutions, whose filters a small network makes from the lag.

    z_1 = x_1 v, z_n = x_n (h_n conv z_{n-1} + d_n z_{n-1}) for n = 2 .. order, y = W z_order (the first of
    the paper's filters is the short convolution alone, as in the authors' code, so that order 2 is q (h conv (k v))).
    A filter is h(j) = window(j) FFN(features of j), window exp(-a j) + b with another a for each channel.
    FFT convolutions take O(T log T) for a sequence. One token alone costs O(filter_length), and makes the filters anew.

    width: size of a token's vector.
    order: gates, so that there are order - 1 long convolutions; at least 2.
    filter_length: tokens that a filter spans, the token itself counted; what is older is forgotten.
    filter_width: hidden size of the network that makes the filters.
    bands: frequencies of the lag's features, cos and sin of 2 pi k j / filter_length, k = 1 .. bands, beside j itself.
    frequency: of the network's sines at the start; a high one allows filters that change fast with the lag.
    short_conv: width of the causal convolution over all projections; 0 for none.
    """

    parallel_form = "convolution"
    FAST, SLOW, FLOOR = 0.3, 1.5, 0.05  # share of the filter at which the windows have fallen to 0.01; b
    rates: Tensor

    def __init__(
        self,
        width: PositiveInt,
        order: Annotated[int, Field(ge=2)] = 2,
        filter_length: PositiveInt = 1024,
        filter_width: PositiveInt = 64,
        bands: PositiveInt = 8,
        frequency: PositiveFloat = 10.0,
        short_conv: NonNegativeInt = 3,
    ) -> None:
        super().__init__(width)
        self.order, self.filter_length, self.bands = order, filter_length, bands
        self.in_proj = Linear(width, (order + 1) * width)
        self.conv = ShortConv((order + 1) * width, short_conv) if short_conv else None
        self.filter_in = Linear(1 + 2 * bands, filter_width, bias=True)
        self.filter_inner = nn.ModuleList(Linear(filter_width, filter_width, bias=True) for _ in range(2))
        self.filter_out = Linear(filter_width, (order - 1) * width)
        self.frequency = nn.Parameter(torch.full((filter_width,), frequency))
        self.skip = nn.Parameter(torch.randn(order - 1, width))
        self.out_proj = Linear(width, width)
        rates = torch.linspace(-math.log(0.01) / self.SLOW, -math.log(0.01) / self.FAST, width)
        self.register_buffer("rates", rates, persistent=False)
        with torch.no_grad():  # so that a filter's norm starts near 1 however long it is
            lags = torch.arange(filter_length)
            self.filter_out.weight.div_(self._window(lags).norm(dim=0).repeat(order - 1).unsqueeze(1))

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        read = x.shape[1] + (0 if state is None else state.length)
        before = iter(state.past) if isinstance(state, HyenaState) else repeat(None)
        z, after = self.in_proj(without_padding(x, mask)), []
        if self.conv is not None:
            z, last = self.conv(z, next(before), keep_state)
            after.append(last)
        z, *gates = with_room(z).chunk(self.order + 1, -1)
        # One lag more than was read, when the filter has it: then the state keeps all that was read.
        filters = self.filters(min(self.filter_length, read + 1))
        for gate, filter, skip, past in zip(gates, filters, self.skip, before, strict=False):
            z = gate * z
            y, last = long_convolution(z, filter, past, keep_state)
            z = y + skip * z
            after.append(last)
        y = project_wide(gates[-1] * z, self.out_proj, x.dtype)
        return y, HyenaState([own(past) for past in after], length=read) if keep_state else None

    def filters(self, lags: int) -> Tensor:
        """The filters at lags 0 .. lags - 1: [order - 1, width, lags]."""
        at, work = torch.arange(lags, device=self.rates.device), working_dtype(self.rates.dtype)
        position = at.to(work).unsqueeze(1) / self.filter_length
        angles = 2 * math.pi * position * torch.arange(1, self.bands + 1, device=at.device)
        h = torch.cat((position, angles.cos(), angles.sin()), 1)
        with torch.autocast(at.device.type, enabled=False):  # a sine of high frequency needs the digits
            for layer in (self.filter_in, *self.filter_inner):
                h = torch.sin(self.frequency.to(work) * in_dtype_of(h, layer))
            h = in_dtype_of(h, self.filter_out)
        return (h.unflatten(1, (self.order - 1, -1)) * self._window(at).unsqueeze(1)).permute(1, 2, 0)

    def _window(self, lags: Tensor) -> Tensor:
        """[lags, width], from 1 + b down."""
        rates = self.rates.to(working_dtype(self.rates.dtype))
        return torch.exp(-rates * lags.to(rates.dtype).unsqueeze(1) / self.filter_length) + self.FLOOR

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: grows with the tokens read until the filters are full.

        Products are kept in float32 where tokens are of float16, which does not hold them.
        """
        reach = min(length, self.filter_length - 1)
        past = tensor_bytes(self.order - 1, batch, reach, self.width, dtype=roomy(dtype))
        return past + (0 if self.conv is None else self.conv.state_nbytes(batch, dtype))

    def flops(self, length: int) -> int:
        """See `Mixer.flops`; two real FFTs a channel, of 2.5 n log2 n each, and the making of the filters."""
        lags = min(self.filter_length, length + 1)
        network = (self.filter_in, *self.filter_inner, self.filter_out)
        made = 2 * lags * sum(multiplications(layer) for layer in network)
        size = fast_size(length + lags)
        transforms = (self.order - 1) * self.width * int(2 * 2.5 * size * math.log2(size))
        projections = multiplications(self.in_proj) + multiplications(self.out_proj)
        projections += 0 if self.conv is None else self.conv.weight.numel()
        return 2 * length * projections + made + transforms
