"""Runs whose trainings have a fixed set of prompts: what the record, the report and the check say of it."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from contextlab import run
from contextlab.cli import app
from contextlab.errors import InputError, ResourceError
from contextlab.experiments import ExperimentSpec
from contextlab.experiments.check import check
from contextlab.experiments.estimate import estimate
from contextlab.training.examples import draw_examples, fingerprints
from tests.experiments.test_run import MODEL, one, tiny

CPU = torch.device("cpu")
FIXED = {"examples": 10, "epochs": 3, "batch": 4, "log_every": 1}
FEW = {"recall": {"task": "mad_compression", "options": {"vocabulary": 3, "length": 5}}}  # 16 prompts in all


@pytest.mark.page
def test_the_record_and_the_report_tell_the_set(tmp_path):
    spec = one(tasks=FEW, train=FIXED, evaluate={"prompts": 200, "batch": 64, "splits": ["train"]}, seeds=[0, 1])
    done = run(spec, out=tmp_path / "run")
    task = done.task("recall")
    for record in done.records:
        known = fingerprints(draw_examples(task, 10, record["seed"]).inputs).unique()
        assert record["training_set"] == {"recall": {"examples": 10, "distinct": len(known), "epochs": 3.2}}
        assert record["steps"] == 8
        rows = done.results[(done.results["seed"] == record["seed"]) & (done.results["kind"] == "model")]
        measured = rows.loc[rows["metric"] == "accuracy", "n"].tolist()
        assert measured
        assert all(0 < n < 200 for n in measured), "prompts of the training set do not count"
    report = done.report.read_text()
    assert "<th>training set</th>" in report
    assert f"10 prompts ({len(known)} different), 3.2 epochs" in report
    learners = done.results[(done.results["kind"] == "learner") & (done.results["metric"] == "accuracy")]
    assert set(learners["n"]) == {200}, "those who were trained on nothing answer all"


def test_several_tasks_have_a_set_each(tmp_path):
    tasks = {name: {"task": "mad_recall", "options": {"length": n}} for name, n in (("short", 8), ("long", 12))}
    spec = one(
        tasks=tasks, multitask={"both": {"tasks": ["short", "long"]}}, alone=False,
        train={"examples": 8, "steps": 6, "batch": 4, "log_every": 1},
        evaluate={"prompts": 16, "splits": ["train"]},
    )  # fmt: skip
    told = run(spec, out=tmp_path / "run").records[0]["training_set"]
    assert {name: each["examples"] for name, each in told.items()} == {"short": 8, "long": 8}
    assert sum(each["epochs"] for each in told.values()) == 6 * 4 / 8
    with pytest.raises(InputError, match="multitask.both: train.epochs: 2 tasks take turns"):
        ExperimentSpec.parse({**spec, "train": FIXED})


def test_a_set_that_cannot_be_is_refused_before_the_first_step():
    large = ExperimentSpec.parse(one(train={"examples": 2_000_000_000, "steps": 5}))
    with pytest.raises(ResourceError, match="tasks.recall: train.examples 2000000000: what is kept of them takes"):
        check(large, CPU)


def test_the_check_tells_prompts_and_epochs(tmp_path):
    spec = one(train=FIXED)
    (found,) = estimate(ExperimentSpec.parse(spec), CPU).trainings
    assert (found.steps, found.prompts, found.epochs) == (8, 10, 3.2)
    (fresh,) = estimate(ExperimentSpec.parse(one()), CPU).trainings
    assert (fresh.prompts, fresh.epochs) == (12, 1)
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(spec))
    printed = CliRunner().invoke(app, ["run", str(path), "--check"])
    assert printed.exit_code == 0
    assert "10 x 3.2" in printed.output
    path.write_text(json.dumps(one()))
    printed = CliRunner().invoke(app, ["run", str(path), "--check"])
    assert printed.exit_code == 0
    assert "prompts" not in printed.output.split("An estimate")[0], "a column that would tell nothing"


def test_steps_and_epochs_in_a_recipe():
    spec = tiny(models={"m": MODEL}, train=FIXED)
    spec["tasks"]["recall"] = {**spec["tasks"]["recall"], "train": {"examples": 100}}
    assert [each.train.steps for each in ExperimentSpec.parse(spec).trainings()] == [8, 75]
    spec["tasks"]["recall"]["train"] = {"steps": 5}
    with pytest.raises(InputError, match="tasks.recall.train: steps 5 and epochs 3, which take 8 steps: give one"):
        ExperimentSpec.parse(spec)
    spec["tasks"]["recall"]["train"] = {"steps": 5, "epochs": None}
    assert [each.train.steps for each in ExperimentSpec.parse(spec).trainings()] == [8, 5]
