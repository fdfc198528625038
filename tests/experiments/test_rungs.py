"""Sweeps whose trials are halved, in a run: the same bits, decisions and records, whatever stops or shares the work."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys

import pandas as pd
import pytest
import torch

from contextlab import run
from contextlab.errors import InputError
from contextlab.experiments import ExperimentSpec, evaluate_run, together
from contextlab.experiments.estimate import estimate
from contextlab.experiments.jobs import all_jobs, first_jobs
from contextlab.experiments.rungs import race_of
from contextlab.files import read_record
from contextlab.training.checkpoint import newest
from tests.experiments.test_run import Tape, one, same_results

PATH = "train.learning_rate"
RATES = [1e-9, 3e-2, 1e-3, 1e-8]
LITTLE = {"prompts": 16, "batch": 16, "splits": ["train"], "similarity": 0}
TRAIN = {"steps": 8, "batch": 8, "log_every": 3, "optimizer": "adamw", "warmup": 0}


def halved(halving=True, rates=RATES, **changes):
    """A run of one model on one task: four learning rates, rungs at steps 2 and 4 of 8, judged by cross-entropy."""
    if halving is True:
        halving = {"metric": "cross_entropy"}
    sweep = {"over": {PATH: rates}, "validation": {"prompts": 32}, "halving": halving}
    return one(**{"sweep": sweep, "evaluate": LITTLE, "train": TRAIN, **changes})


def timeless(done):
    return done.sweep.drop(columns="seconds")


def weights(folder, key):
    return (newest(folder / "trainings" / key) / "model.safetensors").read_bytes()


def test_the_winner_is_the_same_setting_trained_alone_bit_for_bit(tmp_path, finished):
    done = finished(halved(seeds=[0, 1]), tmp_path / "run")
    assert done.record["status"] == "finished"
    (rate,) = {record["setting"][PATH] for record in done.records}
    plain = run(one(evaluate=LITTLE, train={**TRAIN, "learning_rate": rate}, seeds=[0, 1]), out=tmp_path / "plain")
    assert same_results(plain.results, done.results)
    for own, other in zip(done.records, plain.records, strict=True):
        assert own["history"]["loss"] == other["history"]["loss"]
        assert own["history"]["step"] == [3, 6, 8]  # as if it had never paused
        assert weights(done.folder, own["key"]) == weights(plain.folder, own["key"])
    assert not list(done.folder.glob("trials/*/step_*"))


@pytest.mark.page
def test_records_table_and_report_tell_how_far_each_trial_got(tmp_path):
    done = run(halved(), out=tmp_path / "run")
    found = done.sweep
    assert set(found["seed"]) == {0}  # the first decides
    assert found["trial"].tolist() == [0, 1, 2, 3]
    assert found["rung_1"].notna().all()
    second = found["rung_2"].notna()
    assert second.sum() == 2
    assert found.loc[second, "rung_1"].max() <= found.loc[~second, "rung_1"].min()  # an error: the smaller go on
    assert found.loc[second, "rung_2"].idxmin() == found.index[found["chosen"]][0]
    assert found["steps"].tolist() == [4 if each else 2 for each in second]
    status = ["chosen" if chosen else "dropped" for chosen in found["chosen"]]
    assert found["status"].tolist() == status
    told = [f"{each} at step {steps} of 8" for each, steps in zip(status, found["steps"], strict=True)]
    assert found["told"].tolist() == told
    assert set(found["metric"]) == {"cross_entropy"}
    last = found["rung_2"].fillna(found["rung_1"])
    assert found["value"].tolist() == last.tolist()
    for number, words in enumerate(told):
        record = read_record(done.folder / "trials" / f"recall.softmax.trial{number}.seed0" / "record.json")
        assert (record["status"], record["message"]) == (status[number], words)
        assert [each["at"] for each in record["rungs"]] == [2, 4][: len(record["rungs"])]
    for record in done.records:
        sweep = record["sweep"]
        assert sweep["halving"]["at"] == "step 2 of 8"
        assert [each["trials"] for each in sweep["halving"]["rungs"]] == [4, 2]
        assert sweep["halving"]["left"] == [record["trial"]]
        assert sweep["halving"]["seeds"] == [0]
        assert list(sweep["halving"]["told"].values()) == told
        assert [each["value"] for each in sweep["curve"]] == pytest.approx(found["rung_1"].tolist())
        assert (sweep["metric"], sweep["higher_is_better"]) == ("cross_entropy", False)
        assert PATH in sweep["windows"]
    page = done.report.read_text()
    assert "step 2 of 8" in page
    assert "4, then 2, then 1" in page


def test_a_reduction_that_drops_none_is_the_full_grid(tmp_path, finished):
    rates = RATES[:2]
    grid = finished(halved(None, rates, seeds=[0, 1]), tmp_path / "grid")
    done = run(halved({"reduction": 1, "seeds": None}, rates, seeds=[0, 1]), out=tmp_path / "run")
    assert same_results(grid.results, done.results)
    columns = [name for name in grid.sweep if name != "seconds"]
    pd.testing.assert_frame_equal(grid.sweep[columns], done.sweep[columns], check_exact=True)
    for own, other in zip(done.records, grid.records, strict=True):
        assert own["sweep"].pop("halving")["at"] is None
        assert own["sweep"] == other["sweep"]
        assert weights(done.folder, own["key"]) == weights(grid.folder, own["key"])


EVENTS = ["recall.softmax.trial2.seed0 validating 4", "recall.softmax.seed0 training 0"]


@pytest.mark.parametrize("last", EVENTS)
def test_killed_at_any_moment_it_decides_the_same(tmp_path, finished, last):
    key, phase, step = last.split()

    class Dead(Tape):
        times = 0

        def phase(self, name, text):
            if (name, text) == (key, phase):
                self.times += 1
                if self.times == max(1, int(step) // 2):
                    os._exit(9)

    spec = halved(seeds=[0, 1])
    whole = finished(spec, tmp_path / "whole")
    assert whole.sweep.loc[whole.sweep["trial"] == 2, "rung_2"].notna().all()  # so that all these moments come
    if (child := os.fork()) == 0:
        run(spec, out=tmp_path / "cut", progress=Dead())
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    resumed = run(spec, out=tmp_path / "cut", resume=True)
    assert same_results(whole.results, resumed.results)
    pd.testing.assert_frame_equal(timeless(whole), timeless(resumed), check_exact=True)


def test_records_that_are_lost_are_made_again(tmp_path, finished):
    """One of a trial that had gone further is scored at its first rung as it was then, not as it is by now."""
    spec = halved(seeds=[0, 1])
    whole = finished(spec, tmp_path / "whole")

    class Stop(Tape):
        def phase(self, key, text):
            if (key, text) == ("recall.softmax.seed0", "training"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(spec, out=tmp_path / "cut", progress=Stop())
    further = [path.parent for path in tmp_path.glob("cut/trials/*/step_00000004")]
    assert len(further) == 2
    (further[0] / "record.json").unlink()
    resumed = run(spec, out=tmp_path / "cut", resume=True)
    assert same_results(whole.results, resumed.results)
    pd.testing.assert_frame_equal(timeless(whole), timeless(resumed), check_exact=True)


def test_two_workers_give_the_bits_of_one_process_and_are_measured_again(tmp_path, finished):
    whole = finished(halved(seeds=[0, 1]), tmp_path / "whole")
    done = run(halved(seeds=[0, 1]), out=tmp_path / "run", jobs=2, threads=1)
    assert same_results(whole.results, done.results)
    pd.testing.assert_frame_equal(timeless(whole), timeless(done), check_exact=True)
    again = evaluate_run(done.folder, ["evaluate.prompts=8"], progress=(tape := Tape()))
    assert tape.ended.keys() == {"recall.softmax.seed0", "recall.softmax.seed1", "learners.recall"}
    assert again.record["status"] == "finished"
    pd.testing.assert_frame_equal(again.sweep, done.sweep)


def test_a_finished_run_makes_again_what_is_lost(tmp_path, finished):
    whole = finished(halved(seeds=[0, 1]), tmp_path / "run")
    shutil.rmtree(whole.folder / "trainings" / "recall.softmax.seed0")  # with its weights, which no trial has any more
    again = run(halved(seeds=[0, 1]), out=whole.folder, resume=True, progress=(tape := Tape()))
    assert tape.ended.keys() == {"recall.softmax.seed0"}
    assert same_results(whole.results, again.results)


def test_a_trial_that_diverges_goes_last_and_one_that_fails_is_tried_again(tmp_path, monkeypatch):
    from contextlab.experiments import work

    rates, spec = [1e30, 3e-2, 1e-3], halved(None, train={**TRAIN, "clip": None})
    spec["sweep"] |= {"over": {PATH: rates}, "halving": {"metric": "cross_entropy", "rungs": [0.5]}}
    whole = run(spec, out=tmp_path / "whole")
    assert whole.sweep["status"].tolist()[0] == "diverged"
    assert len(whole.records[0]["sweep"]["halving"]["left"]) == 2  # of three; that which diverged is none of them
    assert whole.records[0]["sweep"]["halving"]["at"] is None
    assert whole.sweep["status"].tolist()[1:] == ["finished", "finished"]
    best, real = whole.records[0]["trial"], work.score

    def failing(model, spec, training, *rest):
        if training.trial == best:
            raise RuntimeError("out of luck")
        return real(model, spec, training, *rest)

    monkeypatch.setattr(work, "score", failing)
    failed = run(spec, out=tmp_path / "run")
    assert failed.record["status"] == "failed"
    assert failed.records[0]["trial"] == 3 - best
    monkeypatch.setattr(work, "score", real)
    again = run(spec, out=tmp_path / "run", resume=True)
    assert again.record["status"] == "finished"
    assert same_results(whole.results, again.results)
    assert again.sweep["value"].dropna().tolist() == whole.sweep["value"].dropna().tolist()


def test_where_the_one_that_is_left_diverges_the_next_best_goes_on(tmp_path, monkeypatch, finished):
    from contextlab.experiments import work

    whole = finished(halved(seeds=[0, 1]), tmp_path / "whole")
    table = whole.sweep
    first, second = table.dropna(subset="rung_2").sort_values("rung_2")["trial"].tolist()
    real = work.train

    def diverging(model, tasks, train, *, pause=None, **options):
        found = real(model, tasks, train, pause=pause, **options)
        if train.learning_rate == RATES[first] and found.step == 8:
            return dataclasses.replace(found, status="diverged", message="not finite")
        return found

    monkeypatch.setattr(work, "train", diverging)
    done = run(halved(seeds=[0, 1]), out=tmp_path / "run")
    assert done.record["status"] == "finished"
    assert {record["setting"][PATH] for record in done.records} == {RATES[second]}
    assert {record["status"] for record in done.records} == {"finished"}
    rows = done.sweep.set_index("trial")
    assert rows.loc[first, ["status", "told", "steps"]].tolist() == ["diverged", "not finite", 8]
    assert rows.loc[second, "told"] == "chosen at step 4 of 8"
    assert done.records[0]["sweep"]["halving"]["told"][str(first)] == "diverged"
    plain = run(one(evaluate=LITTLE, train={**TRAIN, "learning_rate": RATES[second]}), out=tmp_path / "plain")
    same = done.results[(done.results["seed"] == 0) | (done.results["kind"] == "learner")]
    assert same_results(plain.results, same)


def test_what_ended_by_its_goal_counts_with_its_last_score_and_is_trained_no_further(tmp_path):
    until = {"metric": "cross_entropy", "at_most": 1e9, "every": 1, "prompts": 8}  # any model is
    done = run(halved(train={**TRAIN, "until": until}), out=tmp_path / "run", progress=(tape := Tape()))
    assert done.sweep["steps"].tolist() == [1] * 4
    assert done.sweep["status"].tolist() == ["finished"] * 4
    assert done.sweep["rung_2"].isna().all()
    assert done.sweep["rung_1"].idxmin() == done.records[0]["trial"]
    assert done.records[0]["steps"] == 1
    assert {step for _, step in tape.updates} == {1}
    told = done.records[0]["sweep"]["halving"]["told"]
    assert told[str(done.records[0]["trial"])] == "chosen at step 4 of 8"


def test_what_ended_as_hopeless_goes_last_at_its_rung_and_in_the_choice_whatever_its_score(tmp_path, monkeypatch):
    from contextlab.experiments import work

    still, real = (0, 3), work.score  # trials whose weights do not move
    until = {"hopeless": 0.25, "metric": "cross_entropy", "every": 1, "prompts": 64}
    spec = halved(rates=[1e-30, 3e-3, 1e-3, 2e-30], train={**TRAIN, "until": until})

    def flattering(model, spec, training, *rest):
        found = real(model, spec, training, *rest)
        if training.trial in still:
            found["recall"]["value"] = 0.0
        return found

    monkeypatch.setattr(work, "score", flattering)
    done = run(spec, out=tmp_path / "halved")
    rows = done.sweep.set_index("trial")
    assert rows.loc[list(still), "stopped"].tolist() == ["hopeless"] * 2
    assert rows.loc[list(still), "rung_1"].tolist() == [0.0] * 2
    assert rows.loc[[1, 2], "rung_2"].notna().all()
    halving = done.records[0]["sweep"]["halving"]
    assert [halving["told"][str(trial)] for trial in still] == ["dropped at step 2 of 8 (hopeless)"] * 2
    assert done.records[0]["trial"] in (1, 2)


def test_what_ends_later_does_not_change_a_rung_that_was_held():
    until = {"hopeless": 0.25, "metric": "cross_entropy", "every": 1, "prompts": 64}
    spec = ExperimentSpec.parse(
        halved({"metric": "cross_entropy", "seeds": None}, train={**TRAIN, "until": until}, seeds=[0, 1, 2])
    )
    (job, *_) = spec.measured()
    ended = {}

    def record(of):
        score = {"recall": {"metric": "cross_entropy", "value": 1.0 + of.trial, "n": 8, "ci_low": 0, "ci_high": 9}}
        step = ended.get((of.trial, of.seed), 8)
        at = [
            {"at": each, "step": min(each, step), "validation": score} for each in (2, 4) if each <= step or each == 2
        ]
        return {"status": "finished", "steps": step, "stopped": "hopeless" if step < 8 else "", "rungs": at}

    def rounds():
        found = race_of(spec, job, record)
        return found.rounds[1], found.left

    assert rounds() == ((0, 1), (0,))
    ended[0, 1] = 4  # one seed of three, after the first rung
    assert rounds() == ((0, 1), (1,))
    ended[0, 1] = 2  # by the first rung: behind all others, and of four two go on
    assert rounds() == ((1, 2), (1,))
    ended |= {(trial, 0): 2 for trial in (1, 2, 3)}  # one seed of each: as if none had
    assert rounds() == ((0, 1), (0,))
    ended |= {(trial, seed): 2 for trial in range(4) for seed in range(3)}  # nobody has hope: the best alone
    assert race_of(spec, job, record).rounds == ((0, 1, 2, 3),)
    assert race_of(spec, job, record).left == (0,)


def test_an_edited_recipe_is_refused_where_it_contradicts_what_is_done(tmp_path, finished):
    folder = finished(halved(seeds=[0, 1]), tmp_path / "run").folder
    file = folder / "experiment.yaml"
    text = file.read_text()
    for new, message in (
        ("metric: cross_entropy\n    rungs: [0.5]", "it was scored at step 2, where sweep.halving has no such rung"),
        ("metric: accuracy", "it was scored by cross_entropy at its rungs, where sweep.halving asks for accuracy"),
    ):
        assert "metric: cross_entropy" in text
        file.write_text(text.replace("metric: cross_entropy", new, 1))
        with pytest.raises(InputError, match=message):
            run(file, out=folder, resume=True)
    grid = finished(halved(None, RATES[:2], seeds=[0, 1]), tmp_path / "grid").folder
    (grid / "experiment.yaml").write_text(
        (grid / "experiment.yaml").read_text().replace("halving: null", "halving: {}")
    )
    with pytest.raises(InputError, match="it was trained past step 2, where sweep.halving would score it"):
        run(grid / "experiment.yaml", out=grid, resume=True)


@pytest.mark.parametrize("edited", ["halving: null", "halving: {metric: cross_entropy, reduction: 1}"])
def test_a_run_whose_halving_is_taken_back_goes_on_to_the_full_grid(tmp_path, finished, edited):
    rates = RATES[:2]
    folder = finished(halved({"metric": "cross_entropy"}, rates), tmp_path / "run").folder
    file = folder / "experiment.yaml"
    file.write_text(file.read_text().replace("halving:\n    metric: cross_entropy", edited))
    whole = finished(halved(None, rates), tmp_path / "grid")
    done = run(file, out=folder, resume=True)
    assert same_results(whole.results, done.results)
    pd.testing.assert_frame_equal(timeless(whole), timeless(done)[list(timeless(whole))], check_exact=True)


def test_trials_that_are_added_make_others_go_on(tmp_path, finished):
    """Of five three go on: one that was dropped, and whose checkpoints have gone, among them."""
    five = [*RATES, 3e-3]
    folder = finished(halved(seeds=[0, 1]), tmp_path / "run").folder
    file = folder / "experiment.yaml"
    file.write_text(file.read_text().replace("- 1.0e-08\n", "- 1.0e-08\n    - 0.003\n", 1))
    whole = run(halved(rates=five, seeds=[0, 1]), out=tmp_path / "whole")
    assert whole.sweep["rung_2"].notna().sum() == 3
    done = run(file, out=folder, resume=True)
    assert same_results(whole.results, done.results)
    pd.testing.assert_frame_equal(timeless(whole), timeless(done), check_exact=True)


def test_a_model_of_several_tasks_is_halved_by_their_mean(tmp_path):
    tasks = {
        f"pairs{n}": {**one()["tasks"]["recall"], "options": {"vocabulary": 16, "pairs": n, "length": 8}}
        for n in (1, 2)
    }
    spec = halved(None, tasks=tasks, multitask={"both": {"tasks": list(tasks)}}, alone=False)
    spec["sweep"]["halving"] = {"rungs": [0.5], "metric": "cross_entropy"}
    spec["train"] = {**TRAIN, "examples": 64}
    done = run(spec, out=tmp_path / "run")
    assert len(done.sweep) == 4 * 2
    means = done.sweep.groupby("trial")["rung_1"].mean()
    (record,) = done.records
    assert record["sweep"]["halving"]["left"] == sorted(means.nsmallest(2).index)
    assert record["sweep"]["halving"]["rungs"][0]["scores"] == pytest.approx(
        {str(i): mean for i, mean in means.items()}
    )


def test_a_metric_that_the_task_lacks_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(
        InputError, match="sweep.halving.metric .*unknown metric of this task 'acuracy'; did you mean 'acc"
    ):
        run(halved({"metric": "acuracy"}), out=tmp_path / "run")
    assert not list(tmp_path.glob("run/trials/*"))


def test_the_estimate_counts_the_most_that_halving_can_take():
    spec = ExperimentSpec.parse(halved(seeds=[0, 1, 2]))
    assert [job.rung for job in first_jobs(spec)] == [0] * 4 + [None]
    assert {job.rung for job in all_jobs(spec)} == {None}
    found = estimate(spec, torch.device("cpu"), threads=1)
    # four to step 2, two on to 4, one on to its end, and the chosen one from two more seeds
    assert (found.count, found.steps) == (4 + 2, 4 * 2 + 2 * 2 + 4 + 2 * 8)
    (training,) = found.trainings
    work = (4 * 0.25 + 2 * 0.25 + 0.5 + 2) * training.training + 3 * training.evaluating
    assert found.seconds == pytest.approx(work + sum(found.learners.values()))
    none = ExperimentSpec.parse(halved({"reduction": 1, "seeds": None}, seeds=[0, 1]))
    assert estimate(none, torch.device("cpu"), threads=1).steps == 2 * 4 * 8


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_trials_that_train_together_pause_together(tmp_path, monkeypatch, finished):
    whole = finished(halved(seeds=[0, 1]), tmp_path / "whole")
    members, real = [], together.train_together

    def counting(group, **options):
        members.append([each.pause for each in group])
        return real(group, **options)

    monkeypatch.setattr(sys.modules["contextlab.experiments.run"], "wanted", lambda *_: True)
    monkeypatch.setattr(together, "train_together", counting)
    done = run(halved(seeds=[0, 1]), out=tmp_path / "run")
    assert members == [[2] * 4, [4] * 2, [None] * 2]  # and the rest of the chosen one, with the other seed
    assert done.sweep["told"].tolist() == whole.sweep["told"].tolist()
    keys = ["model", "seed", "metric", "shot", "length"]
    tables = [
        each.results[each.results["metric"] != "training_seconds"].sort_values(keys, ignore_index=True)
        for each in (done, whole)
    ]
    pd.testing.assert_frame_equal(*tables, rtol=1e-3, atol=1e-4)
    assert newest(done.folder / "trainings" / "recall.softmax.seed0").name == "step_00000008"
