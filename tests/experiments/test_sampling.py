"""Trials that Optuna chooses: the same whatever stops the work, better than chance, and refused without it."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from contextlab import run
from contextlab.errors import InputError, ResourceError
from contextlab.experiments import ExperimentSpec, evaluate_run, sampling
from contextlab.experiments.choice import Tried
from contextlab.experiments.run import Interrupted
from contextlab.experiments.sweep import SweepSpec
from tests.experiments.test_run import Tape, one, same_results

OVER = {"train.learning_rate": {"log": [1e-4, 1e-1]}, "train.batch": [2, 4], "train.warmup": {"integers": [0, 3]}}


def asked(**changes):
    sweep = {"over": OVER, "sampler": "tpe", "trials": 3, "validation": {"prompts": 8}}
    return one(**{"sweep": sweep, "seeds": [0, 1], **changes})


def test_without_the_package_it_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sampling, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="'tpe': the package optuna is not installed; pip install"):
        run(asked(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_sampler_may_ask_for_is_tried_beforehand():
    with pytest.raises(InputError, match="options.width=9"):
        ExperimentSpec.parse(asked(sweep={"over": {"options.width": [8, 9]}, "sampler": "tpe", "trials": 2}))
    with pytest.raises(InputError, match="train.final_fraction=2: .*less than or equal to 1"):
        wrong = {"train.final_fraction": {"range": [0, 2]}}
        ExperimentSpec.parse(asked(sweep={"over": wrong, "sampler": "gp", "trials": 2}))


def test_it_goes_on_to_the_same_trials_and_is_measured_again(tmp_path):
    pytest.importorskip("optuna")

    class Stop(Tape):
        def update(self, key, step, steps, loss):
            super().update(key, step, steps, loss)
            if key == "recall.softmax.trial1.seed1":
                raise KeyboardInterrupt

    spec = ExperimentSpec.parse(asked())
    planned = [each.setting for each in spec.trainings()]
    whole = run(spec, out=tmp_path / "whole")
    assert [each.setting for each in spec.trainings()] == planned  # the caller's spec is as it was
    assert whole.record["status"] == "finished"
    assert whole.sweep.groupby("trial").size().tolist() == [2, 2, 2]
    with pytest.raises(Interrupted):
        run(asked(), out=tmp_path / "cut", progress=Stop())
    resumed = run(asked(), out=tmp_path / "cut", resume=True)
    assert same_results(whole.results, resumed.results)
    pd.testing.assert_frame_equal(*(each.sweep.drop(columns="seconds") for each in (whole, resumed)), check_exact=True)
    again = evaluate_run(tmp_path / "cut", ["evaluate.prompts=8"])
    pd.testing.assert_frame_equal(again.sweep, resumed.sweep)
    assert again.records[0]["train_spec"]["batch"] == again.records[0]["setting"]["train.batch"]


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_it_comes_closer_than_random_settings_do(sampler):
    pytest.importorskip("optuna")
    if sampler == "gp":
        pytest.importorskip("scipy")
    sweep = SweepSpec.parse({"over": OVER, "sampler": sampler, "trials": 24})
    found: list[Tried] = []
    asked = sampling.Sampler(sweep, higher_is_better=False)
    for number in range(24):
        setting = asked.suggest()
        off = abs(math.log10(setting["train.learning_rate"] / 3e-3)) + (setting["train.batch"] == 2)
        lost = number == 3  # as if it had diverged
        off = math.nan if lost else off + setting["train.warmup"]
        found.append(Tried(number, setting, ("diverged" if lost else "finished",), off, off, off))
        asked.tell(found[-1])
        if number % 6 == 5:  # one that is told all of them at once, as where a run is gone on with, asks for the same
            anew = sampling.Sampler(sweep, higher_is_better=False)
            for each in found:
                anew.tell(each)
            assert anew.suggest() == asked.suggest() == asked.suggest()
    assert {type(each.setting["train.warmup"]) for each in found} == {int}
    late = [each.value for each in found[16:]]
    early = [each.value for each in found[:8] if not math.isnan(each.value)]
    assert sum(late) / len(late) < sum(early) / len(early)
