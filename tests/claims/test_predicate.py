"""Quantities, outcomes and verdicts."""

from __future__ import annotations

import math

import pytest

from contextlab.claims import Outcome, Quantity, verdict_of
from contextlab.errors import InputError
from contextlab.evaluation.intervals import Interval

NAN = float("nan")


def asked(**bounds):
    return Quantity(said="q", task="t", weights={"a": 1.0}, **bounds)


@pytest.mark.parametrize(
    ("interval", "bounds", "holds"),
    [
        ((2, 1, 3), {"at_least": 1}, True),
        ((2, 1, 3), {"at_least": 1.5}, None),
        ((2, 1, 3), {"at_least": 3.5}, False),
        ((2, 1, 3), {"at_least": 3}, None),  # the bound itself is still possible
        ((2, 1, 3), {"at_most": 3}, True),
        ((2, 1, 3), {"at_most": 2}, None),
        ((2, 1, 3), {"at_most": 0.5}, False),
        ((2, 1, 3), {"at_most": 1}, None),
        ((2, -math.inf, math.inf), {"at_least": -5}, None),
        ((NAN, NAN, NAN), {"at_least": 0}, None),
        ((2, 2, 2), {"at_least": 2}, True),
        ((2, 2, 2), {"at_most": 2}, True),
    ],
)
def test_an_outcome_holds_only_where_its_whole_interval_does(interval, bounds, holds):
    outcome = Outcome(asked(**bounds), Interval(*map(float, interval)))
    assert outcome.holds is holds
    assert outcome.told()["holds"] is holds
    assert {key: outcome.told()[key] for key in bounds} == bounds


def test_what_is_not_finite_is_told_as_nothing():
    told = Outcome(asked(at_least=0), Interval(2.0, -math.inf, math.inf)).told()
    assert (told["value"], told["low"], told["high"]) == (2.0, None, None)


@pytest.mark.parametrize("bounds", [{}, {"at_least": 1, "at_most": 2}])
def test_a_quantity_has_one_bound(bounds):
    with pytest.raises(InputError, match="at_least or at_most, one of them"):
        asked(**bounds)


def outcomes(*held, repeats=3):
    found = {True: Interval(2, 1, 3), None: Interval(0, -1, 1), False: Interval(-2, -3, -1)}
    return [Outcome(asked(at_least=0), found[each], repeats=repeats) for each in held]


@pytest.mark.parametrize(
    ("held", "seeds", "verdict"),
    [
        ((True, True), 3, "holds"),
        ((True, None), 3, "unclear"),
        ((True, False, None), 3, "fails"),
        ((True,), 2, "unclear"),
        ((False,), 2, "unclear"),
        ((False,), None, "fails"),
        ((True,), None, "holds"),
        ((), 3, "unclear"),
    ],
)
def test_verdicts(held, seeds, verdict):
    assert verdict_of(outcomes(*held, repeats=seeds)) == verdict
