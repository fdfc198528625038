"""Weights and activations rounded to few values, and gradients that pass straight through.

The small floating-point formats are those of the OCP Microscaling Formats specification, version 1.0, section 5.3:
E2M1 has the sizes 0, 0.5, 1, 1.5, 2, 3, 4 and 6; E8M0 powers of two; E4M3 is PyTorch's `float8_e4m3fn`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The sizes of a 4-bit float; its code is their place here, plus 8 where it is negative."""
E2M1_MOST = 6.0
E4M3_MOST = 448.0
E4M3_LEAST = 2.0**-6
"""The smallest normal number of E4M3."""


def straight_through(value: Tensor, like: Tensor) -> Tensor:
    """`value`, with the gradient going to `like` as if they were one (1308.3432). Both [...], of one shape."""
    return like + (value - like).detach()


def absmean(weight: Tensor) -> Tensor:
    """[]: the mean size of a weight's numbers [O, I], the scale of ternary weights (2402.17764, eq. 1-3)."""
    return weight.abs().mean().clamp_min(1e-5)


def ternary(weight: Tensor, scale: Tensor) -> Tensor:
    """A weight [O, I] over its scale, rounded to the nearest of -1, 0, 1 (2402.17764, eq. 1-2)."""
    return (weight / scale).round().clamp(-1, 1)


def int8_of_tokens(x: Tensor) -> Tensor:
    """x [..., D] rounded to 127 steps of each token's largest size, with gradients as if it had not been.

    It is the 8-bit rounding of activations of 2402.17764.
    """
    step = x.detach().abs().amax(-1, keepdim=True).clamp_min(1e-5) / 127
    return straight_through((x / step).round() * step, x)


def noise_of(weight: Tensor, seed: int) -> Tensor:
    """Numbers from 0 to 1, float32 [...], for the stochastic rounding of a weight [...].

    They are a hash of each number's bits, its place and the seed. So no generator has to be kept: whoever computes
    a layer again (a checkpoint in the backward pass, a run that goes on) rounds as before, and as soon as a step
    has changed a number it gets another draw.
    """
    wide = weight.detach().to(torch.float64).contiguous().view(torch.int64)
    place = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
    x = wide ^ (place * -7046029254386353131) ^ (seed * 3935559000370003845 % 2**63)
    # The finaliser of splitmix64; a shift to the right must bring in zeros, and PyTorch's brings in the sign.
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ (x >> shift & (1 << (64 - shift)) - 1)) * factor
    x = x ^ (x >> 31 & (1 << 33) - 1)
    return ((x >> 11 & (1 << 53) - 1).to(torch.float64) * 2.0**-53).to(torch.float32)


def e2m1_codes(x: Tensor, noise: Tensor | None = None) -> Tensor:
    """The codes of 4-bit floats, uint8 [...], of x [...]; what is beyond 6 becomes 6.

    noise: [...] in [0, 1): x is rounded up with a probability of its place between its neighbours (2303.17951 and
        the papers on training in FP4), so that it is right on average. None: to the nearest, of two the even code.
    """
    size = x.abs().clamp_max(E2M1_MOST)
    levels = torch.tensor(E2M1, dtype=x.dtype, device=x.device)
    if noise is None:
        code = torch.zeros_like(x, dtype=torch.uint8)
        for low, (under, over) in enumerate(pairwise(E2M1)):
            middle = (under + over) / 2
            code += (size > middle) if low % 2 == 0 else (size >= middle)
    else:
        under_it = (torch.bucketize(size, levels, right=True) - 1).clamp_max(len(E2M1) - 2)
        share = (size - levels[under_it]) / (levels[under_it + 1] - levels[under_it])
        code = (under_it + (noise < share)).to(torch.uint8)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def e2m1_values(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers [...] of codes uint8 [...]."""
    levels = torch.tensor((*E2M1, *(-size for size in E2M1)), dtype=dtype, device=codes.device)
    return levels[codes.long()]


def e4m3_codes(x: Tensor, noise: Tensor | None = None) -> Tensor:
    """The bits of 8-bit floats E4M3, uint8 [...], of x [...]; what is beyond 448 becomes 448.

    noise: as of `e2m1_codes`.
    """
    x = x.clamp(-E4M3_MOST, E4M3_MOST)
    if noise is not None:
        exponent = torch.frexp(x.abs().clamp_min(E4M3_LEAST))[1] - 1
        step = torch.exp2((exponent - 3).to(x.dtype))  # three bits of mantissa
        steps = x / step
        x = ((steps.floor() + (noise < steps - steps.floor())) * step).clamp(-E4M3_MOST, E4M3_MOST)
    return x.to(torch.float32).to(torch.float8_e4m3fn).view(torch.uint8)


def e4m3_values(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers [...] of codes uint8 [...].

    Shifted into a float16 the bits are the numbers over 2^8; casts from float8 are slow on a CPU.
    """
    bits = codes.to(torch.int16)
    return ((bits & 0x80) << 8 | (bits & 0x7F) << 7).view(torch.float16).to(dtype) * 2**8


def e8m0_codes(largest: Tensor) -> Tensor:
    """The scales of blocks of 4-bit floats, uint8 [...], from the largest size in each [...].

    The scale is 2^(floor(log2 largest) - 2), as 2 is the exponent of E2M1's largest number (OCP MX 1.0, section
    6.3); the code is its exponent plus 127. A block of zeros gets the smallest scale.
    """
    exponent = torch.frexp(largest)[1] - 1 - 2
    return torch.where(largest > 0, (exponent + 127).clamp(0, 254), 0).to(torch.uint8)


def e8m0_values(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The powers of two [...] of codes uint8 [...]."""
    return torch.ldexp(torch.ones_like(codes, dtype=dtype), codes.to(torch.int32) - 127)
