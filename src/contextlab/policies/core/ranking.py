"""Which scores are highest, and which of equal ones: the later token or page is kept, everywhere.

What was read last is the likeliest to be asked for, and the rule makes the choice the same on every machine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FEW = 256
"""Below so many, scores that are taken are sorted to find equal ones; beyond, that takes longer than counting them."""


def in_order(scores: Tensor, count: int) -> Tensor:
    """Indices [..., count] int64 of the highest of scores [..., N] in falling order; of equal ones the later first."""
    last = scores.shape[-1] - 1
    return last - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :count]


def best(scores: Tensor, count: int) -> Tensor:
    """Indices [..., count] int64 of the highest of scores [..., N], in any order; of equal ones the later.

    `in_order` takes several times as long. Where all that is left is -inf, it may be any of it.
    """
    if not 0 < count < scores.shape[-1]:
        return in_order(scores, count)
    if count < FEW:
        found = scores.topk(count + 1)
        edge = (
            found.values[..., count - 1 :].flatten(0, -2).tolist()
        )  # the last that is taken, and the first that is not
        tied = any(last == other > -math.inf for last, other in edge)
        return in_order(scores, count) if tied else found.indices[..., :count]
    found = scores.topk(count, sorted=False)
    least = found.values.amin(-1, keepdim=True)
    more = ((scores >= least).sum(-1) > count) & (least[..., 0] > -math.inf)  # one as good was left out
    return in_order(scores, count) if bool(more.any()) else found.indices


def coarse(scores: Tensor) -> Tensor:
    """Scores [..., N] as float64 of 16 bits: rounding does not part what is equal, as the keys of equal tokens are."""
    part, exponent = scores.double().frexp()
    return torch.ldexp((part * 2**16).round(), exponent - 16)
