"""The Hadamard transform of vectors of any size, by blocks of powers of two."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


def hadamard(x: Tensor, signs: Tensor | None = None, *, inverse: bool = False) -> Tensor:
    """x H D over the last dimension, where D is diagonal with the signs, and H symmetric and orthogonal.

    H has a Hadamard matrix over its root for each power of two that the size is the sum of, largest first: 96 is 64 and
    32. A block of 2^k numbers takes 2^k (2^(k/2) + 2^(k/2)) multiply-adds, by the matrices of its two halves.

    x: [..., n] float. signs: [n] of 1 and -1, or None for ones. inverse: (H D)^T, which takes it back.
    """
    if inverse and signs is not None:
        x = x * signs
    parts = [_block(part) for part in x.split(blocks_of(x.shape[-1]), -1)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return y if inverse or signs is None else y * signs


def blocks_of(size: int) -> list[int]:
    """The powers of two that a size is the sum of, largest first."""
    return [1 << k for k in reversed(range(size.bit_length())) if size >> k & 1]


def products(size: int) -> int:
    """Multiply-adds of one transform of so many numbers, signs left out."""
    return sum(block * sum(_halves(block)) for block in blocks_of(size) if block > 1)


def _halves(block: int) -> tuple[int, int]:
    power = block.bit_length() - 1
    return 1 << power // 2, 1 << power - power // 2


def _block(x: Tensor) -> Tensor:
    if x.shape[-1] == 1:
        return x
    left, right = _halves(x.shape[-1])
    parts = x.unflatten(-1, (left, right))
    first, last = (_matrix(size, x.dtype, x.device) for size in (left, right))
    return (first @ (parts @ last)).flatten(-2)


def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.from_numpy(_signs(size)).to(device=device, dtype=dtype) * size**-0.5


@lru_cache(maxsize=64)
def _signs(size: int) -> Any:
    """Sylvester's matrix, [size, size] float64 of NumPy: a sign is the parity of the bits that row and column share."""
    signs = np.ones((1, 1))
    while len(signs) < size:
        signs = np.block([[signs, signs], [signs, -signs]])
    return signs
