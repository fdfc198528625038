"""A training with a goal: it ends at the first look that is good enough, whatever stops it, alone or among others."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import pytest
import torch
from tiny_training import Sums, Tiny

from contextlab.errors import InputError
from contextlab.evaluation import evaluate
from contextlab.models import ModelSpec, build_model, preset
from contextlab.tasks import build_task
from contextlab.training import Member, TrainSpec, train, train_together
from contextlab.training.spec import UntilSpec
from contextlab.training.until import Until
from contextlab.training.validation import ValidationSpec, validate

SPEC = {"steps": 400, "batch": 32, "warmup": 5, "optimizer": "adamw", "learning_rate": 0.01, "log_every": 1000}
GOAL = {"at_most": 0.3, "every": 10, "prompts": 64}
STILL = {**SPEC, "learning_rate": 1e-30, "steps": 48}  # too small a rate to change anything


@dataclass(frozen=True)
class Guessed(Sums):
    """Knows what chance gives."""

    guess: float = 0.0

    def chance(self):
        return {"error": self.guess}


@pytest.fixture(scope="module")
def stopped():
    model = Tiny()
    return model, train(model, Sums(), {**SPEC, "until": GOAL})


def test_it_ends_at_the_first_look_that_is_good_enough_and_says_so(stopped):
    model, result = stopped
    assert (result.status, result.stopped) == ("finished", "solved")
    assert 10 < result.step < 400
    assert [look["step"] for look in result.looks] == list(range(10, result.step + 1, 10))
    values = [look["values"][0] for look in result.looks]
    assert all(value > 0.3 for value in values[:-1])
    assert values[-1] <= 0.3
    assert values[-1] == validate(model, Sums(), ValidationSpec(prompts=64), stream="until").value
    assert values[-1] != validate(model, Sums(), ValidationSpec(prompts=64)).value  # prompts of its own
    assert result.message.startswith(f"stopped after step {result.step} of 400: error was {values[-1]:.4g} on 64")
    assert result.history["step"].iloc[-1] == result.step


def test_until_then_it_is_the_training_without_a_goal(stopped):
    model, result = stopped
    plain = Tiny()

    class Enough(Exception):
        pass

    def progress(step, steps, loss):
        if step == result.step:
            raise Enough

    with pytest.raises(Enough):
        train(plain, Sums(), {**SPEC, "log_every": result.step}, progress=progress)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_goal_that_is_not_reached_changes_nothing():
    spec = {**SPEC, "steps": 20}
    one, other = Tiny(), Tiny()
    train(one, Sums(), spec)
    result = train(other, Sums(), {**spec, "until": {**GOAL, "at_most": 0.0, "every": 15}})
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert [look["step"] for look in result.looks] == [15, 20]
    assert (result.step, result.message) == (20, "")


def test_stopped_by_hand_it_goes_on_to_the_same_end(stopped, tmp_path):
    model, whole = stopped

    def stop(step, steps, loss):
        if step == 20:
            raise KeyboardInterrupt

    spec = {**SPEC, "until": GOAL, "checkpoint_every": 15}
    with pytest.raises(KeyboardInterrupt):
        train(Tiny(), Sums(), spec, folder=tmp_path, progress=stop)
    again = Tiny()
    result = train(again, Sums(), spec, folder=tmp_path, resume=True)
    assert (result.step, result.looks, result.message) == (whole.step, whole.looks, whole.message)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    read = train(Tiny(), Sums(), spec, folder=tmp_path, resume=True)  # it has ended
    assert (read.step, read.looks, read.message) == (whole.step, whole.looks, whole.message)


def test_members_of_one_program_end_each_at_its_own_look():
    task = build_task("linear_regression", dimensions=2, examples=3)
    spec = ModelSpec(layers=["attention"], width=8, depth=1, heads=1).for_task(task)
    goals = [{"at_most": 1e6, "every": every, "prompts": 8} for every in (2, 3)]
    members = [
        Member(build_model(spec, seed=seed), task, {"steps": 5, "batch": 4, "until": goal}, seed)
        for seed, goal in enumerate(goals)
    ]
    results = train_together(members, device="cpu")
    assert [result.step for result in results] == [2, 3]
    assert all(result.message.startswith("stopped after step") for result in results)


def test_what_is_no_better_than_chance_and_no_longer_improves_ends_late_in_its_steps(tmp_path):
    spec = {**STILL, "until": {"hopeless": 0.4, "every": 8, "prompts": 16}, "checkpoint_every": 5}
    result = train(Tiny(), Guessed(), spec)
    assert (result.status, result.stopped, result.step) == ("finished", "hopeless", 24)
    assert [look["step"] for look in result.looks] == [8, 16, 24]
    value = result.looks[-1]["values"][0]
    assert result.looks[-1]["ci_low"][0] < value < result.looks[-1]["ci_high"][0]
    assert result.message == (
        f"stopped: hopeless at step 24 of 48: error was {value:.4g} on 16 validation prompts, where chance gives 0, "
        f"and {value:.4g} at step 16"
    )

    def stop(step, steps, loss):
        if step == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Tiny(), Guessed(), spec, folder=tmp_path, progress=stop)
    for _ in range(2):  # it goes on to the same end, and is then only read
        again = train(Tiny(), Guessed(), spec, folder=tmp_path, resume=True)
        assert (again.step, again.looks, again.message) == (result.step, result.looks, result.message)
        assert again.stopped == "hopeless"


def test_what_improves_is_not_hopeless_and_comes_out_as_without_the_rule():
    one, other = Tiny(), Tiny()
    spec = {**SPEC, "steps": 24}
    train(one, Guessed(), spec)
    result = train(other, Guessed(), {**spec, "until": {"hopeless": 0.1, "every": 8, "prompts": 16}})
    assert (result.step, result.stopped, result.message) == (24, "", "")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    better = train(Tiny(), Guessed(guess=1e3), {**STILL, "until": {"hopeless": 0.1, "every": 8, "prompts": 16}})
    assert better.step == 48  # it does not improve, but is better than chance


@pytest.mark.parametrize(
    ("look", "hopeless"),
    [
        ({}, True),
        ({"step": 49}, False),
        ({"ci_high": [0.99]}, False),
        ({"ci_high": [1.0]}, True),
        ({"values": [1.09]}, False),
        ({"values": [1.2], "ci_high": [1.3]}, True),
        ({"values": [nan], "ci_low": [nan], "ci_high": [nan]}, True),
    ],
)
def test_hopeless_is_late_at_chance_and_no_better_than_before(look, hopeless):
    spec = TrainSpec(steps=100, until=UntilSpec(hopeless=0.5))
    until = Until(Tiny(), [Guessed(guess=1.0)], spec, torch.device("cpu"))
    before = {"step": 40, "values": [1.1], "ci_low": [1.0], "ci_high": [1.2]}
    now = {**before, "step": 50, **look}
    assert until.hopeless(now, before) is hopeless
    assert not until.hopeless(now, None)  # nothing to compare with
    assert not until.reached(now)


def test_of_two_tasks_one_that_is_learned_is_hope():
    spec = TrainSpec(steps=100, until=UntilSpec(hopeless=0.5))
    before = {"step": 40, "values": [1.1, 1.1], "ci_low": [1.0, 1.0], "ci_high": [1.2, 1.2]}
    for guess, hopeless in ((9.0, False), (1.1, True)):
        until = Until(Tiny(), [Guessed(guess=1.0), Guessed(guess=guess)], spec, torch.device("cpu"))
        assert until.hopeless({**before, "step": 50}, before) is hopeless


def test_a_share_is_at_chance_where_its_interval_begins_below():
    task = build_task("associative_recall", vocabulary=16, pairs=2, length=8)  # chance: 1 / 8
    model = build_model(ModelSpec(layers=["attention"], width=8, depth=1, heads=1).for_task(task))
    until = Until(model, [task], TrainSpec(steps=10, until=UntilSpec(hopeless=0.5)), torch.device("cpu"))
    before = {"step": 4, "values": [0.2], "ci_low": [0.1], "ci_high": [0.3]}
    assert until.hopeless({**before, "step": 5}, before)
    assert until.hopeless({**before, "step": 5, "ci_low": [0.125]}, before)
    assert not until.hopeless({**before, "step": 5, "ci_low": [0.13]}, before)
    assert not until.hopeless({**before, "step": 5, "values": [0.21]}, before)


def test_of_members_of_one_program_the_hopeless_one_ends():
    task = build_task("linear_regression", dimensions=2, examples=3)
    spec = ModelSpec(layers=["attention"], width=8, depth=1, heads=1).for_task(task)
    still = {**STILL, "steps": 8, "batch": 4, "until": {"hopeless": 0.5, "every": 2, "prompts": 8}}
    members = [Member(build_model(spec), task, each) for each in (still, {**still, "until": None})]
    results = train_together(members, device="cpu")
    assert [(result.step, result.stopped) for result in results] == [(4, "hopeless"), (8, "")]


def test_of_several_tasks_all_must_be_good_enough():
    tasks = [Sums(), Sums(scale=0.0)]
    until = Until(Tiny(), tasks, TrainSpec(until=UntilSpec(at_most=0.5)), torch.device("cpu"))
    assert until.reached({"step": 1, "values": [0.5, 0.1]})
    assert not until.reached({"step": 1, "values": [0.6, 0.1]})
    assert not until.reached({"step": 1, "values": [float("nan"), 0.1]})
    assert len(until.look(1)["values"]) == 2


def test_what_it_is_trained_on_does_not_count(monkeypatch):
    """A model that knows its examples by heart is not good."""
    spec = {**SPEC, "steps": 10, "examples": 8, "batch": 8, "until": {**GOAL, "prompts": 8}}
    seen = []
    monkeypatch.setattr(
        "contextlab.training.until.validate", lambda *args, apart, **more: seen.append(apart) or validate(*args, **more)
    )
    train(Tiny(), Sums(), spec, seed=3)
    from contextlab.training.examples import draw_examples

    known = draw_examples(Sums(), 8, 3)
    assert seen[0](known).batch == 0
    assert seen[0](draw_examples(Sums(), 8, 4)).batch == 8


@pytest.mark.parametrize(
    ("until", "message"),
    [
        ({}, "give either at_least .* or at_most"),
        ({"at_least": 1, "at_most": 2}, "give either"),
        ({"at_least": 0.9}, "until: error is better when smaller; give at_most"),
        ({"at_most": 0.9, "metric": "eror"}, "until.metric: unknown metric of this task 'eror'; did you mean 'error'"),
        ({"at_most": 0.9, "evry": 3}, "did you mean 'every'"),
        ({"hopeless": 0.5}, "until.hopeless: this task does not know what chance gives in error; leave hopeless out"),
        ({"hopeless": 0}, "until.hopeless: .*greater than 0"),
        ({"hopeless": 1}, "until.hopeless: .*less than 1"),
        ({"hopeless": nan}, "until.hopeless: .*finite"),
        ({"hopeless": True}, "until.hopeless: .*got bool True"),
        ({"hopeles": 0.5}, "did you mean 'hopeless'"),
    ],
)
def test_impossible_goals_are_refused_before_the_first_step(until, message):
    with pytest.raises(InputError, match=message) as caught:
        train(Tiny(), Sums(), {**SPEC, "until": until}, progress=lambda *_: pytest.fail("a step was made"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-5), (torch.bfloat16, 0.05)])
def test_a_model_of_another_dtype_is_looked_at_and_measured(dtype, off):
    task = build_task("linear_regression", dimensions=2, examples=4)
    model = build_model(preset("gated_delta_net", width=8, depth=1, heads=2).for_task(task), seed=0)
    expected = evaluate(model, task, prompts=16, splits=("train",))
    model.to(dtype)
    found = evaluate(model, task, prompts=16, splits=("train",))
    assert found["value"].tolist() == pytest.approx(expected["value"].tolist(), rel=off)
    goal = {"at_most": 1e-6, "every": 1, "prompts": 8}
    result = train(model, task, {"steps": 2, "batch": 4, "precision": "float32", "until": goal})
    assert [look["step"] for look in result.looks] == [1, 2]


def test_one_prompt_tells_nothing_of_chance_and_a_share_is_the_step_that_it_says():
    with pytest.raises(InputError, match="hopeless: the interval of one prompt is not known; give prompts, at least 2"):
        UntilSpec.parse({"hopeless": 0.5, "prompts": 1})
    spec = TrainSpec(steps=30, until=UntilSpec(hopeless=0.1))
    until = Until(Tiny(), [Guessed(guess=1.0)], spec, torch.device("cpu"))
    before = {"step": 2, "values": [0.1], "ci_low": [0.9], "ci_high": [1.1]}
    assert until.hopeless({**before, "step": 3}, before)
    assert not until.hopeless({**before, "step": 3, "ci_low": [nan], "ci_high": [nan]}, before)
