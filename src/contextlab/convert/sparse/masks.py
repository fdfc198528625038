"""Which weights stay: the largest scores of each group, or n of each m."""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import Tensor

from contextlab.errors import InputError

Scope = Literal["layer", "row"]


def read_pattern(pattern: str) -> tuple[int, int]:
    """ "2:4" -> (2, 4): two of each four weights stay. Raises InputError."""
    match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", pattern.strip())
    if match is None or not 0 < int(match[1]) <= int(match[2]):
        raise InputError(f"pattern: expected n:m, n of each m weights that stay, such as 2:4, got {pattern[:40]!r}")
    return int(match[1]), int(match[2])


def largest(scores: Tensor, share: float, scope: Scope = "layer") -> Tensor:
    """All but the smallest: True where a weight stays. round(share x size) of the layer, or of each row, do not.

    scores: [O, I]. Returns bool [O, I]. Of equal scores the first go first.
    """
    groups = scores.reshape(1, -1) if scope == "layer" else scores
    gone = round(share * groups.shape[1])
    order = groups.argsort(dim=1, stable=True)
    stays = torch.ones_like(groups, dtype=torch.bool).scatter_(1, order[:, :gone], False)
    return stays.view_as(scores)


def n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """The n largest of each m neighbours in a row: True where a weight stays.

    scores: [O, I], I a multiple of m. Returns bool [O, I]. Of equal scores the first go first.
    """
    groups = scores.unflatten(1, (-1, m))
    order = groups.argsort(dim=2, stable=True)
    stays = torch.ones_like(groups, dtype=torch.bool).scatter_(2, order[..., : m - n], False)
    return stays.view_as(scores)
