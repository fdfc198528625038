"""Sums of tables' cells: differences, ratios and slopes with their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from contextlab.claims import Quantity, Table, value_of
from contextlab.claims.measures import told
from contextlab.claims.sums import middle_of
from contextlab.errors import InputError
from contextlab.evaluation.intervals import t95


def asked(**keys):
    return Quantity(**{"said": "q", "task": "t", "weights": {"a": 1.0}, "at_least": 0, **keys})


def rows(values, **more):
    """values: (name, length) or name -> one a seed."""
    found = []
    for key, each in values.items():
        name, length = key if isinstance(key, tuple) else (key, None)
        found += [
            {"model": name, "length": length, "seed": s, "metric": "m", "value": v, **more} for s, v in enumerate(each)
        ]
    return told(found)


def of(quantity, values, kind="trainings", **more):
    return value_of(quantity, {"t": Table(rows(values, **more), kind)})[0]


A, B = np.array([5.0, 6.0, 7.5]), np.array([2.0, 2.2, 2.1])


def half(x):
    return t95(len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))


def test_a_difference_of_trainings_is_students_of_each_model():
    found = of(asked(less={"weights": {"b": 2.0}}), {"a": A, "b": B})
    assert found.value == pytest.approx(A.mean() - 2 * B.mean())
    assert found.high - found.value == pytest.approx(math.hypot(half(A), 2 * half(B)))


def test_a_ratio_of_trainings_has_fiellers_interval():
    found = of(asked(over={"weights": {"b": 1.0}}), {"a": A, "b": B})
    a, b, va, vb = A.mean(), B.mean(), half(A) ** 2, half(B) ** 2
    # (a - r b)^2 = va + r^2 vb
    ends = sorted(np.roots([b * b - vb, -2 * a * b, a * a - va]))
    assert found == pytest.approx((a / b, *ends))
    negated = of(asked(weights={"a": -1.0}, over={"weights": {"b": -1.0}}), {"a": A, "b": B})
    assert negated == pytest.approx(found)


def test_a_ratio_over_what_may_be_nothing_has_no_ends():
    found = of(asked(over={"weights": {"b": 1.0}}), {"a": A, "b": [-1.0, 2.0, 3.0]})
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_a_slope_is_that_of_least_squares_within_each_training():
    lengths, y = np.array([64, 128, 512]), np.random.default_rng(0).normal(size=(3, 4))
    values = {("a", int(n)): y[i] for i, n in enumerate(lengths)}
    for log in (False, True):
        x = np.log2(lengths) if log else lengths
        slopes = np.polyfit(x, y, 1)[0]
        found = of(asked(slope="length", log=log), values)
        assert found.value == pytest.approx(slopes.mean())
        assert found.high - found.value == pytest.approx(half(slopes))
    two = of(asked(slope="length", at=[64, 512]), values)
    assert two.value == pytest.approx(((y[2] - y[0]) / 448).mean())


def test_of_counted_values_there_is_no_interval():
    values = {("a", 8): [64.0], ("a", 16): [128.0], ("a", 32): [448.0]}
    assert of(asked(length=16, over={"length": 8}), values, "counted") == (2.0, 2.0, 2.0)
    slopes = asked(slope="length", at=[16, 32], log=True, over={"at": [8, 16]})
    assert of(slopes, values, "counted") == (5.0, 5.0, 5.0)
    assert of(asked(length=16, less={"length": 8}), values, "counted") == (64.0, 64.0, 64.0)


def test_turns_are_compared_within_each_and_their_median_told():
    rng = np.random.default_rng(0)
    busy = rng.uniform(1, 10, 15)  # what slows a whole turn cancels
    values = {("a", 8): 3 * busy, ("b", 8): busy}
    values["a", 8][4] *= 50
    found = of(asked(over={"weights": {"b": 1.0}}), values, "turns")
    assert found == pytest.approx((3.0, 3.0, 3.0))


def test_the_ends_of_a_median_are_those_of_the_sign_test():
    assert middle_of([1, 2, 3, 4, 5])[1:] == (-math.inf, math.inf)  # 2 / 2^5 > 5%
    assert middle_of([1, 2, 3, 4, 5, 6]) == (3.5, 1, 6)  # 2 / 2^6 = 3%
    assert middle_of(range(1, 16)) == (8, 4, 12)  # 2 (1 + 15 + 105 + 455) / 2^15 = 3.5%
    assert all(map(math.isnan, middle_of([1, math.nan])))


def test_what_is_asked_is_asked_of_every_draw():
    assert of(asked(), {"a": [1e-12, 3e-12, 2e-12]}, "draws") == (2e-12, 1e-12, 3e-12)
    assert all(map(math.isnan, of(asked(), {"a": [1e-12, math.nan]}, "draws")))


def test_ends_that_are_hard_move_the_interval_and_what_is_censored_has_none():
    table = rows({"a": [100.0, 100.0, 100.0], "b": [400.0, 400.0, 400.0]})
    table["ci_low"] = table["value"] - 50
    table.loc[table["model"] == "b", "ci_high"] = math.inf  # 400 or more
    tables = {"t": Table(table, "trainings")}
    found, note = value_of(asked(weights={"b": 1.0}, over={"weights": {"a": 1.0}}), tables)
    assert found == pytest.approx((4.0, 3.5, math.inf))
    assert note.startswith("b: not reached by 3 of 3")
    inverse = value_of(asked(over={"weights": {"b": 1.0}}), tables)[0]
    assert (inverse.low, inverse.high) == pytest.approx((0.0, 100 / 350), abs=1e-9)


def test_shots_add_the_prompts_interval(tiny, tmp_path):
    from contextlab.claims.engine import _of_run
    from contextlab.experiments import run

    found = run(tiny.experiment(), out=tmp_path / "run", progress=False)
    tables = _of_run(found)
    results = found.results[(found.results["metric"] == "squared_error") & (found.results["split"] == "train")]
    at = results[(results["shot"] == 3).fillna(False)]
    one, ridge = (at[at["model"] == name] for name in ("one", "ridge"))
    got = value_of(asked(task="linear", weights={"one": 1, "ridge": -1}, shot=3), tables)[0]
    assert got.value == pytest.approx(one["value"].mean() - ridge["value"].mean())
    prompts = ((one["ci_high"] - one["ci_low"]) / 2).mean() + ((ridge["ci_high"] - ridge["ci_low"]) / 2).mean()
    assert got.high - got.value == pytest.approx(math.hypot(prompts, half(one["value"].to_numpy(float))))
    curve = results[results["shot"].notna() & (results["model"] == "ridge")]
    slope = value_of(asked(task="linear", weights={"ridge": 1}, slope="shot"), tables)[0]
    assert slope.value == pytest.approx(np.polyfit(curve["shot"].astype(int), curve["value"].astype(float), 1)[0])
    whole = value_of(asked(task="linear", weights={"one": 1}, over={"weights": {"ridge": 1}}), tables)[0]
    overall = results[results["shot"].isna()].groupby("model")["value"].mean()
    assert whole.value == pytest.approx(overall["one"] / overall["ridge"], rel=1e-6)
    assert whole.low < whole.value < whole.high


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weights": {"c": 1.0}}, "nothing was measured of 'c'"),
        ({"length": 9}, "nothing was measured of 'a' at length 9"),
        ({}, "'a' was measured in several places"),
        ({"metric": "n"}, "unknown metric of this table 'n'"),
        ({"slope": "length", "at": [8, 9]}, "nothing was measured of 'a' at length 9"),
    ],
)
def test_what_was_not_measured_is_told(keys, message):
    with pytest.raises(InputError, match=message):
        of(asked(**keys), {("a", 8): [1.0], ("a", 16): [2.0]}, "counted")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"at": [1, 2]}, "at: is for a slope"),
        ({"slope": "shot", "at": [1, 1]}, "at: expected two or more different ones"),
        ({"slope": "shot", "shot": 3}, "shot: a slope along shot has no single one"),
        ({"over": {"lenght": 3}}, "over.lenght: unknown key; did you mean 'length'"),
        ({"less": {"weights": {}}}, "less: weights: expected at least one predictor"),
    ],
)
def test_a_sum_that_says_nothing_is_refused(keys, message):
    with pytest.raises(InputError, match=message):
        asked(**keys)
