"""The splits that are measured: those that a task names, and options with a value."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from contextlab import build_task, registry
from contextlab.errors import InputError
from contextlab.evaluation import evaluate_learners
from contextlab.evaluation.spec import EvaluateSpec
from contextlab.evaluation.splits import STREAMS, chosen_splits, split_of
from contextlab.experiments import ExperimentSpec
from contextlab.experiments.check import check
from contextlab.policies.core.parse import written

RECALL = build_task("associative_recall", vocabulary=32, pairs=2, length=16)


def test_an_option_with_a_value_is_a_split():
    assert split_of(RECALL, "length=24") == RECALL.replace(length=24)
    assert split_of(RECALL, "length=32") == RECALL.splits()["length=32"]
    rows = evaluate_learners(RECALL, prompts=4, splits=("train", "length=24"))
    assert list(rows["split"].unique()) == ["train", "length=24"]
    assert set(rows[rows["split"] == "length=24"]["length"]) == {24}


@pytest.mark.parametrize("name", registry.names("task"))
def test_every_split_that_tasks_name_has_its_own_stream_of_prompts(name):
    found = list(registry.lookup("task", name).build(**registry.lookup("task", name).cases[0]).splits())
    assert len(found) < STREAMS


@pytest.mark.parametrize("name", registry.names("task"))
def test_every_option_of_every_task_is_read_as_it_is_written(name):
    entry = registry.lookup("task", name)
    task = entry.build(**entry.cases[0])
    for option in (each.name for each in dataclasses.fields(task) if each.init):
        value = getattr(task, option)
        if isinstance(value, int | float | str | None):
            assert getattr(split_of(task, f"{option}={written(value)}"), option) == value


def test_the_prompts_of_an_option_do_not_depend_on_what_else_is_measured():
    alone = {name: index for name, index, _ in chosen_splits(RECALL, EvaluateSpec(splits=("length=24",)))}
    among = {
        name: index for name, index, _ in chosen_splits(RECALL, EvaluateSpec(splits=("pairs=1", "length=24", "train")))
    }
    assert list(among) == ["train", "pairs=1", "length=24"]
    assert alone["length=24"] == among["length=24"]
    rows = evaluate_learners(RECALL, prompts=4, splits=("length=24",), learners=("lookup",))
    assert rows["value"].equals(
        evaluate_learners(RECALL, prompts=4, splits=("train", "length=24"), learners=("lookup",))
        .query("split == 'length=24'")["value"]
        .reset_index(drop=True)
    )


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lenght=24", "did you mean 'length=32'.* or option=value: unknown option 'lenght'; did you mean 'length'"),
        ("trian", "unknown split 'trian'; did you mean 'train'"),
        ("length=many", "length: input should be a valid integer"),
        ("length=", "length"),
        ("pairs=-1", "pairs: input should be greater than"),
        ("pairs=99", "pairs"),
        ("vocabulary=64", "split 'vocabulary=64': its input_size is 64, and that of training 32"),
    ],
)
def test_what_is_no_split_is_refused_in_one_line(name, told):
    with pytest.raises(InputError, match=told) as error:
        evaluate_learners(RECALL, prompts=4, splits=(name,))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("evaluate.splits: ")


def test_a_recipe_that_names_one_is_checked_before_the_first_step():
    def spec(split):
        task = {"task": "associative_recall", "options": {"vocabulary": 32, "pairs": 2, "length": 16}}
        return ExperimentSpec.parse(
            {
                "name": "x",
                "tasks": {"recall": task},
                "models": {"one": {"preset": "transformer", "options": {"width": 8, "depth": 1, "heads": 2}}},
                "train": {"steps": 1},
                "evaluate": {"splits": ["train", split], "prompts": 4},
            },
            "",
        )

    check(spec("length=24"), torch.device("cpu"))
    with pytest.raises(InputError, match=r"^evaluate.splits \(for task recall\): .*pairs"):
        check(spec("pairs=9999"), torch.device("cpu"))
