"""Precision: recurrences and lengths are computed in float32 at least, whatever autocast is on around them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: autocast is off inside `function`, on the device of its first tensor.

    Sums over a whole stream lose their digits in half precision, and products that autocast rounds do not fit the
    float32 states that they are added to.
    """

    @wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if first is None or not torch.is_autocast_enabled(first.device.type):
            return function(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return exact


@without_autocast
def wide_einsum(equation: str, *tensors: Tensor) -> Tensor:
    """torch.einsum in the tensors' own dtype, whatever autocast is on around it: for what is read from a state.

    tensors: of any shapes that the equation fits, such as [B, T, D].
    """
    return torch.einsum(equation, *tensors)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least float32: the dtype in which states, sums and lengths are computed and kept."""
    return torch.promote_types(dtype, torch.float32)


def roomy(dtype: torch.dtype) -> torch.dtype:
    """float32 for float16, which ends at 65504; any other dtype as it is.

    In what products, or sums over a stream, are held until they are normalised or projected.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def with_room(x: Tensor) -> Tensor:
    """x [...] in the dtype that `roomy` gives."""
    return x.to(roomy(x.dtype))


def unit_length(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|^2 + eps) over the last dimension, computed in float32 at least; zero stays zero.

    x: [..., D], any floating dtype, which the result keeps. eps: in float16 at least 1e-6, or the slope at zero, which
    is eps^-0.5, could not be held.
    """
    if x.dtype == torch.float16:
        eps = max(eps, 1e-6)
    wide = x.to(working_dtype(x.dtype))
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
