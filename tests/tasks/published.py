"""What public generators draw, as figures that were measured once, and how ours are held to them."""

from __future__ import annotations

import torch
from torch import Tensor

Figure = tuple[float, float, int]
"""Mean, standard deviation and number of what a public generator drew."""


def hold(name: str, own: Tensor, public: Figure, spread: float = 0.15) -> None:
    """Independent draws of ours against a public figure: the means within five standard errors of their difference.

    spread: by how much of itself the standard deviation may differ.
    """
    mean, deviation, count = public
    values = own.double().flatten()
    error = deviation * (1 / count + 1 / len(values)) ** 0.5
    assert abs(values.mean().item() - mean) <= 5 * error + 1e-5 * max(1.0, abs(mean)), (
        name,
        values.mean().item(),
        mean,
        error,
    )
    found = torch.std(values).item()
    assert abs(found - deviation) <= spread * deviation + 1e-5, (name, found, deviation)
