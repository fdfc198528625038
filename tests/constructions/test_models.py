"""Constructions as models: by name, in files, in recipes, as the start of a training."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

from contextlab import InputError, build_model, load_model, registry, save_model, train
from contextlab.constructions import Construction, GradientDescentConstruction
from contextlab.experiments import ExperimentSpec
from contextlab.experiments.starts import new_model
from contextlab.models import ModelSpec, preset
from contextlab.tasks import build_task
from contextlab.training import TrainSpec

ENTRIES = [entry for entry in registry.entries("model") if entry.family == "construction"]
SMALL = {"dimensions": 3, "examples": 8, "vocabulary": 5, "length": 24, "longest": 6, "lines": 3, "cells": 2}
TASKS = {
    "induction_construction": build_task("induction_head", vocabulary=5, length=24, trigger="any"),
    "copy_construction": build_task("copy", vocabulary=5, shortest=2, longest=6),
    "subleq_construction": build_task("subleq", lines=3, cells=2),
}
ELSEWHERE = {"subleq_construction": TASKS["subleq_construction"].replace(steps=5)}
"""What it is trained on, where its own task leaves no error to learn from."""
EXAMPLES = build_task("linear_regression", dimensions=3, examples=8)


def small(entry):
    known = {parameter.name for parameter in entry.parameters}
    return entry.build(**{name: value for name, value in SMALL.items() if name in known})


def test_every_construction_is_a_model_by_name():
    import contextlab.constructions as room

    made = {each for each in vars(room).values() if inspect.isclass(each) and issubclass(each, Construction)}
    assert {entry.factory.construction for entry in ENTRIES} == {each for each in made if not inspect.isabstract(each)}
    for entry in ENTRIES:
        assert all(parameter.help for parameter in entry.parameters), entry.name
        assert entry.papers


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_it_can_be_saved_and_its_cases_are_made(entry, tmp_path):
    for case in entry.cases:
        assert entry.build(**case).construction.name == entry.name
    spec = small(entry)
    assert ModelSpec.parse(json.loads(spec.model_dump_json())) == spec
    model = build_model(spec, seed=1)
    assert model.spec == spec.made  # it has its weights, whatever becomes of them
    loaded = load_model(save_model(model, tmp_path))
    other = build_model(spec, seed=2)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])
        assert torch.equal(weight, other.state_dict()[name])


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_it_can_be_the_start_of_a_training(entry):
    """A step from the weights changes them, and nothing but the step does."""
    spec = small(entry)
    task = TASKS.get(entry.name, EXAMPLES if spec.pool is None else EXAMPLES.replace(query="random"))
    model = build_model(spec.for_task(task))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    train(model, ELSEWHERE.get(entry.name, task), TrainSpec(steps=1, batch=4, learning_rate=1e-3, warmup=0))
    changed = [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])]
    assert changed
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


def test_recipes_take_it_as_it_is_train_it_and_start_from_it(tmp_path):
    options = {"dimensions": 3, "steps": 2, "learning_rate": 0.2}
    fresh = build_model("gd_construction", **options)
    spec = ExperimentSpec.parse(
        {
            "name": "written",
            "tasks": {"linear": {"task": "linear_regression", "options": {"dimensions": 3, "examples": 8}}},
            "models": {
                "as_it_is": {"preset": "gd_construction", "options": options, "train": {"steps": 0}},
                "trained": {"preset": "gd_construction", "options": options},
                "from_it": {"from": str(save_model(fresh, tmp_path)), "replace": {"mixer": "attention"}},
            },
            "train": {"steps": 1, "batch": 4},
        }
    )
    as_it_is, trained, from_it = spec.trainings()
    for training in (as_it_is, trained):
        model, told = new_model(training)
        assert training.model.construction.name == "gd_construction"
        assert told == {}
        train(model, EXAMPLES, training.train)
        same = [torch.equal(weight, fresh.state_dict()[name]) for name, weight in model.state_dict().items()]
        assert all(same) == (training is as_it_is)
    assert from_it.model.construction is None  # other mixers have other weights
    model, told = new_model(from_it)
    assert torch.equal(model.read_in.weight, fresh.read_in.weight)
    assert "start" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 64}, "width: the weights of 'gd_construction' are written for 42, got 64; leave width out, or give"),
        ({"depth": 2}, "depth: the weights of 'gd_construction' are written for 1, got 2"),
        ({"learning_rat": 2}, "did you mean 'learning_rate'?"),
        ({"steps": 0}, "steps: input should be greater than 0"),
        ({"construction": {"name": "transformer"}}, "construction: unknown construction 'transformer'"),
        ({"construction": {"name": "gd_construction", "options": {"rate": 1}}}, "unknown option 'rate' of model"),
    ],
)
def test_a_spec_that_the_weights_do_not_fit_is_refused_in_one_line(options, message):
    with pytest.raises(InputError) as caught:
        build_model("gd_construction", **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_its_construction_the_weights_are_drawn():
    drawn = build_model("gd_construction", dimensions=3, construction=None, depth=2)
    assert len(drawn.blocks) == 2
    assert drawn.blocks[0].mixer.in_proj.weight.count_nonzero() == drawn.blocks[0].mixer.in_proj.weight.numel()


def test_steps_0_is_not_for_a_preset_that_is_drawn():
    data = {
        "name": "x",
        "tasks": {"linear": {"task": "linear_regression"}},
        "models": {"drawn": {"preset": "transformer"}},
        "train": {"steps": 0},
    }
    with pytest.raises(InputError, match="drawn starts fresh"):
        ExperimentSpec.parse(data)


def test_the_registry_knows_them_without_an_import_of_ones_own():
    assert preset("gd_construction", dimensions=2) == GradientDescentConstruction(2).spec()
