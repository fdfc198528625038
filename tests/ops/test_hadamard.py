"""The transform against Sylvester's matrix, of any size."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from contextlab.ops.hadamard import blocks_of, hadamard, products


def sylvester(size: int) -> torch.Tensor:
    parity = [[(i & j).bit_count() % 2 for j in range(size)] for i in range(size)]
    return 1 - 2 * torch.tensor(parity, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 8, 23, 96])
def test_it_is_sylvesters_matrix_block_by_block(size: int) -> None:
    wanted = torch.block_diag(*(sylvester(b) * b**-0.5 for b in blocks_of(size)))
    x = torch.randn(3, 2, size, dtype=torch.float64)
    signs = torch.randint(2, (size,)).double() * 2 - 1
    torch.testing.assert_close(hadamard(x), x @ wanted)
    torch.testing.assert_close(hadamard(x, signs), x @ wanted * signs)
    torch.testing.assert_close(hadamard(hadamard(x, signs), signs, inverse=True), x)
    assert sum(blocks_of(size)) == size
    with FlopCounterMode(display=False) as counter:
        hadamard(torch.randn(1, size))
    assert counter.get_total_flops() == 2 * products(size)
