"""Inverses of unit lower-triangular matrices, computed at once and as exported programs have them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from contextlab.ops.triangular import unit_lower_inverse


class Inverse(nn.Module):
    def forward(self, A: Tensor) -> Tensor:
        return unit_lower_inverse(A)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 33])
def test_exported_programs_invert_without_a_triangular_solve(size: int) -> None:
    """ONNX has none. What is on and above the diagonal is ignored."""
    A = torch.randn(3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 4
    expected = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + A.tril(-1))
    torch.testing.assert_close(unit_lower_inverse(A), expected, rtol=1e-9, atol=1e-9)
    program = torch.export.export(Inverse(), (A,))
    assert "triangular" not in str(program.graph)
    torch.testing.assert_close(program.module()(A), expected, rtol=1e-9, atol=1e-9)
