"""Long causal depthwise convolution, by the FFT."""

from __future__ import annotations

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.ops.linear import working_dtype
from contextlab.state import own


def long_convolution(
    x: Tensor, filters: Tensor, initial_state: Tensor | None = None, output_final_state: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Each channel's sum over its last L tokens, y_t = sum_{j < L} filters[:, j] x_{t-j}, in O(T log T).

    By the FFT (Hyena, 2302.10866), in float32 at least; one token alone by its sum. Memory is linear in T.

    x: [B, T, C].
    filters: [C, L], by lag: column 0 weighs the token itself.
    initial_state: [B, n, C], the last tokens read before, oldest first, or None.
    output_final_state: also return the last L - 1 tokens, or all that were read when these are fewer.

    Returns (y [B, T, C], final state [B, n, C] in a buffer of its own, or None).
    """
    if filters.ndim != 2 or filters.shape[0] != x.shape[-1] or filters.shape[1] < 1:
        raise InputError(f"long_convolution: expected filters [{x.shape[-1]}, L], got {list(filters.shape)}")
    work = working_dtype(x.dtype)
    tokens = x if initial_state is None else torch.cat((initial_state.to(x.dtype), x), 1)
    length, read = x.shape[1], tokens.shape[1]
    taps = filters[:, :read].to(work)
    if length == 1:
        y = (tokens[:, -taps.shape[1] :].flip(1).to(work) * taps.T).sum(1, keepdim=True)
    else:
        # The circle is long enough for what wraps around to fall on the tokens read before.
        size = fast_size(max(read, length + taps.shape[1] - 1))
        spectrum = torch.fft.rfft(tokens.to(work).transpose(1, 2), size) * torch.fft.rfft(taps, size)
        y = torch.fft.irfft(spectrum, size)[..., read - length : read].transpose(1, 2)
    last = own(tokens[:, max(0, read - filters.shape[1] + 1) :]) if output_final_state else None
    return y.to(x.dtype), last


def naive_long_convolution(x: Tensor, filters: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition of `long_convolution`, token by token.

    Arguments as there. Returns y [B, T, C] and the inputs that the filter reaches [B, n, C].
    """
    tokens = x if initial_state is None else torch.cat((initial_state, x), 1)
    before = tokens.shape[1] - x.shape[1]
    ys = []
    for t in range(before, tokens.shape[1]):
        lags = range(min(t + 1, filters.shape[1]))
        ys.append(sum((filters[:, j] * tokens[:, t - j] for j in lags), torch.zeros_like(tokens[:, t])))
    return torch.stack(ys, 1), tokens[:, max(0, tokens.shape[1] - filters.shape[1] + 1) :]


def fast_size(least: int) -> int:
    """The smallest 2^k or 3 x 2^k that is at least `least`: sizes at which FFTs are fast."""
    power = 1 << max(0, least - 1).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= least else power
