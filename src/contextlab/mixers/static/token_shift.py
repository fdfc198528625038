"""The token before each token, mixed in."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from contextlab.mixers.base import Mixer
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.layers import Linear, multiplications
from contextlab.mixers.matrix import recurrent
from contextlab.ops.convolution import causal_conv
from contextlab.registry import register
from contextlab.state import RecurrentState, State, own, tensor_bytes


@register("mixer", "token_shift", family="static", papers=("2305.13048",), cases=({}, {"size": 4}))
class TokenShift(Mixer):
    """Token shift (RWKV): each channel is a learned mean of the token and those just before it, then projected.

    y_t = W (x_t + sum_i m_i (x_{t-i} - x_t)), i = 1 .. size - 1, with a weight m_i for each channel; with size 2 the
    linear interpolation of RWKV. It is the smallest memory that a token can have, and the baseline for any other.

    width: size of a token's vector.
    size: tokens that are mixed, the token itself counted; at least 2.
    """

    parallel_form = "convolution"

    def __init__(self, width: PositiveInt, size: Annotated[int, Field(ge=2)] = 2) -> None:
        super().__init__(width)
        # The shares of the tokens before, the oldest first: at the start the last one's runs from 1 to 0 over channels.
        shift = torch.zeros(width, size - 1)
        shift[:, -1] = torch.linspace(1, 0, width)
        self.shift = nn.Parameter(shift)
        self.out_proj = Linear(width, width)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        before = recurrent(state)
        weight = torch.cat((self.shift, 1 - self.shift.sum(1, keepdim=True)), 1)
        last = None if before is None else before["last"]
        y, last = causal_conv(without_padding(x, mask), weight, None, last, keep_state)
        y = self.out_proj(y)
        if last is None:
            return y, None
        return y, RecurrentState({"last": own(last)}, length=x.shape[1] + (0 if before is None else before.length))

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length."""
        return tensor_bytes(batch, *self.shift.shape, dtype=dtype)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        return 2 * length * (multiplications(self.out_proj) + self.shift.numel() + self.width)
