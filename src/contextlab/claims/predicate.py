"""What decides a claim: quantities with their intervals, each held to a bound that was fixed before the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import NonNegativeInt, PositiveInt, model_validator

from contextlab.errors import InputError
from contextlab.evaluation.intervals import Interval
from contextlab.spec import Spec

Verdict = Literal["holds", "fails", "unclear"]
LEAST_SEEDS = 3
"""Trainings, turns or draws from which on a verdict may be more than unclear."""


FIRST = ("task", "weights", "split", "metric", "at_least", "at_most")
"""Keys of a quantity whose values tell verdicts apart even where they are not given."""


class Sum(Spec):
    """A weighted sum of what was measured of predictors, in one place of a table, or its slope along the table.

    task: of the claim's recipe, or one of its `measures`.
    weights: predictor, or whatever a measure tells of, by its name in the table -> its weight in the sum.
    split: prompts that it is measured on; with `slope: length` a pattern, such as "length *".
    metric: default what the task is judged by, or what a measure tells, where that is one thing.
    shot: the number of examples seen before; default all that is scored.
    length: of the prompts, or of the context that a measure was taken at; default the only one.
    slope: how much the sum grows for each further shot, or each further token of length.
    at: shots or lengths that the slope is taken over, by least squares; default all.
    log: with slope: for each doubling in place of each further one.
    """

    task: str | None = None
    weights: dict[str, float] | None = None
    split: str | None = None
    metric: str | None = None
    shot: NonNegativeInt | None = None
    length: PositiveInt | None = None
    slope: Literal["shot", "length"] | None = None
    at: tuple[NonNegativeInt, ...] = ()
    log: bool = False

    @model_validator(mode="after")
    def _one_place(self) -> Sum:
        if self.weights is not None and not self.weights:
            raise InputError("weights: expected at least one predictor")
        if self.task is None:  # what is not given is the quantity's: held to this when they are put together
            return self
        if self.slope is None and (self.at or self.log):
            raise InputError(f"{'at' if self.at else 'log'}: is for a slope; give slope, or leave it out")
        if self.slope is not None and getattr(self, self.slope) is not None:
            raise InputError(f"{self.slope}: a slope along {self.slope} has no single one; leave one of them out")
        if self.at and len(set(self.at)) < max(2, len(self.at)):
            raise InputError(f"at: expected two or more different ones, got {list(self.at)}")
        return self


class Quantity(Sum):
    """A sum, less another, over another, and the bound that what comes of it is held to.

    said: what it is, in words.
    less: another sum, which is taken from it; keys that are not given are those of the quantity.
    over: another sum, which it is divided by; likewise.
    at_least: the quantity must not be below; give this or at_most.
    at_most: the quantity must not be above.
    """

    said: str
    task: str
    weights: dict[str, float]
    split: str = "train"
    less: Sum | None = None
    over: Sum | None = None
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Quantity:
        if (self.at_least is None) == (self.at_most is None):
            raise InputError("expected at_least or at_most, one of them")
        self.sums()
        return self

    def sums(self) -> dict[str, Sum]:
        """Its sums with all their keys, by the key that each stands under: "", "less", "over"."""
        own = {name: getattr(self, name) for name in Sum.model_fields}
        found = {"": Sum.parse(own)}
        for key in ("less", "over"):
            part = getattr(self, key)
            if part is not None:
                found[key] = Sum.parse({**own, **{name: getattr(part, name) for name in part.model_fields_set}}, key)
        return found

    def asked(self) -> dict[str, Any]:
        """What decides, as plain data; keys that claims had from the beginning are always there."""
        data = self.model_dump(mode="json", exclude={"said"})
        return {key: value for key, value in data.items() if key in FIRST or key in self.model_fields_set}


class Outcome(NamedTuple):
    """What was found of a quantity.

    note: what must be told with it, in words. repeats: the fewest trainings, turns or draws that it rests on, of which
    fewer than `LEAST_SEEDS` decide nothing; None where there is no chance in it.
    """

    quantity: Quantity
    found: Interval
    note: str = ""
    repeats: int | None = None

    @property
    def holds(self) -> bool | None:
        """Whether all of the interval is on the right side of the bound (True) or the wrong (False); None: neither."""
        low, high = self.found.low, self.found.high
        if any(map(math.isnan, self.found)) or (self.repeats is not None and self.repeats < LEAST_SEEDS):
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
        note = {"note": self.note} if self.note else {}
        return {"said": self.quantity.said, **known, **asked, "holds": self.holds, **note}


def verdict_of(outcomes: Sequence[Outcome]) -> Verdict:
    """What outcomes say together: the claim fails where one does, holds where all do, and is unclear else."""
    held = [outcome.holds for outcome in outcomes]
    return "fails" if False in held else "holds" if held and all(held) else "unclear"
