"""SweepSpec: which settings are tried, and what is refused before the first step, in one line."""

from __future__ import annotations

import numpy as np
import pytest

from contextlab.errors import InputError
from contextlab.experiments import ExperimentSpec
from contextlab.experiments.choice import Tried, best, told, window
from contextlab.experiments.jobs import Job, all_jobs
from contextlab.experiments.paths import flatten
from contextlab.experiments.sweep import SweepSpec
from contextlab.experiments.values import Values
from tests.experiments.test_run import MODEL, one, tiny


@pytest.mark.parametrize(
    ("values", "points"),
    [
        ([1e-3, 3e-3], [1e-3, 3e-3]),
        (["1e-3", "3.5E+2", "1e"], [1e-3, 350.0, "1e"]),
        (0.5, [0.5]),
        ({"log": [1e-4, 1e-2], "n": 5}, [0.0001, 0.000316228, 0.001, 0.00316228, 0.01]),
        ({"range": [1, 9], "n": 5}, [1, 3, 5, 7, 9]),
        ({"integers": [2, 6]}, [2, 3, 4, 5, 6]),
        ({"integers": [1, 8], "n": 3}, [1, 4, 8]),
        ({"log": [1e-4, 1e-2]}, None),
        (["adamw", "muon"], ["adamw", "muon"]),
    ],
)
def test_values_are_lists_and_ranges(values, points):
    assert Values.parse({"values": [1]}).points() == [1]
    sweep = SweepSpec.parse({"over": {"train.x": values}, "sampler": "random", "trials": 1})
    assert sweep.over["train.x"].points() == points
    assert SweepSpec.parse(sweep.model_dump(mode="json")) == sweep


def test_a_grid_is_every_combination_in_order_and_levels_are_paths():
    sweep = SweepSpec.parse({"over": {"train": {"steps": [1, 2]}, "options.width": [8, 16]}})
    assert sweep.settings() == [{"train.steps": steps, "options.width": width} for steps in (1, 2) for width in (8, 16)]
    assert SweepSpec().settings() == [{}]
    assert flatten({"options": {"a": {"log": [1, 2]}}}) == {"options.a": {"log": [1, 2]}}


def test_random_settings_follow_from_the_seed_lie_in_range_and_differ():
    over = {
        "train.learning_rate": {"log": [1e-4, 1e-2]},
        "train.batch": {"integers": [4, 6]},
        "train.optimizer": ["muon"],
    }
    drawn = SweepSpec.parse({"over": over, "sampler": "random", "trials": 300, "seed": 3}).settings()
    assert drawn == SweepSpec.parse({"over": over, "sampler": "random", "trials": 300, "seed": 3}).settings()
    assert drawn[:5] == SweepSpec.parse({"over": over, "sampler": "random", "trials": 5, "seed": 3}).settings()
    assert drawn != SweepSpec.parse({"over": over, "sampler": "random", "trials": 300}).settings()
    rates = [each["train.learning_rate"] for each in drawn]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert 0.4 < sum(rate < 1e-3 for rate in rates) / 300 < 0.6  # evenly on the logarithmic scale
    assert {each["train.batch"] for each in drawn} == {4, 5, 6}
    few = SweepSpec.parse({"over": {"train.batch": {"integers": [1, 9]}}, "sampler": "random", "trials": 9}).settings()
    assert len({each["train.batch"] for each in few}) == 9


LOG = {"log": [1e-4, 1e-2]}


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"over": {"train.learning_rat": [1]}}, "sweep.over.train.learning_rat: no field .*'train.learning_rate'"),
        ({"over": {"learning_rate": [1]}}, "did you mean 'train.learning_rate'"),
        ({"over": {"options.widht": [1]}}, "did you mean 'options.width'"),
        ({"over": {"width": [1]}}, "did you mean 'options.width'"),
        (
            {"over": {"models.softmx.train.steps": [1]}},
            "no model .* 'softmx'; did you mean 'models.softmax.train.steps'",
        ),
        ({"over": {"models.softmax.train.step": [1]}}, "did you mean 'models.softmax.train.steps'"),
        ({"over": {"tasks.recall.options.pairs": [1]}}, "sweep.over.tasks.recall.options.pairs: no field of a model"),
        (
            {"over": {"train.learning_rate": [1e-3, -1]}},
            "train.learning_rate=-1: models.softmax.train.learning_rate: .*0",
        ),
        ({"over": {"train.steps": [1.5]}}, "sweep.over: train.steps=1.5: models.softmax.train.steps"),
        ({"over": {"train.steps": [True]}}, "train.steps=True: .*expected a number"),
        ({"over": {"options.width": [8, 9]}}, "sweep.over: options.width=9: models.softmax .*heads"),
        ({"over": {"options.layers.3.mixer": ["gla"]}}, "options.layers.3.mixer"),
        ({"over": {"train.learning_rate": LOG}}, "over.train.learning_rate: a grid needs n"),
        ({"over": {"train.learning_rate": {"log": [1e-2, 1e-4], "n": 3}}}, "a smaller and a larger"),
        ({"over": {"train.learning_rate": {"log": [0, 1], "n": 3}}}, "greater than 0"),
        ({"over": {"train.learning_rate": {"log": [1, 2], "range": [1, 2]}}}, "one of log, range, integers"),
        ({"over": {"train.learning_rate": []}}, "at least 1"),
        ({"over": {"train.learning_rate": [1, 1]}}, "expected different ones"),
        ({"over": {"train.steps": [1]}, "trials": 3}, "a grid tries every combination"),
        ({"over": {"train.steps": [1]}, "sampler": "random"}, "trials: required by sampler 'random'"),
        ({"over": {"train.steps": [1, 2]}, "sampler": "random", "trials": 3}, "only 2 different settings"),
        ({"over": {"train.steps": {"integers": [1, 200]}, "train.batch": {"integers": [1, 200]}}}, "a grid of 40,000"),
        ({"over": {"train.steps": {"integers": [1, 20000]}}}, "more than 10000"),
        ({"over": {"train.steps": [1]}, "sampler": "grd"}, "did you mean 'grid'"),
        ({"ovr": {}}, "sweep.ovr: unknown key; did you mean 'over'"),
        ({"over": {"train": {"steps": [1]}, "train.steps": [2]}}, "over.train.steps: given twice"),
        ({"over": {"train.until.at_least": [0.5], "train.until": [None]}}, "train.until is swept too, and one would"),
        (
            {"over": {"options.width": [8, 16], "spec.width": [16]}},
            "over.spec.width: options.width is swept too",
        ),
        ({"over": {"options.layers.0.options.heads": [1]}}, "sweep spec.layers.0.options.heads"),
        ({"over": {"train.learning_rate.": [1]}}, "no field of a model or its training"),
        ({"over": {"train.clip": {"range": [1, 1.0000001]}}, "sampler": "random", "trials": 3}, "only 1 different"),
    ],
)
def test_an_impossible_sweep_is_refused_in_one_line(sweep, message):
    with pytest.raises(InputError, match=message) as caught:
        ExperimentSpec.parse(one(sweep=sweep))
    assert "\n" not in str(caught.value)


RATE = "train.learning_rate"
TIE = {"train.matrix_learning_rate": {"to": RATE, "times": 20 / 3}}


def test_a_tied_field_follows_the_swept_one_and_is_no_axis():
    own = {**MODEL, "sweep": {"tied": {"train.matrix_learning_rate": {"to": RATE, "times": 2}}}}
    free = {**MODEL, "sweep": {"tied": {"train.matrix_learning_rate": None}}}
    single = {**MODEL, "sweep": {"over": {RATE: None}}}
    models = {"softmax": MODEL, "own": own, "free": free, "single": single}
    spec = ExperimentSpec.parse(one(models=models, sweep={"over": {RATE: [3e-3, 6e-3]}, "tied": TIE}))
    found = {}
    for training in spec.trainings():
        assert set(training.setting) <= {RATE}
        pair = (training.train.learning_rate, training.train.matrix_learning_rate)
        found.setdefault(training.model_name, []).append(pair)
    default = spec.train.matrix_learning_rate
    assert found == {
        "softmax": [(3e-3, 0.02), (6e-3, 0.04)],
        "own": [(3e-3, 6e-3), (6e-3, 0.012)],
        "free": [(3e-3, default), (6e-3, default)],
        "single": [(spec.train.learning_rate, default)],
    }
    assert ExperimentSpec.parse(spec.model_dump(mode="json", exclude_unset=True)) == spec


def test_early_false_leaves_every_goal_of_a_training_unheeded():
    goal = {"until": {"at_least": 0.5}}
    models = {"softmax": {**MODEL, "train": goal}, "plain": MODEL}
    recipe = one(models=models, train={"steps": 6, "until": {"hopeless": 0.5}}, sweep={"over": {RATE: [1e-3, 1e-2]}})
    recipe["tasks"]["recall"] = {**recipe["tasks"]["recall"], "train": {"batch": 4, **goal}}
    assert all(each.train.until is not None for each in ExperimentSpec.parse(recipe).trainings())
    found = ExperimentSpec.parse({**recipe, "early": False}).trainings()
    assert [(each.train.until, each.train.steps, each.train.batch) for each in found] == [(None, 6, 4)] * 4
    swept = {**recipe, "early": False, "sweep": {"over": {"train.until.at_least": [0.5, 0.9]}}}
    with pytest.raises(InputError, match=r"^early: false leaves train.until.at_least unheeded, which is swept"):
        ExperimentSpec.parse(swept)
    with pytest.raises(InputError, match="early: .*true or false|early: .*bool"):
        ExperimentSpec.parse({**recipe, "early": "perhaps"})


def test_levels_of_tied_are_paths_and_whole_numbers_stay_whole():
    tied = {"train": {"warmup": {"to": "train.steps", "times": 0.5}}, "options": {"width": {"to": "train.batch"}}}
    over = {"train.steps": [4, 10], "train.batch": [8, 16]}
    spec = ExperimentSpec.parse(one(models={"softmax": MODEL}, sweep={"over": over, "tied": tied}))
    assert list(spec.sweep_spec("softmax").tied) == ["train.warmup", "options.width"]
    found = [(each.train.steps, each.train.warmup, each.train.batch, each.model.width) for each in spec.trainings()]
    assert found == [(4, 2, 8, 8), (4, 2, 16, 16), (10, 5, 8, 8), (10, 5, 16, 16)]


@pytest.mark.parametrize(
    ("tied", "message"),
    [
        ({"train.matrix_learning_rat": {"to": RATE}}, "tied.train.matrix_learning_rat: no field .*'train.matrix_l"),
        ({RATE: {"to": "train.batch"}}, "tied.train.learning_rate: train.learning_rate is swept, and one would undo"),
        (
            {"train.clip": {"to": "zzz"}},
            "tied.train.clip.to: zzz is not swept; expected one of train.learning_rate, tr",
        ),
        ({"train.clip": {"to": "train.learning_rat"}}, "is not swept; did you mean 'train.learning_rate'"),
        ({"train.clip": {"to": "train.optimizer"}}, "train.optimizer has the value str 'muon', which is no number"),
        ({"train.clip": {"to": RATE}, "train.warmup": {"to": "train.clip"}}, "train.clip is tied itself, and no chain"),
        ({"train.until": {"to": RATE}, "train.until.at_least": {"to": RATE}}, "is tied, too, and one would undo"),
        ({"train.clip": {"to": RATE, "times": 0}}, "tied.train.clip.times: .*greater than 0"),
        ({"train.clip": {"to": RATE, "times": float("nan")}}, "tied.train.clip.times: .*finite"),
        ({"train.clip": {"to": RATE, "times": True}}, "times: expected a number"),
        ({"train.clip": {"to": RATE, "tims": 2}}, "tied.train.clip.tims: unknown key; did you mean 'times'"),
        ({"train.clip": {"times": 2}}, "tied.train.clip.to: .*required"),
        ({"train.clip": RATE}, "tied.train.clip"),
        ({"train": {"clip": {"to": RATE}}, "train.clip": {"to": RATE}}, "tied.train.clip: given twice"),
        ({"train.steps": {"to": RATE, "times": 100}}, "learning_rate=0.003.* models.softmax.train.steps: .*integer"),
    ],
)
def test_impossible_ties_are_refused_in_one_line(tied, message):
    over = {RATE: [3e-3], "train.batch": [4], "train.optimizer": ["muon"]}
    with pytest.raises(InputError, match=message) as caught:
        ExperimentSpec.parse(one(sweep={"over": over, "tied": tied}))
    assert "\n" not in str(caught.value)


def test_null_unties_only_what_is_tied():
    models = {"softmax": {**MODEL, "sweep": {"tied": {"train.clp": None}}}}
    sweep = {"over": {RATE: [3e-3]}, "tied": {"train.clip": {"to": RATE}}}
    with pytest.raises(InputError, match="softmax.sweep.tied.train.clp: null .* did you mean 'train.clip'"):
        ExperimentSpec.parse(one(models=models, sweep=sweep))
    with pytest.raises(InputError, match="softmax.sweep.tied: expected a mapping"):
        ExperimentSpec.parse(one(models={"softmax": {**MODEL, "sweep": {"tied": [1]}}}, sweep=sweep))


def test_a_model_adds_replaces_and_takes_away():
    both = {
        "softmax": MODEL,
        "hybrid": {"preset": "transformer", "sweep": {"over": {"train.steps": [7], "train.batch": None}}},
    }
    spec = ExperimentSpec.parse(
        one(models=both, sweep={"over": {"train.batch": [2, 4], "models.softmax.options.depth": [1, 2]}})
    )
    assert spec.sweep_spec("softmax").settings() == [
        {"train.batch": batch, "options.depth": depth} for batch in (2, 4) for depth in (1, 2)
    ]
    assert spec.sweep_spec("hybrid").settings() == [{"train.steps": 7}]
    assert ExperimentSpec.parse(spec.model_dump(mode="json", exclude_unset=True)) == spec
    with pytest.raises(InputError, match="models.softmax.sweep.over.train.stps: .*'train.steps'"):
        ExperimentSpec.parse(one(models={"softmax": {**MODEL, "sweep": {"over": {"train.stps": [1]}}}}))


def test_null_takes_away_only_what_is_swept():
    models = {"softmax": {**MODEL, "sweep": {"over": {"train.bach": None}}}}
    with pytest.raises(InputError, match="softmax.sweep.over.train.bach: null .* did you mean 'train.batch'"):
        ExperimentSpec.parse(one(models=models, sweep={"over": {"train.batch": [2, 4]}}))


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_model_without_a_field_is_trained_once_whatever_others_draw(sampler):
    over = {"models.softmax.train.learning_rate": {"log": [1e-3, 1e-2]}}
    sweep = {"over": over, "sampler": sampler, "trials": 3}
    found = ExperimentSpec.parse(one(models={"softmax": MODEL, "plain": MODEL}, sweep=sweep)).trainings()
    assert [(each.model_name, each.trial) for each in found] == [*(("softmax", i) for i in range(3)), ("plain", None)]


def test_values_from_python_are_those_of_the_file():
    over = {
        "train.betas": [(0.9, 0.95), (0.9, 0.99)],
        "options.width": np.array([8, 16]),
        "train.clip": [np.float64(1)],
    }
    sweep = SweepSpec.parse({"over": over})
    assert sweep.settings()[0] == {"train.betas": [0.9, 0.95], "options.width": 8, "train.clip": 1.0}
    assert {type(each["options.width"]) for each in sweep.settings()} == {int}
    assert SweepSpec.parse(sweep.model_dump(mode="json")) == sweep


def test_one_of_two_numbers_is_swept_where_the_recipe_leaves_both_as_they_are():
    spec = ExperimentSpec.parse(one(sweep={"over": {"train.betas.1": [0.5, 0.75], "train.until.at_least": [0.5]}}))
    assert [each.train.betas[1] for each in spec.trainings()] == [0.5, 0.75]
    assert len({each.train.betas[0] for each in spec.trainings()}) == 1
    assert spec.trainings()[0].train.until.at_least == 0.5


def test_names_with_plus_are_told_apart():
    recall = tiny()["tasks"]["recall"]
    spec = one(tasks={"a": recall, "b": recall}, sweep={"over": {"train.steps": [2, 3]}})
    both = {"x+y": {"tasks": ["a", "b"]}}
    jobs = all_jobs(ExperimentSpec.parse({**spec, "multitask": both, "alone": False}))
    assert [job.model for job in jobs if job.kind != "learners"] == ["softmax+x+y"] * 3
    with pytest.raises(InputError, match="two trainings would be called 'm.x.y'"):
        ExperimentSpec.parse({**spec, "models": {"m": MODEL, "m+x": MODEL}, "multitask": {**both, "y": both["x+y"]}})


def test_a_trial_goes_before_what_the_task_says_of_the_model_and_of_training():
    tasks = {"recall": {**tiny()["tasks"]["recall"], "model": {"width": 32}, "train": {"steps": 9}}}
    spec = ExperimentSpec.parse(one(tasks=tasks, sweep={"over": {"options.width": [8], "train.steps": [5]}}))
    (training,) = spec.trainings()
    assert (training.model.width, training.train.steps) == (8, 5)


def test_what_a_preset_makes_is_reached_by_its_path():
    model = {"preset": "mamba2", "options": MODEL["options"]}
    path = "models.softmax.spec.layers.0.options.expand"
    spec = ExperimentSpec.parse(one(models={"softmax": model, "plain": model}, sweep={"over": {path: [1, 2]}}))
    found = [(each.model_name, each.model.layers[0].options.get("expand")) for each in spec.trainings()]
    assert found == [("softmax", 1), ("softmax", 2), ("plain", None)]
    with pytest.raises(InputError, match="spec.layers.0.options.expnd=1: .*expand"):
        ExperimentSpec.parse(one(models={"m": model}, sweep={"over": {"spec.layers.0.options.expnd": [1]}}))


def test_tasks_of_several_metrics_have_no_best_trial():
    tasks = {
        "tree": {"task": "decision_tree", "options": {"dimensions": 2, "examples": 6, "depth": 1}},
        "boolean": {"task": "boolean_function", "options": {"dimensions": 2, "examples": 6}},
    }
    spec = one(tasks=tasks, multitask={"all": {"tasks": list(tasks)}}, sweep={"over": {"train.steps": [1, 2]}})
    with pytest.raises(InputError, match="judged by different metrics, so that no trial is the best"):
        ExperimentSpec.parse(spec)


def tried(*values, statuses=("finished",)):
    return [Tried(i, {"train.x": 10**i}, statuses, value, value, value) for i, value in enumerate(values)]


def test_the_window_is_around_the_best_where_nothing_is_far_below():
    assert window(tried(0.2, 0.96, 1.0, 0.94, 0.99), "train.x", True) == (10, 100)
    assert window(tried(5.0, 1.05, 1.0, 1.06, 1.0), "train.x", False) == (10, 100)
    assert window(tried(1.0), "train.x", True) is None
    two = [Tried(i, {"train.x": x, "train.y": i}, ("finished",), v, v, v) for i, (x, v) in enumerate(
        [(1, 0.5), (1, 0.99), (2, 1.0), (2, 0.1), (3, 0.2)])]  # fmt: skip
    assert window(two, "train.x", True) == (1, 2)  # at each x the best y counts


def test_the_best_has_finished_from_every_seed_and_the_first_of_equals_is_taken():
    nan = float("nan")
    finished, not_all = ("finished", "finished"), ("finished", "diverged")
    first = Tried(0, {}, not_all, 1.0, 1.0, 1.0)
    others = [Tried(i, {}, finished, value, value, value) for i, value in enumerate((0.3, 0.5, 0.5), 1)]
    assert best([first, *others], True).number == 2
    assert best([first, *others], False).number == 1
    assert (
        best([Tried(0, {}, ("diverged",), nan, nan, nan), Tried(1, {}, ("failed",), nan, nan, nan)], True).number == 0
    )


def test_one_that_ended_as_hopeless_is_chosen_only_where_there_is_no_other():
    two = ("finished", "finished")

    def of(*trials):
        return [Tried(i, {}, two, value, value, value, stopped) for i, (value, *stopped) in enumerate(trials)]

    assert best(of((0.9, "", "hopeless"), (0.1, "", ""), (0.2, "solved", "")), True).number == 2
    assert best(of((0.9, "hopeless", "hopeless"), (0.1, "", "hopeless")), True).number == 1
    assert best(of((0.1, "hopeless", "hopeless"), (0.9, "hopeless", "hopeless")), True).number == 1
    half = Tried(0, {}, ("finished", "diverged"), 0.9, 0.9, 0.9, ("", "solved"))
    assert best([half, *of((0, ""), (0.1, "", "hopeless"))[1:]], True).number == 1  # it has a score from every seed


def test_a_score_that_is_no_number_counts_as_a_seed_that_did_not_finish():
    """Not as the mean of the others, which would be the best."""
    recall = tiny()["tasks"]["recall"]
    spec = ExperimentSpec.parse(
        one(tasks={"a": recall, "b": recall}, multitask={"both": {"tasks": ["a", "b"]}}, alone=False, seeds=[0, 1],
            sweep={"over": {"train.steps": [2, 3]}})
    )  # fmt: skip

    def record(job):
        values = {"a": 0.9, "b": None if job.seed else 0.1} if job.trial == 0 else {"a": 0.3, "b": 0.2}
        score = {"metric": "accuracy", "n": 8, "ci_low": None, "ci_high": None}
        return {"status": "finished", "validation": {name: {**score, "value": v} for name, v in values.items()}}

    found = told(spec, Job("training", "both", "softmax+both", 0), record)
    assert found["trial"] == 1
    curve = found["sweep"]["curve"]
    assert [each["statuses"] for each in curve] == [["finished", "no score"], ["finished", "finished"]]
    assert [each["value"] for each in curve] == pytest.approx([0.5, 0.25])
