"""Recipes: found by name, changed by --set, refused when they are not what they should be."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from contextlab import registry
from contextlab.cli.catalogue import _first_sentence
from contextlab.errors import InputError
from contextlab.experiments import ExperimentSpec, load_recipe, recipes
from contextlab.experiments.recipes import find_recipe, read_yaml, set_key
from contextlab.experiments.stages import load_stages
from contextlab.models import ModelSpec
from contextlab.strict_yaml import check_tree, parse_yaml


def test_every_recipe_that_ships_is_a_valid_experiment():
    assert "demo" in {recipe.name for recipe in recipes()}
    for recipe in recipes():
        assert recipe.description
        specs: list[ExperimentSpec] = []
        if (stages := load_stages(recipe.name)) is not None:
            assert stages.name == recipe.name
            stages.each(lambda _, spec, specs=specs: specs.append(spec))
        else:
            specs.append(load_recipe(recipe.name))
            assert specs[0].name == recipe.name
        assert specs
        assert all(spec.trainings() for spec in specs)
    told = [_first_sentence(recipe.description) for recipe in recipes()]  # what `contextlab list recipes` tells
    assert len(set(told)) == len(told)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty; expected keys such as name, tasks, models"),
        ("# only a comment\n", "empty"),
        ("- a\n- b\n", "expected a mapping"),
        ("just words", "expected a mapping"),
        ("name: [1, 2", "not valid YAML at line"),
        ("name: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("a: " + "[" * 60 + "]" * 60, "nested more than 40 levels deep"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested more than 40 levels deep"),
        ("a: [" + "1," * 20_000 + "1]", "stands for more than 20000 values"),
        ("x: " + "y" * (1 << 20), "bytes; expected at most 1048576"),
        ("name: a\ntasks: {}\nname: b\n", "line 3, column 1: the key str 'name' stands twice in one mapping"),
        ("tasks:\n  a: {task: x, task: y}\n", "line 2, column 16: the key str 'task' stands twice"),
        ("a: &a {x: 1}\nb: {<<: [" + "*a," * 17 + "]}\n", "merges more than 16 mappings into one"),
        ("a: !!bool maybe", "a value cannot be read"),
        ("a: !!int ''", "a value cannot be read"),
        ("a: !!timestamp x", "a value cannot be read"),
        ("a: 2001-13-45", "a value cannot be read (month must be in 1..12)"),
        ("a: &a [*a]", "nested more than 40 levels deep"),
        ("a: *b", "not valid YAML at line 1, column 4: found undefined alias"),
        ("a: 1\n--- \nb: 2", "not valid YAML at line 2, column 1: but found another document"),
        ("{[1]: 2}", "found unhashable key"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(8)),
            "stands for more than 20000 values",
        ),
    ],
    ids=[
        "empty",
        "comment",
        "list",
        "words",
        "broken",
        "code",
        "nested",
        "recursion",
        "wide",
        "large",
        "bomb",
        *range(11),
    ],
)
def test_files_that_are_no_recipe_are_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_near_names_are_told(tmp_path):
    with pytest.raises(InputError, match=r"no such file"):
        find_recipe(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="unknown recipe 'demmo'; did you mean 'demo'"):
        find_recipe("demmo")
    with pytest.raises(InputError, match="is a folder"):
        find_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError):
        read_yaml(tmp_path / "binary.yaml")


def test_set_changes_keys():
    spec = load_recipe("demo", ["train.batch=32", "seeds=[1, 2]", "tasks.regression.options.noise=0.1"])
    assert spec.train.batch == 32
    assert spec.seeds == (1, 2)
    assert spec.build_task("regression").noise == 0.1
    data = {"a": [{"b": 1}]}
    set_key(data, "a.0.b=two")
    set_key(data, "c.d=3")
    assert data == {"a": [{"b": "two"}], "c": {"d": 3}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.steps", "expected path.to.key=value"),
        ("=3", "expected path.to.key=value"),
        ("seeds.7=3", "expected an index from 0 to 0"),
        ("name.first=x", "has no keys"),
        ("train.steps=[", "--set train.steps: '[': not valid YAML at line 1"),
        ("train.steps=" + "[" * 100, "nested more than 40 levels deep"),
        ("train.steps=[" + "1," * 20_000 + "]", "stands for more than 20000 values"),
        ("train.steps=" + "y" * (1 << 20 | 1), "1048577 characters; expected at most 1048576"),
        ("train.steps=" + "9" * 5000, "a value cannot be read"),
        ("train={steps: 1, steps: 2}", "the key str 'steps' stands twice in one mapping"),
        ("train.steps=&a [*a]", "nested more than 40 levels deep"),
        ("train." * 50 + "x=1", "nested more than 40 levels deep"),
        ("a." * 30 + "x=" + "[" * 20 + "]" * 20, "nested more than 40 levels deep"),
        ("train.steps=true", "train: steps: expected a number, got bool True"),
        ("tasks.regression.options.noise=true", "noise: expected a number, got bool True"),
        ("tasks.regression.options=3", "tasks.regression.options: input should be a valid dictionary, got int 3"),
        ("seeds=[true]", "seeds.0: expected a number, got bool True"),
        ("seeds.²=3", "expected an index from 0 to 0 of a list, got '²'"),
        ("\x1b[31m.x", "expected path.to.key=value"),
        ("train.stepz=3", "train.stepz: unknown key; did you mean 'steps'?"),
    ],
)
def test_bad_changes_are_refused(change, message):
    with pytest.raises(InputError) as caught:
        load_recipe("demo", [change])
    assert message in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_only_regular_files_are_recipes(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", "/dev/zero"):
        with pytest.raises(InputError, match="is a device or a pipe; expected a file"):
            load_recipe(path)
    for name in ("x" * 300, "x" * 300 + ".yaml", "a\0b", "a\nb.yaml"):
        with pytest.raises(InputError) as caught:
            load_recipe(name)
        assert str(caught.value).isprintable()


def test_what_yaml_allows_is_read():
    text = "base: &b {x: 1, y: [1.5, ~, on]}\nmore: {<<: *b, x: 2}\nlist: [*b, *b]\n1: one\nfeet: 1_000\n"
    base = {"x": 1, "y": [1.5, None, True]}
    read = {"base": base, "more": {**base, "x": 2}, "list": [base, base], 1: "one", "feet": 1000}
    assert parse_yaml(text, "text") == read
    assert parse_yaml("", "text") is None
    assert parse_yaml("[" * 39 + "1" + "]" * 39, "text") == eval("[" * 39 + "1" + "]" * 39)
    check_tree(list(range(19_999)), "text")
    with pytest.raises(InputError, match="text: stands for more than 20000 values"):
        check_tree(list(range(20_000)), "text")


def test_a_folder_that_bears_a_recipes_name_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # such as of a run with --out demo
    (tmp_path / "mine").mkdir()
    assert find_recipe("demo").name == "demo.yaml"
    with pytest.raises(InputError, match="mine: is a folder; expected"):
        find_recipe("mine")


@pytest.mark.parametrize("name", ["mixers-on-recall", "mixers-on-recall-quick"])
def test_the_comparison_of_mixers_has_every_causal_one(name):
    causal = {entry.name for entry in registry.entries("mixer") if entry.factory.causal}
    spec = load_recipe(name)
    assert set(spec.models) == causal - {"parallel", "token_shift"}  # made of others; below every model
    for entry, model in spec.models.items():
        assert [layer.mixer for layer in ModelSpec.parse(model.spec).pattern()] == ["token_shift", entry]


def test_the_quick_comparison_of_mixers_tries_four_rates_and_three_seeds_for_four_times_the_steps():
    spec = load_recipe("mixers-on-recall-quick")
    assert spec.seeds == (0, 1, 2)
    for name in spec.models:
        trainings = [each for each in spec.trainings() if each.model_name == name]
        rates = {(each.train.learning_rate, each.train.matrix_learning_rate) for each in trainings}
        assert rates == {(0.0015, 0.01), (0.003, 0.02), (0.006, 0.04), (0.012, 0.08)}
        assert len(trainings) == 4  # the others are trained at the chosen rate alone
        assert {each.train.until.at_least for each in trainings} == {0.995}
        steps, halving = trainings[0].train.steps, spec.halving_of(name)
        stages = [halving.step(rung, steps) for rung in range(len(halving.rungs))] + [steps]
        made = sum(
            trials * (end - begin) for trials, begin, end in zip(halving.sizes(4), [0, *stages], stages, strict=False)
        )
        assert halving.sizes(4)[-1] == 1
        assert halving.seeds * made + (3 - halving.seeds) * steps == 4 * steps
    whole = load_recipe("mixers-on-recall-quick", ["early=false"])
    assert whole.halving_of("gla") is None
    assert len(whole.trainings()) == 12 * len(spec.models)


SUITES = (
    "arithmetic",
    "boolean",
    "garg",
    "lra-text",
    "mad",
    "mambaformer",
    "multitask",
    "regbench",
    "ruler",
    "zoology",
)


@pytest.mark.parametrize("name", SUITES)
def test_the_quick_form_of_a_suite_tries_three_rates_from_three_seeds(name):
    spec = load_recipe(f"{name}-quick")
    assert spec.seeds == (0, 1, 2)
    groups = {}
    for each in spec.trainings():
        groups.setdefault((each.task_name, each.model_name), []).append(each)
    for (_, model), trainings in groups.items():
        halving = spec.halving_of(model)
        assert halving.seeds is None  # all of them decide
        assert halving.sizes(3) == [3, 1]
        lowest = min(each.train.learning_rate for each in trainings)
        rates = Counter(round(each.train.learning_rate / lowest, 6) for each in trainings)
        assert rates == {1: 3, 2: 3, 4: 3}
        ratios = [each.train.matrix_learning_rate / each.train.learning_rate for each in trainings]
        assert ratios == pytest.approx([ratios[0]] * 9, rel=1e-5)
    assert len(load_recipe(f"{name}-quick", ["early=false"]).trainings()) == len(spec.trainings())


def test_an_impossible_curriculum_is_refused_before_anything_is_trained() -> None:
    recipe = {
        "name": "short",
        "tasks": {
            "recall": {
                "task": "associative_recall",
                "options": {"vocabulary": 64, "pairs": 16, "length": 64, "test_pairs": [16]},
                "train": {"curriculum": {"length": {"start": 24, "end": 64, "add": 20, "every": 8}}},
            }
        },
        "models": {"small": {"preset": "lstm"}},
    }
    with pytest.raises(InputError, match=r"tasks.recall: train.curriculum: at step 0: pairs 16 do not fit"):
        ExperimentSpec.parse(recipe)
