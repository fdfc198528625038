"""A run whose recipe was edited, or whose trials were lost on their way: what is refused, what is decided again."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest

from contextlab import run
from contextlab.errors import InputError
from contextlab.experiments import ExperimentSpec, evaluate_run, work
from contextlab.experiments.trial import measured_training
from contextlab.files import read_record, write_record
from tests.experiments.test_run import MODEL, Tape, one, same_results
from tests.experiments.test_rungs import LITTLE, PATH, RATES, TRAIN, halved, timeless


def edited(folder, before, after):
    text = (folder / "experiment.yaml").read_text()
    assert before in text
    (folder / "experiment.yaml").write_text(text.replace(before, after, 1))
    return folder / "experiment.yaml"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("prompts: 32", "prompts: 31", "scored with sweep.validation.prompts 32, but .*experiment.yaml says 31"),
        ("steps: 8", "steps: 16", "made with steps 8, but .*experiment.yaml says 16"),
        ("pairs: 2", "pairs: 1", "made with tasks.recall.options.pairs 2, but .*experiment.yaml says 1"),
    ],
)
@pytest.mark.parametrize("measured", [False, True])
def test_what_was_made_otherwise_is_neither_gone_on_with_nor_measured_as_if_it_were(
    tmp_path, finished, before, after, message, measured
):
    folder = finished(halved(seeds=[0, 1]), tmp_path / "run").folder
    file = edited(folder, before, after)
    with pytest.raises(InputError, match=message):
        evaluate_run(folder) if measured else run(file, out=folder, resume=True)


def test_a_trial_that_was_measured_and_is_gone_is_told():
    spec = ExperimentSpec.parse(halved(False, RATES[:2]))
    (job,) = spec.measured()
    assert measured_training(spec, job, {"trial": 1}).setting == {PATH: RATES[1]}
    with pytest.raises(InputError, match="trial 2 was measured, but the recipe has 2 trials by now"):
        measured_training(spec, job, {"trial": 2})


def test_scores_at_rungs_of_what_was_interrupted_count_too(tmp_path, finished):
    folder = finished(halved(seeds=[0, 1]), tmp_path / "run").folder
    for path in folder.glob("trials/*/record.json"):
        write_record(path, {**read_record(path), "status": "interrupted"})
    file = edited(folder, "metric: cross_entropy", "metric: cross_entropy\n    rungs: [0.5, 0.75]")
    with pytest.raises(InputError, match="scored at step 2, where sweep.halving has no such rung"):
        run(file, out=folder, resume=True)


def test_a_reduction_by_which_all_trials_have_ended_already_is_decided_again(tmp_path, finished):
    folder = finished(halved(seeds=[0, 1]), tmp_path / "run").folder
    file = edited(folder, "metric: cross_entropy", "metric: cross_entropy\n    reduction: 4")
    whole = run(halved({"metric": "cross_entropy", "reduction": 4}, seeds=[0, 1]), out=tmp_path / "whole")
    done = run(file, out=folder, resume=True)
    assert same_results(whole.results, done.results)
    for own, other in zip(done.records, whole.records, strict=True):
        assert own["trial"] == other["trial"]
        for key in ("rungs", "left"):
            assert own["sweep"]["halving"][key] == other["sweep"]["halving"][key]
    assert [each["trials"] for each in done.records[0]["sweep"]["halving"]["rungs"]] == [4]


def test_where_all_that_went_on_diverge_the_next_best_take_their_place_whatever_stops_it(
    tmp_path, monkeypatch, finished
):
    table = finished(halved(seeds=[0, 1]), tmp_path / "whole").sweep
    lost = {RATES[trial] for trial in table.dropna(subset="rung_2")["trial"]}
    rest = table[table["rung_2"].isna()]
    real = work.train

    def diverging(model, tasks, train, *, pause=None, **options):
        found = real(model, tasks, train, pause=pause, **options)
        if train.learning_rate in lost and found.step > 2:
            return dataclasses.replace(found, status="diverged", message="not finite")
        return found

    monkeypatch.setattr(work, "train", diverging)
    done = run(halved(seeds=[0, 1]), out=tmp_path / "run")
    assert done.record["status"] == "finished"
    assert {record["status"] for record in done.records} == {"finished"}
    rows = done.sweep.set_index("trial")
    assert set(rows.index[rows["rung_2"].notna()]) == set(rest["trial"])
    assert rows["status"].value_counts().to_dict() == {"diverged": 2, "dropped": 1, "chosen": 1}
    assert rows.index[rows["chosen"]].tolist() == [rows["rung_2"].idxmin()]

    class Stop(Tape):
        """At the second rung, once it is known that one has diverged, and before the others go on."""

        def done(self, key, status, message):
            if sum(each[0] == "diverged" for each in self.ended.values()) == 1:
                raise KeyboardInterrupt
            super().done(key, status, message)

    with pytest.raises(KeyboardInterrupt):
        run(halved(seeds=[0, 1]), out=tmp_path / "cut", progress=Stop())
    resumed = run(halved(seeds=[0, 1]), out=tmp_path / "cut", resume=True)
    assert same_results(done.results, resumed.results)
    pd.testing.assert_frame_equal(timeless(done), timeless(resumed), check_exact=True)


def test_a_seed_that_failed_at_a_rung_is_scored_there_before_it_is_scored_later(tmp_path, monkeypatch):
    spec = halved({"reduction": 1, "seeds": None}, RATES[:2], seeds=[0, 1])
    whole = run(spec, out=tmp_path / "whole")
    real, calls = work.score, []

    def failing(model, spec, training, *rest):
        calls.append((training.trial, training.seed))
        if calls.count((0, 1)) == 1 and calls[-1] == (0, 1):
            raise RuntimeError("out of luck")
        return real(model, spec, training, *rest)

    monkeypatch.setattr(work, "score", failing)
    done = run(spec, out=tmp_path / "run")
    assert done.record["status"] == "finished"
    pd.testing.assert_frame_equal(timeless(whole), timeless(done), check_exact=True)
    assert done.sweep[["rung_1", "rung_2"]].notna().all(axis=None)
    assert same_results(whole.results, run(spec, out=tmp_path / "run", resume=True).results)


def test_what_is_in_pause_is_told_as_such_where_others_are_measured(tmp_path):
    models = {"softmax": MODEL, "plain": {**MODEL, "sweep": {"over": {PATH: None}}}}

    class Stop(Tape):
        def phase(self, key, text):
            if key == "recall.softmax.seed0":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(halved({"rungs": [0.25]}, RATES[:2], models=models), out=tmp_path / "run", progress=Stop())
    for path in (tmp_path / "run" / "trials").glob("*/record.json"):
        write_record(path, {**read_record(path), "status": "paused"})
    done = evaluate_run(tmp_path / "run")
    assert done.record["status"] == "failed"
    told = {each["job"]: each["message"] for each in done.record["failed"]}
    assert told["recall.softmax.trial1.seed0"] == "paused at step 2 of 8; go on with --resume"


def test_a_metric_that_one_of_two_equal_models_is_judged_by_is_tried_too(tmp_path):
    models = {"softmax": MODEL, "again": {**MODEL, "sweep": {"halving": {"metric": "acuracy"}}}}
    with pytest.raises(InputError, match="sweep.halving.metric .*did you mean 'accuracy'"):
        run(halved(models=models), out=tmp_path / "run")
    assert not list(tmp_path.glob("run/trials/*"))


def test_another_group_of_tasks_is_refused(tmp_path):
    tasks = {
        f"pairs{n}": {**one()["tasks"]["recall"], "options": {"vocabulary": 16, "pairs": n, "length": 8}}
        for n in (1, 2, 3)
    }
    spec = one(tasks=tasks, multitask={"both": {"tasks": ["pairs1", "pairs2"]}}, alone=False, evaluate=LITTLE)
    folder = run({**spec, "train": {**TRAIN, "steps": 2}}, out=tmp_path / "run").folder
    file = edited(folder, "- pairs2", "- pairs3")
    with pytest.raises(InputError, match="trained on pairs1, pairs2, but .* says pairs1, pairs3"):
        run(file, out=folder, resume=True)
