"""Which scores are highest, and which of equal ones: the later token or page is kept, everywhere.

What was read last is the likeliest to be asked for, and the rule makes the choice the same on every machine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def in_order(scores: Tensor, count: int) -> Tensor:
    """Indices [..., count] int64 of the highest of scores [..., N] in falling order; of equal ones the later first."""
    last = scores.shape[-1] - 1
    return last - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :count]


def best(scores: Tensor, count: int) -> Tensor:
    """Indices [..., count] int64 of the highest of scores [..., N], in no order; of equal ones the later.

    As `in_order`, which takes several times as long; where all that is left is -inf, any of it.
    """
    found = scores.topk(count, sorted=False)
    if not count:
        return found.indices
    least = found.values.amin(-1, keepdim=True)
    more = (scores == least).sum(-1) > (found.values == least).sum(-1)  # as good ones that were left out
    return in_order(scores, count) if bool((more & (least[..., 0] > -math.inf)).any()) else found.indices


def coarse(scores: Tensor) -> Tensor:
    """Scores [..., N] as float64 of 16 bits: rounding does not part what is equal, as the keys of equal tokens are."""
    part, exponent = scores.double().frexp()
    return torch.ldexp((part * 2**16).round(), exponent - 16)
