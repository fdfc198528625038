"""S4D against its recurrence, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers import S4D, build_mixer


@pytest.mark.parametrize("length", [1, 20, 150])
def test_is_the_discretised_system(length: int) -> None:
    torch.manual_seed(0)
    mixer = S4D(8, state_size=6).double()
    x = torch.randn(2, length, 8, dtype=torch.float64)
    A = torch.complex(-mixer.A_log.exp(), mixer.A_imaginary)
    decay = (mixer.log_dt.exp() * A).exp()
    u, C = mixer.in_proj(x), torch.view_as_complex(mixer.C.contiguous())
    h, ys = torch.zeros(2, 8, 3, dtype=torch.complex128), []
    for t in range(length):
        h = decay * h + (decay - 1) / A * u[:, t, :, None]
        ys.append(2 * (C * h).sum(-1).real + mixer.D * u[:, t])
    expected = F.glu(mixer.out_proj(F.gelu(torch.stack(ys, 1))), -1)
    y, state = mixer(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.view_as_complex(state["h"]), h, rtol=1e-9, atol=1e-10)


def test_starts_as_s4d_lin() -> None:
    mixer = S4D(4, state_size=8)
    torch.testing.assert_close(mixer.A_log.exp(), torch.full((4, 4), 0.5))
    torch.testing.assert_close(mixer.A_imaginary[0], math.pi * torch.arange(4.0))


def test_odd_states_are_refused() -> None:
    with pytest.raises(InputError, match="8 is nearest"):
        build_mixer("s4d", width=8, state_size=7)
