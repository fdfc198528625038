"""The values of a field that is swept: a list, or points in a range."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PositiveFloat, field_validator, model_serializer, model_validator

from contextlab.errors import InputError
from contextlab.spec import Spec, describe

MOST_TRIALS = 10_000
"""Of one model on one task."""
SHAPES = ("values", "log", "range", "integers")
DIGITS = 6
"""Of the points of a range: 1e-4 and 1e-2 in three points are 0.0001, 0.001 and 0.01, no more digits than one reads."""
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class Values(Spec):
    """The values of one field. A plain list stands for `{values: list}`, and one value for a list of it.

    values: these.
    log: from the first to the second, evenly on a logarithmic scale, for example `{log: [1e-4, 1e-2], n: 5}`.
    range: from the first to the second, evenly.
    integers: whole numbers from the first to the second, both among them.
    n: so many points, the ends among them. Without it `integers` are all whole numbers, and `log` and `range` any
        number between, which a grid cannot try.
    """

    values: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    log: tuple[PositiveFloat, PositiveFloat] | None = None
    range: tuple[float, float] | None = None
    integers: tuple[int, int] | None = None
    n: Annotated[int, Field(ge=2, le=MOST_TRIALS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _list_is_values(cls, data: Any) -> Any:
        if isinstance(data, Mapping | Values):
            return data
        plain = _plain(data)
        return {"values": tuple(plain if isinstance(plain, list) else (plain,))}

    @field_validator("values", mode="before")
    @classmethod
    def _plain_values(cls, data: Any) -> Any:
        return _plain(data)

    @model_validator(mode="after")
    def _one_shape(self) -> Values:
        given = [name for name in SHAPES if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(f"expected a list of values, or one of {', '.join(SHAPES[1:])}, got {given or 'none'}")
        if self.values is not None:
            if self.n is not None:
                raise InputError("n: a list has as many points as it has values; leave n out")
            if len({json.dumps(value, sort_keys=True, default=str) for value in self.values}) < len(self.values):
                raise InputError(f"values: expected different ones, got {describe(list(self.values))}")
        elif not self.ends[0] < self.ends[1]:
            raise InputError(f"{given[0]}: expected a smaller and a larger number, got {describe(list(self.ends))}")
        return self

    @model_serializer
    def _plain(self) -> Any:
        if self.values is not None:
            return list(self.values)
        shape = {name: list(pair) for name in SHAPES[1:] if (pair := getattr(self, name)) is not None}
        return shape if self.n is None else {**shape, "n": self.n}

    @property
    def ends(self) -> tuple[Any, Any]:
        """The first and the last value."""
        found = self.log or self.range or self.integers
        return found if found is not None else (self.values[0], self.values[-1])  # type: ignore[index]

    def points(self) -> list[Any] | None:
        """All values, in order; None of a range without `n`, which has any number between its ends."""
        if self.values is not None:
            return list(self.values)
        low, high = self.ends
        if self.n is None:
            if self.integers is None:
                return None
            if high - low >= MOST_TRIALS:
                raise InputError(
                    f"integers: more than {MOST_TRIALS} from {low} to {high}; give n, the number of points"
                )
            return list(range(low, high + 1))
        found = [self.at(i / (self.n - 1)) for i in range(self.n)]
        return list(dict.fromkeys(found))

    def at(self, share: float) -> Any:
        """The number at this share, from 0 to 1, of the way from the first to the second."""
        low, high = self.ends
        if share in (0, 1):
            return high if share else low
        if self.log is not None:
            return min(max(rounded(low * (high / low) ** share), low), high)
        between = low + (high - low) * share
        return round(between) if self.integers is not None else min(max(rounded(between), low), high)

    def draw(self, source: random.Random) -> Any:
        """One value, each as likely as another; of `log` on its scale."""
        points = self.points()
        return self.at(source.random()) if points is None else points[int(source.random() * len(points))]


def _plain(value: Any) -> Any:
    """A value as a file has it, without tuples and NumPy's types; 1e-3, which YAML takes for a text, as a number."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def rounded(value: float) -> float:
    """In so many digits as points of a range have."""
    return float(f"{value:.{DIGITS}g}")
