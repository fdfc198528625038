"""The rule of successive halving: who goes on, whatever the seeds' order, and what is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlab.errors import InputError
from contextlab.experiments import ExperimentSpec
from contextlab.experiments.halving import HalvingSpec, go_on, race
from contextlab.experiments.sweep import SweepSpec
from contextlab.experiments.tied import TiedSpec
from tests.experiments.test_run import MODEL, one

nan = math.nan
SCORES = st.one_of(st.floats(0, 1), st.just(nan), st.sampled_from([0.0, 0.5, 1.0]))


@st.composite
def fields(draw):
    """Scores of some trials from some seeds at each of two rungs, and the rule."""
    trials, seeds = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    table = st.lists(st.lists(SCORES, min_size=seeds, max_size=seeds), min_size=trials, max_size=trials)
    reduction = draw(st.sampled_from([1, 1.5, 2, 3, 4]))
    return [draw(table), draw(table)], HalvingSpec(reduction=reduction), draw(st.booleans())


@settings(deadline=None, max_examples=60)
@given(fields(), st.randoms())
def test_the_best_stay_and_no_more_than_allowed(drawn, source):
    (first, second), halving, higher = drawn
    table = [first, second]
    found = race(halving, range(len(first)), lambda rung, trial: table[rung][trial], higher)
    in_before = tuple(range(len(first)))
    for rung, among in enumerate(found.rounds):
        assert among == in_before
        after = found.rounds[rung + 1] if rung + 1 < len(found.rounds) else found.left
        assert 1 <= len(after) <= math.ceil(len(among) / halving.reduction)
        assert set(after) <= set(among)
        means = {t: sum(table[rung][t]) / len(table[rung][t]) for t in among}
        whole = {t: mean for t, mean in means.items() if not math.isnan(mean)}
        if whole:
            top = max(whole.values()) if higher else min(whole.values())
            assert any(whole.get(t) == pytest.approx(top) for t in after)
        gone = [t for t in among if t not in after and not all(map(math.isnan, table[rung][t]))]
        assert list(found.dropped[rung]) == gone
        for t in gone:
            assert found.dropped_at(t) == rung
        for one_in in after:  # nobody who is out was better, whatever was lost
            for out in gone:
                lost = [sum(map(math.isnan, table[rung][t])) for t in (one_in, out)]
                assert lost[0] <= lost[1]
                if lost[0] == lost[1] == 0:
                    better = means[out] - means[one_in] if higher else means[one_in] - means[out]
                    assert better < 1e-12
        in_before = after
    assert all(found.dropped_at(t) is None for t in found.left)
    shuffled = [[source.sample(scores, len(scores)) for scores in rung] for rung in table]
    assert race(halving, range(len(first)), lambda rung, trial: shuffled[rung][trial], higher) == found
    if len(found.left) == 1 and len(first) > 1:  # where it diverges the next best goes on
        again = race(halving, range(len(first)), lambda rung, trial: table[rung][trial], higher, lost=found.left)
        assert again.rounds == found.rounds
        rest = {t: table[len(found.rounds) - 1][t] for t in found.rounds[-1] if t not in found.left}
        assert list(again.left) == go_on(rest, 1, higher)
    # a run that is resumed after any rung sees the same rounds
    for rungs in range(len(found.rounds) + 1):
        part = race(halving, range(len(first)), lambda rung, trial: table[rung][trial], higher, rungs)
        assert part.rounds == found.rounds[:rungs]
        assert part.left == (*found.rounds, found.left)[rungs]
    sizes = halving.sizes(len(first))
    for rung, among in enumerate((*found.rounds, found.left)):
        assert len(among) <= sizes[min(rung, len(sizes) - 1)]


def test_the_first_of_equals_and_those_that_lost_a_seed_last():
    assert go_on({0: [0.5], 1: [0.5], 2: [0.5]}, 2, True) == [0, 1]
    assert go_on({0: [0.1, 0.1], 1: [1.0, nan], 2: [0.2, 0.2]}, 2, True) == [0, 2]
    assert go_on({0: [0.1, 0.1], 1: [0.0, nan], 2: [nan, nan]}, 3, False) == [0, 1]
    assert go_on({3: [nan], 5: [nan]}, 1, False) == [3]
    assert go_on({3: [nan], 5: [nan]}, 2, False) == [3]
    assert go_on({0: [3.0], 1: [1.0], 2: [2.0]}, 2, False) == [1, 2]


def test_a_hopeless_trial_goes_last_whatever_its_score():
    one_seed = {0: [0.9], 1: [0.1], 2: [0.2]}
    assert [go_on(one_seed, most, True, {0: 1}) for most in (1, 2, 3)] == [[2], [1, 2], [1, 2]]
    assert go_on({0: [0.9], 1: [0.1], 2: [nan]}, 1, False, {1: 1}) == [0]
    # all are: the best of them alone, of equals the first; one that gave no score is behind them
    assert go_on({0: [0.1], 1: [0.3], 2: [0.3]}, 2, True, {0: 1, 1: 1, 2: 1}) == [1]
    assert go_on({0: [nan], 1: [0.1]}, 2, True, {1: 1}) == [1]
    # one seed among three: behind those that all have hope, but not out
    three = {0: [0.9, 0.9, 0.9], 1: [0.2, 0.2, 0.2], 2: [0.8, 0.8, 0.8]}
    assert [go_on(three, most, True, {0: 1, 2: 2}) for most in (1, 2, 3)] == [[1], [0, 1], [0, 1, 2]]
    assert go_on(three, 3, True, {0: 1, 2: 3}) == [0, 1]
    assert go_on({0: [0.9, nan], 1: [0.5, 0.1]}, 1, True, {1: 1}) == [1]  # a seed without a score is worse


def test_one_that_ends_as_hopeless_after_a_rung_kept_its_place_there_and_goes_last_at_the_next():
    scores = {0: 0.9, 1: 0.8, 2: 0.2, 3: 0.1}

    def found(ended):
        return race(
            HalvingSpec(), range(4), lambda rung, trial: [scores[trial]], True,
            hopeless=lambda rung, trial: trial in ended[rung],
        )  # fmt: skip

    assert (found([(0, 1), (0, 1)]).rounds, found([(0, 1), (0, 1)]).left) == (((0, 1, 2, 3), (2, 3)), (2,))
    late = found([(), (0,)])
    assert (late.rounds, late.dropped, late.left) == (((0, 1, 2, 3), (0, 1)), ((2, 3), (0,)), (1,))
    assert found([(), (0, 1)]).left == (0,)  # nobody takes its place: it has a model that can be measured


def test_where_all_can_be_compared():
    halving = HalvingSpec()
    scores = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}
    found = race(halving, range(4), lambda rung, trial: [scores[trial]], True)
    assert (found.rounds, found.left, found.level) == (((0, 1, 2, 3), (2, 3)), (3,), 0)
    none = race(HalvingSpec(reduction=1), range(4), lambda rung, trial: [scores[trial]], True)
    assert (none.left, none.level) == ((0, 1, 2, 3), None)
    late = race(HalvingSpec(reduction=1.9), range(2), lambda rung, trial: [nan if trial else 0.5], True)
    assert (late.rounds, late.left, late.level) == (((0, 1),), (0,), 0)


def test_steps_of_rungs_and_sizes():
    halving = HalvingSpec(rungs=(0.1, 0.25, 0.5), reduction=2)
    assert [halving.step(rung, 30) for rung in range(3)] == [3, 8, 15]
    assert halving.step(0, 3) == 1
    assert (halving.sizes(8), halving.sizes(3), halving.sizes(1)) == ([8, 4, 2, 1], [3, 2, 1], [1, 1])
    assert HalvingSpec(reduction=1).sizes(2) == [2, 2, 2]


RATES = {"train.learning_rate": [1e-3, 3e-2]}


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"halving": {"rungs": [0.5, 0.25]}}, "sweep.halving.*rungs: expected rising shares"),
        ({"halving": {"rungs": []}}, "halving.rungs: .*at least 1"),
        ({"halving": {"rungs": [1.0]}}, "halving.rungs.*less than 1"),
        ({"halving": {"reduction": 0.5}}, "halving.reduction: .*greater than or equal to 1"),
        ({"halving": {"seeds": 0}}, "halving.seeds"),
        ({"halving": {"rung": [0.5]}}, "did you mean 'rungs'"),
        (
            {"halving": True, "sampler": "tpe", "trials": 2},
            "halving: sampler 'tpe' goes by scores at the end of training",
        ),
    ],
)
def test_an_impossible_halving_is_refused_in_one_line(sweep, message):
    with pytest.raises(InputError, match=message) as caught:
        ExperimentSpec.parse(one(sweep={"over": RATES, **sweep}))
    assert "\n" not in str(caught.value)


def test_on_off_and_of_one_model():
    assert SweepSpec.parse({"halving": True}).halving == HalvingSpec()
    assert SweepSpec.parse({"halving": False}).halving is None
    kept = SweepSpec.parse({"halving": True})
    assert SweepSpec.parse(kept.model_dump(mode="json", exclude_unset=True)) == kept
    models = {
        "softmax": MODEL,
        "whole": {**MODEL, "sweep": {"halving": None}},
        "plain": {**MODEL, "sweep": {"over": {"train.learning_rate": None}}},
    }
    spec = ExperimentSpec.parse(one(models=models, seeds=[4, 5], sweep={"over": RATES, "halving": {"reduction": 3}}))
    assert spec.halving_of("softmax") == HalvingSpec(reduction=3)
    assert (spec.halving_of("whole"), spec.halving_of("plain")) == (None, None)
    assert (spec.deciding_seeds("softmax"), spec.deciding_seeds("whole")) == ((4,), (4, 5))
    trained = [(each.model_name, each.trial, each.seed) for each in spec.trainings()]
    assert [each for each in trained if each[0] == "softmax"] == [("softmax", 0, 4), ("softmax", 1, 4)]
    assert len(trained) == 2 + 4 + 2
    assert len(spec.measured()) == 6
    late = spec.model_copy(update={"early": False})
    assert (late.halving_of("softmax"), late.deciding_seeds("softmax"), len(late.trainings())) == (None, (4, 5), 10)


def test_where_all_that_went_on_diverged_the_next_best_go_on_in_their_place():
    def scores(rung, trial):
        return [nan if rung and trial in lost else 1.0 - trial / 10]

    cases = (((), (0, 1), (0,)), ((0,), (0, 1), (1,)), ((0, 1), (2, 3), (2,)), ((0, 1, 2), (3,), (3,)))
    for lost, second, left in cases:
        found = race(HalvingSpec(), range(4), scores, True, lost=lost)
        assert found.rounds == (((0, 1, 2, 3), second) if len(second) > 1 else ((0, 1, 2, 3),))
        assert found.left == left
    lost = (0, 1, 2, 3)
    assert race(HalvingSpec(), range(4), scores, True, lost=lost).left == (0,)


def test_what_cannot_be_is_refused_and_what_is_whole_stays_exact():
    with pytest.raises(InputError, match="halving.reduction.*finite"):
        SweepSpec.parse({"halving": {"reduction": math.inf}})
    with pytest.raises(InputError, match="^sweep.halving: no field is swept"):
        ExperimentSpec.parse(one(sweep={"halving": True}))
    tie = {"tied": {"train.matrix_learning_rate": {"to": "models.softmax.train.learning_rate"}}}
    with pytest.raises(InputError, match="swept for one model alone; tie it in models.softmax.sweep.tied"):
        ExperimentSpec.parse(one(sweep={"over": {"models.softmax.train.learning_rate": [1e-3, 3e-2]}, **tie}))
    assert TiedSpec(to="train.steps", times=128).value(20_001) == 2_560_128
    assert TiedSpec(to="train.steps", times=0.5).value(20) == 10
