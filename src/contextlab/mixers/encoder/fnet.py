"""FNet."""

from __future__ import annotations

import math

import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab.mixers.convolution import without_padding
from contextlab.mixers.encoder.base import Encoder
from contextlab.ops.linear import working_dtype
from contextlab.ops.long_convolution import fast_size
from contextlab.registry import register


@register("mixer", "fnet", family="encoder", papers=("2105.03824",), cases=({}, {"normalise": False}))
class FNet(Encoder):
    """FNet: the real part of the Fourier transform over tokens and channels, with nothing to learn.

    A padded row is transformed over its real tokens alone, by a chirp: O(T log T) too, and rows may differ in length.

    width: size of a token's vector.
    normalise: divide by sqrt(T width), so that the transform keeps the norm; False is the paper's plain sum, which
        grows with the length and needs a norm after it.
    """

    parallel_form = "Fourier transform"

    def __init__(self, width: PositiveInt, normalise: bool = True) -> None:
        super().__init__(width)
        self.normalise = normalise

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """See `Encoder.mix`."""
        inner = x.to(working_dtype(x.dtype))
        if mask is None:
            return torch.fft.fft2(inner, dim=(1, 2), norm="ortho" if self.normalise else "backward").real.to(x.dtype)
        y = _padded_dft(torch.fft.fft(without_padding(inner, mask), dim=2), mask).real
        if self.normalise:
            y = y * (mask.sum(1).clamp_min(1) * self.width).to(y.dtype).rsqrt()[:, None, None]
        return y.to(x.dtype)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`: of a real two-dimensional FFT, 2.5 n log2 n with n = length x width."""
        values = length * self.width
        return int(2.5 * values * math.log2(values)) + values


def _padded_dft(x: Tensor, mask: Tensor) -> Tensor:
    """The Fourier transform over each row's n real tokens, by Bluestein's chirp, as one convolution for all rows.

    With 2 j k = j^2 + k^2 - (k - j)^2 the sum over j of x_j w^(j k), w = exp(-2 pi i / n), is a convolution with
    w^(-m^2 / 2) between two products with w^(j^2 / 2). x: [B, T, D] complex, zero at padding. Returns the same shape.
    """
    length = mask.shape[1]
    tokens = mask.sum(1, keepdim=True).clamp_min(1)

    def chirp(at: Tensor) -> Tensor:  # the angle's integer part is exact
        angle = (at * at % (2 * tokens)).double() / tokens * -math.pi
        return torch.polar(torch.ones_like(angle), angle).to(x.dtype).unsqueeze(-1)

    turn = chirp(torch.arange(length, device=x.device) - (length - tokens))
    size = fast_size(2 * length)
    lag = torch.arange(size, device=x.device)
    kernel = chirp(torch.minimum(lag, size - lag)).conj()
    spectrum = torch.fft.fft(x * turn, size, 1) * torch.fft.fft(kernel, dim=1)
    return torch.fft.ifft(spectrum, dim=1)[:, :length] * turn
