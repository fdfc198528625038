"""Learn then Test (2110.01052): the last of a list of settings up to which a test bounds what each loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bounded:
    """A setting whose risk is bounded.

    value: of the setting. risk: mean of its losses. p: of the hypothesis that its true risk is above the bound.
    """

    value: float
    risk: float
    p: float


def p_value(risk: float, count: int, bound: float) -> float:
    """Of the hypothesis that losses from 0 to 1 have a mean above `bound`, where so many have the mean `risk`.

    The Hoeffding-Bentkus p-value min(exp(-n h(min(r, b), b)), e P(Bin(n, b) <= ceil(n r))), with h the divergence of
    two coins, h(a, b) = a log(a / b) + (1 - a) log((1 - a) / (1 - b)). Where the mean is above the bound, it is at most
    u with a probability of at most u, whatever the losses' distribution.
    """
    low = min(risk, bound)
    divergence = (1 - low) * math.log((1 - low) / (1 - bound)) + (low * math.log(low / bound) if low > 0 else 0.0)
    hoeffding = math.exp(-count * divergence)
    # Sums of many losses are off in their last digits: what is a whole number of losses counts as that.
    most = min(count, math.ceil(count * risk - 1e-9 * count))
    return min(1.0, hoeffding, math.e * _binomial(most, count, bound))


def _binomial(most: int, count: int, share: float) -> float:
    """The probability of at most so many hits in `count` trials, each of the probability `share`."""
    hits = np.arange(most + 1)
    each = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in hits]
    logs = np.array(each) + hits * math.log(share) + (count - hits) * math.log1p(-share)
    return float(np.exp(logs).sum())


def fewest(bound: float, confidence: float) -> int:
    """Losses below which no test says so, even where all of them are 0."""
    return math.ceil(math.log(1 - confidence) / math.log(1 - bound) - 1e-9)


def last_bounded(
    values: Sequence[float], losses: Callable[[float], np.ndarray], bound: float, confidence: float
) -> Bounded | None:
    """The last of the settings in the order given, up to which each has a risk that the test bounds; None of none.

    values: in an order that was chosen without the losses, the safest first. losses: of a setting, [n] from 0 to 1, one
    each for n independent draws, the same for all settings.

    Each is tested at the level 1 - confidence, and the first that fails ends it (fixed-sequence testing): the
    probability that the one that is returned has a true risk above the bound is at most 1 - confidence.
    """
    found = None
    for value in values:
        each = losses(value)
        risk = float(each.mean())
        p = p_value(risk, len(each), bound)
        if p > 1 - confidence:
            break
        found = Bounded(value, risk, p)
    return found
