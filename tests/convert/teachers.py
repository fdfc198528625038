"""Small models to be converted, in float64 with noise on every parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contextlab.models import Model, ModelSpec
from contextlab.testing.models import noisy

SYMBOLS = 12


def teacher(
    depth: int = 2, position: str = "rope", norm: str = "rms", mixer: str = "attention", **options: Any
) -> Model:
    """Attention of width 16 with 4 heads; options: of the mixer."""
    spec = {
        "width": 16, "depth": depth, "heads": 4, "mlp_ratio": 2, "position": position, "max_length": 64, "norm": norm,
        "layers": [{"mixer": mixer, "options": options}], "read_in": "token", "input_size": SYMBOLS,
        "output_size": SYMBOLS,
    }  # fmt: skip
    return noisy(ModelSpec.parse(spec)).eval()


def tokens(length: int = 20, batch: int = 2, seed: int = 0) -> Tensor:
    """[batch, length] int64."""
    return torch.randint(SYMBOLS, (batch, length), generator=torch.Generator().manual_seed(seed))


def same(one: Model, other: Model, tolerance: float = 1e-9, length: int = 20) -> None:
    """Both answer alike, whole and token by token, within a part of the largest answer."""
    x = tokens(length)
    with torch.no_grad():
        expected, state, steps = one(x), None, []
        for token in x.split(1, 1):
            y, state = other.read(token, state)
            steps.append(y)
        for got in (other(x), torch.cat(steps, 1)):
            assert float((got - expected).abs().max() / expected.abs().max()) < tolerance
