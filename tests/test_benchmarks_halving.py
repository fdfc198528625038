"""What `benchmarks/halving.py` makes of trainings: each rule decides as the library would, and its cost is counted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from contextlab.errors import InputError
from contextlab.experiments import load_recipe
from contextlab.experiments.halving import HalvingSpec
from contextlab.training.spec import UntilSpec

SOURCE = Path(__file__).resolve().parent.parent / "benchmarks"
LATE = [0.02] * 15 + [0.2 * k for k in range(1, 5)] + [1.0] * 5  # solved from step 400 on
QUICK = [0.1 * k for k in range(1, 7)] + [0.6] * 6 + [0.9] * 12
CURVES = (LATE, QUICK, [0.5] * 23 + [0.55], [0.015] * 24)
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(SOURCE))
    try:
        import halving
        import halving_rules
    finally:
        sys.path.remove(str(SOURCE))
    return halving_rules, halving


@pytest.fixture(scope="module")
def rules(modules):
    return modules[0]


@pytest.fixture(scope="module")
def spec():
    found = load_recipe("mixers-on-recall-quick", ["early=false"])
    return found.model_copy(update={"models": {"attention": found.models["attention"]}})


@pytest.fixture(scope="module")
def replay(rules, spec):
    return rules.Replay(spec, made(rules, spec))


def made(rules, spec):
    """Trainings of one mixer: a late learner, a quick one, a middling one, one at chance."""
    found = []
    for training in spec.trainings():
        looks = []
        for k, value in enumerate(CURVES[training.trial], 1):
            score = [value, value - 0.01, value + 0.01, 256]
            both = {"accuracy": score, "cross_entropy": [5 - 5 * value, 4.9 - 5 * value, 5.1 - 5 * value, 256]}
            looks.append({"step": 20 * k, **dict.fromkeys((rules.STREAM, rules.VALIDATION, rules.TEST), both)})
        found.append(
            {"model": "attention", "trial": training.trial, "seed": training.seed, "setting": dict(training.setting),
             "steps": 480, "status": "finished", "made": 480, "seconds": 10.0, "looks": looks}
        )  # fmt: skip
    return found


def test_the_full_grid_chooses_the_late_learner(replay):
    full = replay.full
    assert (full.chosen, full.accuracy, full.steps, full.made) == ({"attention": 0}, {"attention": 1.0}, 12 * 480, 12)
    assert full.seconds == pytest.approx(120)


def test_halving_drops_it_and_makes_a_third_of_the_steps(rules, replay):
    halving = HalvingSpec(rungs=(0.25, 0.5), reduction=2, seeds=1)
    found = replay(rules.Rule("", halving))
    assert found.steps == 2 * 120 + 240 + 3 * 480 == 12 * 480 / 3
    assert (found.chosen, found.accuracy["attention"], found.dropped) == ({"attention": 1}, 0.9, ["attention"])
    gone, worst, most = rules.lost(replay, found)
    assert (gone.value, worst, most) == (pytest.approx(0.1), "attention", pytest.approx(0.1))
    late = replay(rules.Rule("", HalvingSpec(rungs=(0.9,), reduction=2, seeds=None)))
    assert (late.chosen, late.dropped, late.steps) == ({"attention": 0}, [], 6 * 432 + 6 * 480)


def test_goals_end_trainings_and_what_they_cost_is_told(rules, replay):
    solved = replay(rules.Rule("", None, UntilSpec(at_least=0.995, every=40)))
    assert (solved.steps, solved.hopeless, solved.chosen) == (3 * 400 + 9 * 480, 0, {"attention": 0})
    hopeless = replay(rules.Rule("", None, UntilSpec(hopeless=0.5, every=40)))
    assert hopeless.steps == 6 * 240 + 6 * 480
    assert (hopeless.hopeless, len(hopeless.lost), hopeless.chosen) == (6, 3, {"attention": 1})
    assert hopeless.lost[0] == "attention trial 0 seed 0"


def test_a_diverged_training_is_not_chosen(rules, spec):
    trainings = made(rules, spec)
    for each in trainings:
        if each["trial"] == 0 and each["seed"] == 2:
            each.update(status="diverged", made=430, looks=each["looks"][:21])
    full = rules.Replay(spec, trainings).full
    assert full.chosen == {"attention": 1}
    assert full.steps == 11 * 480 + 430


def test_the_table_has_every_rule_and_the_paragraph_the_recipes(rules, spec, replay):
    told = rules.told(spec, made(rules, spec))
    rows = [line for line in told.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(rules.rules(spec))
    assert rows[2].startswith("| full grid | 100% | 100% | 12.00 | 0 of 1 | 0.0 (")
    assert rows[3].startswith("| the recipe's | 33% | 33% | 4.00 | 1 of 1 | 10.0 (")
    assert "the recipe's rule makes 33% of the full grid's steps" in told
    assert "5 points better for 1 mixer (`attention`)" in told


def test_what_is_printed_goes_between_the_marks_of_the_page(modules):
    _, halving = modules
    first, last = halving.MARKS
    assert halving.put(f"head\n{first}\nbefore\n{last}\nfoot\n", "words") == f"head\n{first}\n\nwords\n\n{last}\nfoot\n"
    assert halving.put(halving.DOCS.read_text(), "words").count("words\n\n" + last) == 1
    with pytest.raises(InputError, match="expected the lines"):
        halving.put("no marks", "words")


def test_the_grid_is_the_recipes_of_twelve_mixers(modules):
    _, halving = modules
    trainings = halving.grid(False).trainings()
    assert len(trainings) == 144
    assert {each.train.until for each in trainings} == {None}
    assert {each.train.steps % halving.PARTS for each in trainings} == {0}
