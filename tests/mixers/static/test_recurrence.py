"""Static mixers by their definitions, token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.mixers.recurrence import agrees, convolved, every_case, linear, recurrence


@recurrence("token_shift")
def token_shift(mixer: Any, x: Tensor) -> Tensor:
    """2305.13048, eqs. 11 to 13, for any number of tokens: x_t + sum over i of m_i (x_(t - i) - x_t), projected."""
    size, rows = mixer.given.get("size", 2), []
    for t in range(len(x)):
        mixed = x[t].clone()
        for i in range(1, size):
            before = x[t - i] if t >= i else torch.zeros_like(x[t])
            mixed += mixer.shift[:, -i] * (before - x[t])
        rows.append(mixed)
    return linear(mixer.out_proj, torch.stack(rows))


@recurrence("hyena")
def hyena(mixer: Any, x: Tensor) -> Tensor:
    """2302.10866, definition 3.1 and eq. 6: z_n = x_n (h_n conv z_(n-1) + d_n z_(n-1)), h of sines."""
    given, width = mixer.given, mixer.width
    order, size, bands = given.get("order", 2), given["filter_length"], given.get("bands", 8)
    z, *gates = convolved(mixer.conv, linear(mixer.in_proj, x), activation=False).split(width, 1)
    log_hundredth = math.log(100)
    rates = torch.linspace(log_hundredth / 1.5, log_hundredth / 0.3, width, dtype=x.dtype)
    filters = []
    for lag in range(min(size, len(x))):
        angles = [2 * math.pi * n * lag / size for n in range(1, bands + 1)]
        h = torch.tensor([lag / size, *map(math.cos, angles), *map(math.sin, angles)], dtype=x.dtype)
        for layer in (mixer.filter_in, *mixer.filter_inner):
            h = (mixer.frequency * linear(layer, h)).sin()
        filters.append(linear(mixer.filter_out, h).view(order - 1, width) * ((-rates * lag / size).exp() + 0.05))
    for n in range(order - 1):
        z = gates[n] * z
        y = mixer.skip[n] * z
        for t in range(len(x)):
            for lag in range(min(t + 1, size)):
                y[t] += filters[lag][n] * z[t - lag]
        z = y
    return linear(mixer.out_proj, gates[-1] * z)


@every_case("static")
def test_agrees_with_the_definition(name: str, options: Mapping[str, Any]) -> None:
    agrees(name, options)
