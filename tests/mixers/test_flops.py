"""`flops` against PyTorch's counter, for the first of each mixer's cases.

The counter sees matrix products as they are run: blockwise attention computes blocks that causality or a window leaves
half empty, which `flops` leaves out, so attention may be counted as up to 5.5 times what is foretold at 80 tokens.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from contextlab import registry
from contextlab.testing.mixers import cases
from contextlab.testing.readings import WIDTH

UNSEEN = {"fnet": "Fourier transforms", "lstm": "PyTorch's own LSTM"}
"""What the counter does not count."""
BLOCKWISE = ("softmax", "sparse", "encoder")


@pytest.mark.parametrize("entry", registry.entries("mixer"), ids=lambda entry: entry.name)
def test_flops_are_those_of_the_products_that_are_run(entry: registry.Entry) -> None:
    if entry.name in UNSEEN:
        pytest.skip(f"PyTorch's counter does not see {UNSEEN[entry.name]}")
    mixer = next(iter(cases(entry))).build().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        mixer(torch.randn(1, 80, WIDTH), keep_state=False)
    share = counter.get_total_flops() / mixer.flops(80)
    least, most = (0.9, 5.5) if entry.family in BLOCKWISE else (0.4, 1.6)
    assert least < share < most
