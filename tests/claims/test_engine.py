"""Claims that are run: what is decided, kept and run again."""

from __future__ import annotations

import json
import shutil

import pytest

from contextlab.claims import claim_files, decided, engine, load_claim, run_claim, run_control, spec_hash
from contextlab.errors import InputError
from contextlab.files import read_record, write_record


def test_a_claim_runs_once_and_is_decided_by_its_intervals(tiny, tmp_path, monkeypatch):
    record = run_claim(tiny, folder=tmp_path / "claims", progress=False)
    assert record["verdict"] == "holds"
    (outcome,) = record["outcomes"]
    assert 0 < outcome["low"] <= outcome["value"] <= outcome["high"]
    assert record["cost"]["whole"]
    assert record["seeds"] == 3
    monkeypatch.setattr(engine, "run", None)  # it would be called again
    assert run_claim(tiny, folder=tmp_path / "claims") == record == decided(tiny, folder=tmp_path / "claims")


def test_the_mean_of_an_outcome_is_that_of_the_results(tiny, tmp_path):
    record = run_claim(tiny, folder=tmp_path, progress=False)
    from contextlab import open_run

    results = open_run(tmp_path / "tiny" / "run").results
    whole = results[results["shot"].isna() & (results["metric"] == "squared_error")]
    means = whole.groupby("model")["value"].mean()
    assert record["outcomes"][0]["value"] == pytest.approx(means["one"] - means["ridge"], rel=1e-6)


def test_too_few_seeds_decide_nothing(written, tmp_path):
    from .conftest import TINY

    claim = load_claim(written(recipe={**TINY["recipe"], "seeds": [0, 1]}))
    assert run_claim(claim, folder=tmp_path / "claims", progress=False)["verdict"] == "unclear"


def test_another_predicate_is_judged_anew_and_another_recipe_refused(written, tiny, tmp_path, monkeypatch):
    from .conftest import TINY

    before = run_claim(tiny, folder=tmp_path / "claims", progress=False)
    harder = load_claim(written(predicate=[{**TINY["predicate"][0], "at_least": 1e6}]))
    assert decided(harder, folder=tmp_path / "claims") is None
    record = run_claim(harder, folder=tmp_path / "claims", progress=False)
    assert record["verdict"] == "fails"
    assert record["cost"] == before["cost"]  # nothing was trained again
    told = load_claim(written(name="tiny", sentence="In other words."))
    assert decided(told, folder=tmp_path / "claims") is None  # of the harder predicate
    assert spec_hash(told) == before["spec"]
    other = load_claim(written(recipe={**TINY["recipe"], "train": {"steps": 2, "batch": 2}}))
    kept = (tmp_path / "claims" / "tiny" / "verdict.json").read_text()
    with pytest.raises(InputError, match="another form of claim tiny"):
        run_claim(other, folder=tmp_path / "claims", progress=False)
    assert (tmp_path / "claims" / "tiny" / "verdict.json").read_text() == kept


def test_an_interrupted_claim_goes_on(tiny, tmp_path, monkeypatch):
    class Stop:
        def __call__(self, step, steps, loss):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_claim(tiny, folder=tmp_path / "claims", progress=Stop())
    assert decided(tiny, folder=tmp_path / "claims") is None
    record = run_claim(tiny, folder=tmp_path / "claims", progress=False)
    whole = run_claim(tiny, folder=tmp_path / "others", progress=False)
    assert record["outcomes"] == whole["outcomes"]
    assert json.loads((tmp_path / "claims" / "tiny" / "verdict.json").read_text())["verdict"] == "holds"


@pytest.mark.parametrize("name", claim_files())
def test_the_negative_control_of_every_claim_fails(name, tmp_path):
    claim = load_claim(name)
    record = run_control(claim, tmp_path / "run")
    assert record["verdict"] == "fails", record["outcomes"]


def test_the_cost_of_a_run_that_was_removed_is_not_that_of_the_next(tiny, tmp_path):
    run_claim(tiny, folder=tmp_path, progress=False)
    verdict = tmp_path / "tiny" / "verdict.json"
    write_record(verdict, {**read_record(verdict), "spec": "older", "cost": {"processor_seconds": -1.0, "whole": True}})
    shutil.rmtree(tmp_path / "tiny" / "run")
    cost = run_claim(tiny, folder=tmp_path, progress=False)["cost"]
    assert cost["processor_seconds"] >= 0
    assert cost["whole"]
