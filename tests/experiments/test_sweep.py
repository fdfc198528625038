"""Sweeps in a run: the best trial on validation prompts is what is measured, whatever stops or shares the work."""

from __future__ import annotations

import os
import shutil

import pandas as pd
import pytest
import torch
import yaml

from contextlab import open_run, run
from contextlab.errors import InputError
from contextlab.experiments import ExperimentSpec, evaluate_run, find_model
from contextlab.experiments.check import check
from contextlab.experiments.estimate import estimate
from contextlab.experiments.jobs import all_jobs, first_jobs
from contextlab.files import read_record
from contextlab.report import chosen_table
from contextlab.tasks.regression import LinearRegression
from contextlab.training.distributed import seeded
from contextlab.training.validation import ValidationSpec, validate
from tests.experiments.test_run import COMPRESS, MODEL, Tape, one, same_results, tiny

RATES = [1e-3, 3e-2]
LITTLE = {"prompts": 16, "batch": 16, "splits": ["train"], "similarity": 0}


def swept(**changes):
    """A run of one model on one task: two learning rates, two seeds."""
    sweep = {"over": {"train.learning_rate": RATES}, "validation": {"prompts": 32}}
    return one(**{"sweep": sweep, "evaluate": LITTLE, **changes})


def timeless(done):
    return done.sweep.drop(columns="seconds")


def test_a_sweep_of_one_value_is_the_plain_run(tmp_path, finished):
    plain = finished(one(), tmp_path / "plain")
    done = finished(one(sweep={"over": {"train.learning_rate": [1e-3]}}), tmp_path / "swept")
    assert same_results(plain.results, done.results)
    pd.testing.assert_frame_equal(plain.facets, done.facets, check_exact=True)
    (own,), (other,) = plain.records, done.records
    assert own["history"]["loss"] == other["history"]["loss"]
    assert (other["trial"], other["setting"]) == (0, {"train.learning_rate": 1e-3})
    weights = [next(each.folder.glob("trainings/*/step_*/*.safetensors")).read_bytes() for each in (plain, done)]
    assert weights[0] == weights[1]
    assert plain.sweep.empty


def test_every_trial_has_its_score_on_validation_prompts_and_the_best_mean_is_chosen(tmp_path, finished):
    spec = swept(seeds=[0, 1])
    done = finished(spec, tmp_path / "run")
    found = done.sweep
    assert list(zip(found["trial"], found["seed"], strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found["train.learning_rate"].tolist() == [RATES[0]] * 2 + [RATES[1]] * 2
    assert (found["n"] == 32).all()
    means = found.groupby("trial")["value"].mean()
    assert found.loc[found["chosen"], "trial"].unique().tolist() == [means.idxmax()]  # accuracy: higher is better
    for record in done.records:
        assert record["trial"] == means.idxmax()
        assert record["train_spec"]["learning_rate"] == record["setting"]["train.learning_rate"]
        curve = record["sweep"]["curve"]
        assert [each["value"] for each in curve] == pytest.approx(means.tolist())
        assert record["sweep"]["trials"] == 2
        assert list(record["sweep"]["windows"]) == ["train.learning_rate"]
    model = done.models("recall")["softmax:1"]  # the chosen one: its score is the one in the table
    score = validate(model, done.task("recall"), ValidationSpec(prompts=32))
    assert score.value == found.loc[found["chosen"] & (found["seed"] == 1), "value"].item()
    pd.testing.assert_frame_equal(open_run(done.folder).sweep, found)
    assert not list(done.folder.glob("trials/*/step_*"))  # let go; the best ones lie in trainings/
    assert find_model(done.folder / "trainings" / "recall.softmax.seed0")[0] == "recall.softmax.seed0"


def test_what_is_best_on_validation_is_chosen_even_where_it_is_worse_on_the_test(tmp_path, monkeypatch):
    """The validation's prompts alone are made to punish a model that has learned the task."""
    draw, own = LinearRegression.sample, seeded("validation", 0).initial_seed()

    def turned(self, batch, generator, device="cpu"):
        prompt = draw(self, batch, generator, device)
        if generator.initial_seed() == own:
            prompt.targets = -10 * prompt.targets
        return prompt

    monkeypatch.setattr(LinearRegression, "sample", turned)
    spec = one(
        tasks={"regression": tiny()["tasks"]["regression"]},
        evaluate={**LITTLE, "prompts": 64, "batch": 64, "learners": ["ridge"]},
    )
    spec["train"] = {"steps": 100, "batch": 32, "optimizer": "adamw"}
    path, rates = "train.learning_rate", (1e-2, 1e-9)
    done = run({**spec, "sweep": {"over": {path: list(rates)}}}, out=tmp_path / "run")
    errors = {}
    for number, rate in enumerate(rates):
        plain = run({**spec, "train": {**spec["train"], "learning_rate": rate}}, out=tmp_path / str(number))
        rows = plain.results[plain.results["shot"].isna() & (plain.results["model"] == "softmax")]
        errors[number] = rows.loc[(rows["metric"] == "squared_error") & (rows["split"] == "train"), "value"].item()
    assert errors[0] < errors[1]
    assert done.records[0]["setting"] == {path: 1e-9}
    assert same_results(done.results, plain.results)


def test_models_sweep_their_own_fields_or_none(tmp_path):
    models = {
        "softmax": {**MODEL, "sweep": {"over": {"options.width": [8, 16]}}},
        "delta": {
            "preset": "gated_delta_net",
            **{"options": MODEL["options"]},
            "sweep": {"over": {"train.steps": None}},
        },
    }
    spec = one(models=models, evaluate=LITTLE, sweep={"over": {"train.steps": [2, 3]}, "validation": {"prompts": 8}})
    done = run(spec, out=tmp_path / "run", progress=(tape := Tape()))
    assert sorted(tape.ended) == [
        "learners.recall", "recall.delta.seed0", "recall.softmax.seed0",
        *(f"recall.softmax.trial{number}.seed0" for number in range(4)),
    ]  # fmt: skip
    settings = [(row["options.width"], row["train.steps"]) for _, row in done.sweep.iterrows()]
    assert sorted(settings) == [(8, 2), (8, 3), (16, 2), (16, 3)]
    softmax, delta = (next(r for r in done.records if r["model"] == name) for name in models)
    assert softmax["steps"] == softmax["setting"]["train.steps"]
    assert softmax["model_spec"]["width"] == softmax["setting"]["options.width"]
    assert "sweep" not in delta
    assert delta["steps"] == 3


def test_trials_that_diverge_are_never_the_best(tmp_path):
    path = "train.learning_rate"
    spec = one(sweep={"over": {path: [1e30, 1e-3]}}, train={"steps": 20, "batch": 4, "clip": None, "warmup": 0})
    spec["train"]["optimizer"] = "adamw"
    done = run(spec, out=tmp_path / "run")
    assert done.sweep["status"].tolist() == ["diverged", "finished"]
    assert done.sweep["value"].isna().tolist() == [True, False]
    assert done.records[0]["setting"] == {path: 1e-3}
    assert done.record["status"] == "finished"
    none = run({**spec, "sweep": {"over": {path: [1e30, 1e29]}}}, out=tmp_path / "none")
    assert none.records[0]["status"] == "diverged"
    assert none.record["status"] == "finished"
    assert "softmax" not in set(none.results["model"])


EVENTS = ["recall.softmax.trial0.seed1 training", "recall.softmax.trial1.seed0 validating"] + [
    f"recall.softmax.seed{seed} {phase}" for seed, phase in ((0, "training"), (1, "evaluating"))
]


@pytest.mark.parametrize("last", EVENTS)
def test_killed_at_any_moment_it_goes_on_to_the_same_results(tmp_path, finished, last):
    class Dead(Tape):
        def phase(self, key, text):
            if f"{key} {text}" == last:
                os._exit(9)  # as by kill -9: nothing is written any more

    spec = swept(seeds=[0, 1])
    if (child := os.fork()) == 0:
        run(spec, out=tmp_path / "cut", progress=Dead())
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "cut" / "results.parquet").exists()
    resumed = run(spec, out=tmp_path / "cut", resume=True)
    whole = finished(spec, tmp_path / "whole")
    assert same_results(whole.results, resumed.results)
    pd.testing.assert_frame_equal(timeless(whole), timeless(resumed), check_exact=True)
    assert not list(resumed.folder.glob("trials/*/step_*"))


def test_a_finished_sweep_makes_again_what_is_lost(tmp_path, finished):
    spec = swept(seeds=[0, 1])
    whole = finished(spec, tmp_path / "run")
    folder = whole.folder
    shutil.rmtree(folder / "trainings" / "recall.softmax.seed1")  # with its weights, which no trial has any more
    (folder / "sweep.parquet").unlink()
    again = run(spec, out=folder, resume=True, progress=(tape := Tape()))
    assert tape.ended == {"recall.softmax.seed1": ("finished", "")}
    assert same_results(whole.results, again.results)
    pd.testing.assert_frame_equal(timeless(whole), timeless(again))


def test_a_trial_that_failed_is_tried_again_and_may_then_be_the_best(tmp_path, monkeypatch):
    from contextlab.experiments import work

    spec, real, best = swept(), work.score, []

    def failing(model, spec, training, device, apart):
        if training.trial == best[0]:
            raise RuntimeError("out of luck")
        return real(model, spec, training, device, apart)

    whole = run(spec, out=tmp_path / "whole")
    best.append(whole.records[0]["trial"])
    monkeypatch.setattr(work, "score", failing)
    failed = run(spec, out=tmp_path / "run")
    assert failed.record["status"] == "failed"
    assert [each["job"] for each in failed.record["failed"]] == [f"recall.softmax.trial{best[0]}.seed0"]
    assert failed.records[0]["trial"] == 1 - best[0]
    monkeypatch.setattr(work, "score", real)
    again = run(spec, out=tmp_path / "run", resume=True)
    assert again.record["status"] == "finished"
    assert same_results(whole.results, again.results)


def test_policies_are_measured_again_where_another_trial_is_the_best_by_now(tmp_path, monkeypatch):
    from contextlab.experiments import work

    part = {"compare": [], "policies": ["streaming_llm:sinks=2"], "budgets": ["50%"]}
    spec = {**COMPRESS, "models": {"softmax": MODEL}, "compress": {**COMPRESS["compress"], **part}, "seeds": [0]}
    spec["sweep"] = {"over": {"train.steps": [2, 3]}, "validation": {"prompts": 2}}
    real = work.score

    def failing(model, spec, training, device, apart):
        if training.trial == 1:
            raise RuntimeError("out of luck")
        return real(model, spec, training, device, apart)

    def better(*args):
        return {name: {**score, "value": 2.0} for name, score in real(*args).items()}

    monkeypatch.setattr(work, "score", failing)
    first = run(spec, out=tmp_path / "run")
    monkeypatch.setattr(work, "score", better)
    again = run(spec, out=tmp_path / "run", resume=True, progress=(tape := Tape()))
    assert (first.records[0]["trial"], again.records[0]["trial"]) == (0, 1)
    assert tape.ended.keys() == {"all.softmax+all.trial1.seed0", "all.softmax+all.seed0", "softmax+all.seed0.compress"}
    columns = ["model", "split", "metric"]
    found = [each.compressed.query("metric == 'cross_entropy'") for each in (first, again)]
    quality = [each.set_index(columns)["value"] for each in found]
    assert (quality[0] != quality[1]).all()


def test_what_is_done_is_not_taken_for_what_an_edited_recipe_says(tmp_path, finished):
    folder = finished(swept(), tmp_path / "run").folder
    edited = (folder / "experiment.yaml").read_text()
    assert "- 0.001\n" in edited
    (folder / "experiment.yaml").write_text(edited.replace("- 0.001\n", "- 0.0001\n    - 0.001\n", 1))
    with pytest.raises(InputError, match="trial0.*made with learning_rate 0.001, but .*says 0.0001;"):
        run(folder / "experiment.yaml", out=folder, resume=True)
    (folder / "experiment.yaml").write_text(edited.replace("- 0.03\n", "- 0.03\n    - 0.01\n", 1))
    added = run(folder / "experiment.yaml", out=folder, resume=True, progress=(tape := Tape()))
    assert "recall.softmax.trial2.seed0" in tape.ended
    assert "recall.softmax.trial0.seed0" not in tape.ended
    assert added.records[0]["sweep"]["trials"] == 3


def test_the_chosen_models_are_measured_again_without_training(tmp_path, finished):
    whole = finished(swept(seeds=[0, 1]), tmp_path / "run")
    done = evaluate_run(whole.folder, ["evaluate.prompts=24"], progress=(tape := Tape()))
    assert not tape.updates
    assert tape.ended.keys() == {"recall.softmax.seed0", "recall.softmax.seed1", "learners.recall"}
    assert same_results(done.results, run(swept(seeds=[0, 1], evaluate={**LITTLE, "prompts": 24}),
                                          out=tmp_path / "at once").results)  # fmt: skip
    pd.testing.assert_frame_equal(timeless(whole), timeless(done))


def test_the_estimate_counts_every_trial_and_check_tries_them_once(monkeypatch):
    spec = ExperimentSpec.parse(swept(seeds=[0, 1]))
    assert len(first_jobs(spec)) == 2 * 2 + 1
    assert len({job.key for job in all_jobs(spec)}) == len(all_jobs(spec)) == 2 * 2 + 1 + 2
    found = estimate(spec, torch.device("cpu"), threads=1)
    (training,) = found.trainings
    assert (training.trials, training.seeds, found.steps) == (2, 2, 2 * 2 * 3)
    expected = 4 * training.training + 2 * training.evaluating + sum(found.learners.values())
    assert found.seconds == pytest.approx(expected)
    widths = ExperimentSpec.parse(one(sweep={"over": {"options.width": [8, 16], "train.learning_rate": RATES}}))
    rows = estimate(widths, torch.device("cpu"), threads=1).trainings
    assert [(each.setting, each.trials) for each in rows] == [({"options.width": width}, 2) for width in (8, 16)]
    check(widths, torch.device("cpu"))


def test_records_of_trials_tell_their_setting_and_score(tmp_path, finished):
    done = finished(swept(seeds=[0, 1]), tmp_path / "run")
    record = read_record(done.folder / "trials" / "recall.softmax.trial1.seed0" / "record.json")
    assert (record["kind"], record["trial"], record["setting"]) == ("trial", 1, {"train.learning_rate": RATES[1]})
    assert record["validation"]["recall"]["metric"] == "accuracy"
    assert record["train_spec"]["learning_rate"] == RATES[1]


@pytest.mark.page
def test_a_hopeless_trial_ends_early_and_all_tables_say_so_and_what_is_tied(tmp_path):
    until = {"hopeless": 0.5, "every": 2, "prompts": 8}
    tied = {"train.matrix_learning_rate": {"to": "train.learning_rate", "times": 2}}
    sweep = {"over": {"train.learning_rate": [1e-20, 1e-2]}, "tied": tied, "validation": {"prompts": 32}}
    spec = swept(train={"steps": 8, "batch": 4, "until": until}, sweep=sweep)
    done = run(spec, out=tmp_path / "run")
    found = done.sweep
    assert (found["steps"][0], found["stopped"][0], found["status"][0]) == (4, "hopeless", "finished")
    assert found["train.matrix_learning_rate"].tolist() == [2e-20, 2e-2]
    trial = read_record(done.folder / "trials" / "recall.softmax.trial0.seed0" / "record.json")
    assert trial["message"].startswith("stopped: hopeless at step 4 of 8: accuracy was")
    assert (trial["stopped"], trial["tied"]) == ("hopeless", {"train.matrix_learning_rate": 2e-20})
    (record,) = done.records
    assert record["tied"]["train.matrix_learning_rate"] == 2 * record["setting"]["train.learning_rate"]
    stopped = [each["stopped"] for each in record["sweep"]["curve"]]
    assert stopped[0] == ["hopeless"]
    (row,) = chosen_table(done.records)
    assert row["field"] == "train.learning_rate"
    assert row["chosen"].endswith(f", with train.matrix_learning_rate {2 * record['setting'][row['field']]:.3g}")
    assert row["trials"] == f"2 ({stopped.count(['hopeless'])} of 2 trainings stopped: hopeless)"
    assert row["trials"] in done.report.read_text()


@pytest.mark.page
def test_trials_may_end_as_soon_as_they_are_good_enough(tmp_path):
    until = {"at_least": 0.0, "every": 2, "prompts": 8}  # any model is
    spec = swept(train={"steps": 6, "batch": 4, "until": until})
    done = run(spec, out=tmp_path / "run")
    assert done.sweep["steps"].tolist() == [2, 2]
    (record,) = done.records
    assert record["steps"] == 2
    assert [look["step"] for look in record["looks"]] == [2]
    assert record["stopped"] == "solved"
    assert done.sweep["stopped"].tolist() == ["solved", "solved"]
    assert record["message"].startswith("stopped after step 2 of 6: accuracy was")
    assert "stopped after step 2 of 6" in done.report.read_text()
    assert evaluate_run(done.folder, ["evaluate.prompts=8"]).records[0]["message"] == record["message"]
    with pytest.raises(InputError, match="models.softmax .*until: accuracy is better when larger; give at_least"):
        run(swept(train={"steps": 6, "batch": 4, "until": {"at_most": 0.1}}), out=tmp_path / "wrong")


def test_what_is_done_is_not_taken_for_another_task(tmp_path, finished):
    folder = finished(one(evaluate=LITTLE), tmp_path / "run").folder
    path, job = folder / "experiment.yaml", "trainings/recall.softmax.seed0/record.json"
    spec = yaml.safe_load(path.read_text())
    was = spec["tasks"]["recall"]["options"]["pairs"]
    spec["tasks"]["recall"]["options"]["pairs"] = was + 1
    path.write_text(yaml.safe_dump(spec))
    with pytest.raises(InputError, match=rf"made with tasks.recall.options.pairs {was}, but .*yaml says {was + 1};"):
        run(path, out=folder, resume=True)
    spec["tasks"]["recall"]["options"] |= {"pairs": was, "filler": "random"}  # as it is by default
    path.write_text(yaml.safe_dump(spec))
    assert run(path, out=folder, resume=True).record["status"] == "finished"
    (folder / "learners" / "recall.record.json").unlink()  # the model's own record tells of the task, too
    spec["tasks"]["recall"]["options"] |= {"filler": "blank"}
    path.write_text(yaml.safe_dump(spec))
    with pytest.raises(InputError, match=rf"{job}: made with tasks.recall.options.filler 'random', .* says 'blank'"):
        run(path, out=folder, resume=True)
