"""Gates whose logarithms, roots and powers keep their digits, and their gradients, where the gate is shut or open."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.ops.linear import working_dtype

SLOW = -20.0
"""Below it softplus(x) is exp(x) (1 - exp(x) / 2) to the last digit of float64."""


def bounded_forget(x: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """1 - f and log f of the forget gate f = bound + (1 - bound) sigmoid(x).

    log1p of minus the first, which rounds to 1 where the gate is shut, would be -inf there, its gradient NaN.
    x: [...]. bound: at least 0, below 1. Returns [...] each, in the dtype of x.
    """
    write = (1 - bound) * (-x).sigmoid()
    if bound == 0:
        return write, F.logsigmoid(x)
    shut = (bound + (1 - bound) * x.to(working_dtype(x.dtype)).sigmoid()).log().to(x.dtype)
    return write, torch.where(write > 0.5, shut, torch.log1p(-write.clamp_max(0.5)))


def softplus_power(x: Tensor, power: Tensor) -> Tensor:
    """softplus(x) ** power, with a gradient also where the softplus is zero in the dtype.

    x, power: [...], power at least 0. Returns [...] in the dtype of x.
    """
    wide = x.to(working_dtype(x.dtype))
    low = wide.clamp_max(SLOW)
    log = torch.where(wide < SLOW, low - low.exp() / 2, F.softplus(wide.clamp_min(SLOW)).log())
    return (power.to(wide.dtype) * log).exp().to(x.dtype)


def root_of_rest(log_decay: Tensor) -> Tensor:
    """sqrt(1 - exp(log_decay)^2), whose gradient is finite also where nothing decays.

    log_decay: [...], at most 0. Returns the same shape and dtype.
    """
    return (-torch.expm1(2 * log_decay)).clamp_min(torch.finfo(log_decay.dtype).tiny).sqrt()


FASTEST = math.log(1e4)


def exp_of_decay(z: Tensor) -> Tensor:
    """exp(z) of a decay rate, at most 1e4: what decays so fast is zero in every dtype, and no dtype overflows.

    z: [...]. Returns the same shape and dtype.
    """
    return z.clamp_max(FASTEST).exp()
