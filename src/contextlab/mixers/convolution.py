"""The short causal convolution that mixers put before their state."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.ops.convolution import causal_conv
from contextlab.state import tensor_bytes

MOST_TAPS = 4096
"""Tokens that a short convolution reads at most: its time and its state grow with them at every token."""


class ShortConv(nn.Module):
    """Causal depthwise convolution over the last `size` tokens, initialised as nn.Conv1d.

    channels: C. size: W, from 1 to 4096. bias: whether each channel has one.
    """

    def __init__(self, channels: int, size: int, bias: bool = False) -> None:
        super().__init__()
        if size > MOST_TAPS:
            raise InputError(f"a short convolution over {size} tokens: at most {MOST_TAPS}; 'hyena' reads all")
        self.weight = nn.Parameter(torch.empty(channels, size).uniform_(-(size**-0.5), size**-0.5))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(
        self, x: Tensor, before: Tensor | None, keep: bool, activation: Literal["silu"] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x: [B, T, C]. before: the W-1 inputs read before or None. Returns y and the last W-1 if `keep`."""
        return causal_conv(x, self.weight, self.bias, before, keep, activation)

    def state_nbytes(self, batch: int, dtype: torch.dtype) -> int:
        """Bytes of the inputs that it keeps."""
        return tensor_bytes(batch, self.weight.shape[1] - 1, self.weight.shape[0], dtype=dtype)


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, T, ...] with zeros at padding, whatever stood there."""
    if mask is None:
        return x
    return x.masked_fill(~mask.view(*mask.shape, *(1,) * (x.ndim - 2)), 0)
