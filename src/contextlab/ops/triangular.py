"""Inverses of unit lower-triangular matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def unit_lower_inverse(A: Tensor, base: int = 16) -> Tensor:
    """(I + A)^-1 of strictly lower triangular A [..., L, L], by halves.

    The inverse of [[P, 0], [C, Q]] is [[P^-1, 0], [-Q^-1 C P^-1, Q^-1]].

    base: block size at which a triangular solve is the faster way. What is on and above A's diagonal is
        ignored.
    """
    size = A.shape[-1]
    if size <= base:
        if torch.compiler.is_exporting():  # ONNX has no triangular solve
            return _by_powers(A.tril(-1))
        eye = torch.eye(size, dtype=A.dtype, device=A.device)
        # From the right: half the time of X from A X = I.
        return torch.linalg.solve_triangular(A, eye, upper=False, left=False, unitriangular=True)
    half = size // 2
    top = unit_lower_inverse(A[..., :half, :half], base)
    low = unit_lower_inverse(A[..., half:, half:], base)
    corner = -(low @ (A[..., half:, :half] @ top))
    return torch.cat((F.pad(top, (0, size - half)), torch.cat((corner, low), -1)), -2)


def _by_powers(A: Tensor) -> Tensor:
    """(I + A)^-1 = (I - A) (I + A^2) (I + A^4) ..., which ends, as A^L = 0."""
    inverse = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device) - A
    power, exponent = A @ A, 2
    while exponent < A.shape[-1]:
        inverse = inverse + inverse @ power
        power, exponent = power @ power, 2 * exponent
    return inverse
