"""Specs: every wrong key is named with its path and its nearest valid name."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextlab import registry
from contextlab.errors import InputError
from contextlab.experiments import ExperimentSpec
from contextlab.models import ModelSpec, build_model, preset
from contextlab.spec import Spec, refuse_bools, refuse_counts, refuse_extremes
from contextlab.strict_yaml import DEEPEST, MOST_VALUES, parse_yaml
from contextlab.tasks import build_task
from contextlab.training import TrainSpec


def experiment(**changes):
    base = {
        "name": "tiny",
        "tasks": {"regression": {"task": "linear_regression", "options": {"dimensions": 2, "examples": 4}}},
        "models": {"transformer": {"preset": "transformer", "options": {"width": 8, "depth": 1, "heads": 2}}},
        "train": {"steps": 2, "batch": 4},
    }
    return {**base, **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (experiment(nmae="x"), "nmae: unknown key; did you mean 'name'?"),
        (
            {key: value for key, value in experiment(modells={}).items() if key != "models"},
            "modells: unknown key; did you mean 'models'?",
        ),
        (experiment(train={"stepz": 3}), "train.stepz: unknown key; did you mean 'steps'?"),
        (experiment(train={"steps": 0}), "train.steps: expected at least 1, got 0: transformer starts fresh"),
        (experiment(train={"steps": "many"}), "train.steps: input should be a valid integer"),
        (experiment(train={"optimizer": "muan"}), "did you mean 'muon'?"),
        (experiment(seeds=[]), "seeds: expected one or more different seeds"),
        (experiment(seeds=[-1]), "seeds.0: input should be greater than or equal to 0"),
        (experiment(tasks={}), "tasks: expected at least one task"),
        (
            experiment(tasks={"a": {"task": "linear_regresion"}}),
            "tasks.a.task: unknown task 'linear_regresion'; did you",
        ),
        (
            experiment(tasks={"a": {"task": "linear_regression", "options": {"nois": 1}}}),
            "tasks.a.options: unknown option 'nois' of task 'linear_regression'; did you mean 'noise'?",
        ),
        (
            experiment(tasks={"a": {"task": "associative_recall", "options": {"pairs": 80, "length": 400}}}),
            "64",
        ),
        (experiment(models={"a": {"preset": "transformr"}}), "did you mean 'transformer'?"),
        (experiment(models={"a": {}}), "give either preset"),
        (
            experiment(models={"a": {"preset": "transformer", "options": {"width": 30, "heads": 4}}}),
            "width 30 is not divisible by 4 heads; the nearest that divides it is 3",
        ),
        (
            experiment(models={"a": {"spec": {"layers": ["atention"]}}}),
            "did you mean 'attention'?",
        ),
        (
            experiment(models={"a": {"spec": {"layers": [{"mixer": "attention", "options": {"kv_head": 1}}]}}}),
            "did you mean 'kv_heads'?",
        ),
        (experiment(models={"a": {"preset": "transformer", "train": {"stepz": 1}}}), "models.a.train.stepz"),
        ([1, 2], "expected a mapping of ExperimentSpec's keys"),
    ],
)
def test_bad_specs_are_refused_in_one_line(data, message):
    with pytest.raises(InputError) as caught:
        ExperimentSpec.parse(data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_changes_reach_the_trainings():
    spec = ExperimentSpec.parse(
        experiment(
            models={
                "a": {"preset": "transformer", "options": {"width": 8, "heads": 2}, "train": {"batch": 6}},
                "b": {"preset": "transformer", "options": {"width": 8, "heads": 2}},
            },
            tasks={
                "regression": {
                    "task": "linear_regression",
                    "options": {"dimensions": 2, "examples": 4},
                    "model": {"depth": 3},
                    "train": {"steps": 7},
                }
            },
            seeds=[0, 5],
        )
    )
    trainings = spec.trainings()
    assert [t.key for t in trainings] == [
        "regression.a.seed0",
        "regression.a.seed5",
        "regression.b.seed0",
        "regression.b.seed5",
    ]
    assert trainings[0].model.depth == 3
    assert trainings[0].model.input_size == trainings[0].tasks["regression"].input_size
    assert (trainings[0].train.steps, trainings[0].train.batch) == (7, 6)
    assert (trainings[2].train.steps, trainings[2].train.batch) == (7, 4)


def multitask(**changes):
    linear = {"task": "linear_regression", "options": {"dimensions": 2, "examples": 4}, "train": {"steps": 9}}
    tree = {"task": "decision_tree", "options": {"dimensions": 2, "examples": 6, "depth": 1}}
    other = {"task": "linear_regression", "options": {"dimensions": 3, "examples": 4}}
    groups = {"mixed": {"tasks": ["linear", "tree"], "train": {"order": "mixed", "steps": 6}, "model": {"depth": 2}}}
    return experiment(**{"tasks": {"linear": linear, "tree": tree, "other": other}, "multitask": groups, **changes})


def test_a_group_of_tasks_is_one_more_training_of_each_model():
    trainings = ExperimentSpec.parse(multitask()).trainings()
    assert [t.key for t in trainings] == [
        "linear.transformer.seed0",
        "tree.transformer.seed0",
        "other.transformer.seed0",
        "mixed.transformer+mixed.seed0",
    ]
    last = trainings[-1]
    assert list(last.tasks) == list(last.evaluate) == ["linear", "tree"]
    assert (last.train.order, last.train.steps, last.train.batch) == ("mixed", 6, 4)
    assert (last.model.depth, trainings[0].model.depth) == (2, 1)
    assert last.tasks["tree"] == trainings[1].tasks["tree"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"multitask": {"mixed": {"tasks": ["linear", "tre"]}}},
            "multitask.mixed.tasks: unknown task of this experiment 'tre'; did you mean 'tree'?",
        ),
        (
            {"multitask": {"mixed": {"tasks": ["linear", "other"]}}},
            "multitask.mixed.tasks: input_size of 'other' is 7, of 'linear' 5; one model needs the same for all",
        ),
        ({"multitask": {"mixed": {"tasks": ["linear"]}}}, "multitask.mixed: tasks: expected two or more different"),
        ({"multitask": {"mixed": {"tasks": ["linear", "linear"]}}}, "expected two or more different tasks"),
        ({"multitask": {"tree": {"tasks": ["linear", "tree"]}}}, "multitask.tree: a task has this name, too"),
        (
            {"multitask": {"m": {"tasks": ["linear", "tree"], "train": {"order": "mix"}}}},
            "multitask.m.train.order: input should be 'sequential', 'mixed' or 'random'; did you mean 'mixed'?",
        ),
        (
            {"models": {name: {"preset": "transformer", "options": {"width": 8}} for name in ("a", "a+mixed")}},
            "multitask.mixed: a model is called 'a+mixed'",
        ),
    ],
)
def test_impossible_groups_are_refused(changes, message):
    with pytest.raises(InputError) as caught:
        ExperimentSpec.parse(multitask(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_specs_survive_a_round_trip():
    spec = ExperimentSpec.parse(experiment())
    assert ExperimentSpec.parse(spec.model_dump(mode="json", exclude_unset=True)) == spec
    assert ExperimentSpec.parse(spec.model_dump(mode="json")).trainings() == spec.trainings()


def test_schemas_can_be_exported():
    for spec in (ExperimentSpec, ModelSpec, TrainSpec):
        schema = spec.model_json_schema()
        assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelSpec(width=0), "width: input should be greater than 0, got int 0"),
        (lambda: ModelSpec(widht=8), "widht: unknown key; did you mean 'width'?"),
        (lambda: ModelSpec(layers=[{"mixer": "attention", "kv": "ow"}]), "layers.0.kv: input should be 'own' or"),
        (lambda: TrainSpec(betas=(True, 0.5)), "got bool True"),
        (lambda: TrainSpec(batch=True), "batch: expected a number, got bool True"),
        (lambda: TrainSpec(curriculum={"a": {"start": True, "end": 4}}), "start: expected a number, got bool True"),
        (lambda: preset("mambaformer", heads=3), "width 64 is not divisible by 3 heads; the nearest that divides it"),
        (lambda: build_model("mambaformer", heads=3), "width 64 is not divisible by 3 heads"),
        (lambda: build_model({"width": True}), "width: expected a number, got bool True"),
        (lambda: build_model({"layers": [{"mixer": "attention", "options": 3}]}), "layers.0.options: input should be"),
        (
            lambda: ModelSpec.parse({"layers": [{"mixer": "attention", "options": {"kv_heads": True}}]}),
            "kv_heads: expected a number, got bool True",
        ),
        (
            lambda: ModelSpec.parse({"mlp": {"kind": "swiglu", "options": {"ratio": True}}}),
            "ratio: expected a number, got bool True",
        ),
        (lambda: build_task("linear_regression", dimensions=True), "dimensions: expected a number, got bool True"),
        (lambda: registry.lookup("task", "linear_regression").check([1]), "expected a mapping of task"),
        (lambda: build_model(itself()), "nested too deeply, or in itself"),
    ],
)
def test_every_way_to_a_spec_gives_the_same_line(make, message):
    with pytest.raises(InputError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def itself():
    """A spec with options that hold themselves."""
    options = {}
    options["kv_heads"] = options
    return {"layers": [{"mixer": "attention", "options": options}]}


def test_switches_may_be_true_and_numbers_may_be_text():
    spec = ModelSpec.parse({"input_injection": False, "width": "16", "mlp_ratio": 2})
    assert (spec.input_injection, spec.width, spec.mlp_ratio) == (False, 16, 2.0)
    assert build_task("linear_regression", spectrum=2).spectrum == 2.0


@pytest.mark.parametrize(
    ("place", "wrap"),
    [
        ("", lambda value: value),
        (".1", lambda value: [3, value]),
        (".1.0", lambda value: (3, [value, 4])),
        (".a", lambda value: {"b": 3, "a": value}),
        (".a.0", lambda value: {"a": [value]}),
    ],
)
def test_true_is_no_number_wherever_it_stands(place, wrap):
    refuse_bools("x", wrap(True), wrap(True))  # a switch
    refuse_bools("x", wrap(1), wrap(1))
    with pytest.raises(InputError, match=f"^x{re.escape(place)}: expected a number, got bool True$"):
        refuse_bools("x", wrap(True), wrap(1))


@pytest.mark.parametrize("key", ["[", "a(b", "[\n"])
def test_an_unknown_key_may_look_like_anything(key):
    with pytest.raises(InputError, match="unknown key") as caught:
        TrainSpec.parse({key: None})
    assert repr(key) in str(caught.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=10,
    )
)
def test_no_input_gives_anything_but_a_spec_or_a_line(data):
    for spec in (ExperimentSpec, ModelSpec, TrainSpec):
        try:
            assert isinstance(spec.parse(data), Spec)
        except InputError as error:
            assert "\n" not in str(error)


def test_a_number_that_cannot_be_is_told_in_one_line_whatever_its_key():
    spec = {"layers": [{"mixer": "attention", "options": {"rope_scaling": {"kind\n": 10**20}}}]}
    for call in (
        lambda: refuse_extremes("a", {"b\n": 1e300}),
        lambda: refuse_extremes("a", [1.0, {"b\n": [2, 1e300]}]),
        lambda: refuse_counts("a", {"b\n": 9}, 8),
        lambda: ModelSpec.parse(spec),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_text_may_stand_for_so_many_values_and_no_more():
    fits = ",".join("1" for _ in range(MOST_VALUES - 3))  # the mapping, its key and the list are values, too
    assert len(parse_yaml(f"a: [{fits}]", "here")["a"]) == MOST_VALUES - 3
    with pytest.raises(InputError, match=f"stands for more than {MOST_VALUES} values"):
        parse_yaml(f"a: [{fits},1]", "here")


def test_a_text_is_refused_at_its_deepest_level_and_not_read_to_its_end():
    parse_yaml("[" * (DEEPEST - 1) + "1" + "]" * (DEEPEST - 1), "here")
    with pytest.raises(InputError, match=f"here: nested more than {DEEPEST} levels deep"):
        parse_yaml("[" * (DEEPEST + 1), "here")
