"""Values with their intervals, in words."""

from __future__ import annotations

import math

import pytest

from contextlab.evaluation.intervals import Interval
from contextlab.report.naming import difference_in_words, interval_in_words


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (Interval(0.5, 0.4, 0.6), "50.0% ± 10.0%"),
        (Interval(0.125, 0.051, 0.276), "12.5% (5.1% to 27.6%)"),  # ± 15.1% would say less than nothing
        (Interval(0.9, 0.75, 0.95), "90.0% (75.0% to 95.0%)"),
        (Interval(0.03, 0.0, 0.09), "3.0% (≤ 9.0%)"),
        (Interval(0.9988, 0.9984, 0.9992), "99.9% ± <0.1%"),  # whose ends round to two figures
        (Interval(0.998, 0.9974, 0.9986), "99.8% ± 0.1%"),
    ],
)
def test_the_interval_of_a_share_in_words_stays_within_bounds(told, words):
    assert interval_in_words(told, "accuracy") == words


def test_an_uneven_interval_is_told_by_its_ends():
    told = Interval(math.exp(4.0), math.exp(-5.6), math.exp(13.6))
    assert interval_in_words(told, "perplexity") == "54.6 (0.0037 to 806,130)"  # ± 806075 would say nothing
    assert interval_in_words(Interval(55.0, 30.0, 101.0), "perplexity") == "55 (30 to 101)"
    assert interval_in_words(Interval(55.0, 50.0, 60.5), "perplexity") == "55.0 ± 5.5"
    assert interval_in_words(Interval(0.1, -0.2, 0.9), "kl") == "0.10 ± 0.80"


def test_what_is_no_number_is_told_as_such():
    unknown = Interval.known(math.nan, math.nan, math.nan)
    assert interval_in_words(unknown, "accuracy") == interval_in_words(unknown, "error") == "no number"
    assert difference_in_words(unknown, "accuracy") == difference_in_words(unknown, "error") == "difference unknown"
    assert interval_in_words(Interval.known(0.5, math.nan, math.nan), "accuracy") == "50.0% (one prompt: no interval)"
