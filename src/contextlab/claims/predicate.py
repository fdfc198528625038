"""What decides a claim: quantities with their intervals, each held to a bound that was fixed before the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import model_validator

from contextlab.errors import InputError
from contextlab.evaluation.intervals import Interval
from contextlab.spec import Spec

Verdict = Literal["holds", "fails", "unclear"]
LEAST_SEEDS = 3
"""Trainings of each model from which on a verdict may be more than unclear."""


class Quantity(Spec):
    """A weighted sum of what predictors get on a task, and the bound that it is held to.

    said: what it is, in words.
    task: of the claim's recipe.
    weights: predictor, a model's or a learner's name in the results -> its weight in the sum.
    split: prompts that it is measured on.
    metric: default what the task is judged by.
    at_least: the sum must not be below; give this or at_most.
    at_most: the sum must not be above.
    """

    said: str
    task: str
    weights: dict[str, float]
    split: str = "train"
    metric: str | None = None
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Quantity:
        if not self.weights:
            raise InputError("weights: expected at least one predictor")
        if (self.at_least is None) == (self.at_most is None):
            raise InputError("expected at_least or at_most, one of them")
        return self


class Outcome(NamedTuple):
    """What was found of a quantity."""

    quantity: Quantity
    found: Interval

    @property
    def holds(self) -> bool | None:
        """Whether all of the interval is on the right side of the bound (True) or the wrong (False); None: neither."""
        low, high = self.found.low, self.found.high
        if any(map(math.isnan, self.found)):
            return None
        if self.quantity.at_least is not None:
            bound = self.quantity.at_least
        else:
            assert self.quantity.at_most is not None
            bound, low, high = -self.quantity.at_most, -high, -low
        return True if low >= bound else False if high < bound else None

    def told(self) -> dict[str, Any]:
        """As plain data; an end of which nothing is known is None."""
        known = {key: value if math.isfinite(value) else None for key, value in self.found._asdict().items()}
        bounds = {key: getattr(self.quantity, key) for key in ("at_least", "at_most")}
        asked = {key: bound for key, bound in bounds.items() if bound is not None}
        return {"said": self.quantity.said, **known, **asked, "holds": self.holds}


def verdict_of(outcomes: Sequence[Outcome], seeds: int) -> Verdict:
    """What outcomes say together: the claim fails where one does, holds where all do, and is unclear else.

    seeds: the fewest trainings of a model; fewer than `LEAST_SEEDS` decide nothing.
    """
    if seeds < LEAST_SEEDS or not outcomes:
        return "unclear"
    held = [outcome.holds for outcome in outcomes]
    return "fails" if False in held else "holds" if all(held) else "unclear"
