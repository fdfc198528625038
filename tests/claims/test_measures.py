"""Measures: steps, costs, forms and answers."""

from __future__ import annotations

import math
import re

import pandas as pd
import pytest
import torch

from contextlab.claims import MEASURES, decided, load_claim, run_claim, run_control
from contextlab.claims.forms import FORMS, drawn, masked_attention
from contextlab.errors import InputError

from .conftest import TINY

CPU = torch.device("cpu")
SOFTMAX = {"preset": "transformer", "options": {"width": 8, "depth": 1, "heads": 1, "input_size": 4, "output_size": 4}}
LINEAR = {**SOFTMAX, "preset": "lightning"}


def take(name, **options):
    entry = MEASURES[name]
    made = entry.factory(**entry.check(options))
    made.names(None)
    return made.rows(None, CPU)


@pytest.mark.parametrize("op", FORMS)
def test_forms_agree_and_not_with_another_ops(op):
    same = take("form_agreement", op=op, length=40, dim=4, draws=2)
    assert 0 < same["value"].max() < 1e-12
    other = "linear_attention" if op != "linear_attention" else "ssd"
    apart = take("form_agreement", op=op, length=40, dim=4, draws=2, defined_by=other)
    assert apart["value"].min() > 1e-3


def test_masked_attention_is_the_papers_sum():
    x = drawn(7, 2, 3, 1, 0, torch.float64, CPU)
    wanted = torch.zeros_like(x.v)
    for t in range(7):
        for s in range(t + 1):
            decay = x.g[:, s + 1 : t + 1].sum(1).exp()
            wanted[:, t] += (0.5 * decay * (x.q[:, t] * x.k[:, s]).sum(-1))[..., None] * x.v[:, s]
    assert torch.allclose(masked_attention(x.q, x.k, x.v, x.g, 0.5), wanted, atol=1e-12)


def test_times_are_of_every_form_or_model_length_and_turn():
    found = take("form_time", op="ssd", lengths=[8, 16], dim=4, turns=3)
    assert len(found) == 3 * 2 * 3
    assert (found["value"] > 0).all()
    models = take(
        "time", models={"a": SOFTMAX, "b": LINEAR}, lengths=[8, 16], what=["prefill", "decode", "train"], turns=2
    )
    assert len(models) == 2 * 2 * 3 * 2
    assert (models["value"] > 0).all()


def test_bytes_are_those_that_are_held():
    found = take("size", models={"a": SOFTMAX, "b": LINEAR}, lengths=[64, 128])
    held = found.set_index(["model", "metric", "length"])["value"]
    assert held["a", "state_bytes", 128] - held["a", "state_bytes", 64] == 64 * 2 * 8 * 4  # keys and values, float32
    assert held["b", "state_bytes", 128] == held["b", "state_bytes", 64]
    assert held["a", "parameters", 64] == held["a", "parameters", 128]


def answers(rate):
    return {
        "task": {"task": "linear_regression", "options": {"dimensions": 3, "examples": 6}},
        "models": {"written": {"preset": "gd_construction", "options": {"dimensions": 3, "learning_rate": 0.2}}},
        "learners": {"step": {"learner": "gradient_descent", "options": {"steps": 1, "step_size": rate}}},
        "than": "step", "prompts": 4, "draws": 2,
    }  # fmt: skip


def test_written_weights_answer_as_their_learner():
    assert take("answer_agreement", **answers(0.2))["value"].max() < 1e-12
    assert take("answer_agreement", **answers(0.3))["value"].min() > 0.1


UNTIL = {"at_most": -1e9, "every": 2}
STEPS = {"task": "linear", "at_most": -1e9}


@pytest.fixture
def recipe():
    return {**TINY["recipe"], "train": {"steps": 5, "batch": 2, "until": UNTIL}}


def predicate(**keys):
    return [{"said": "s", "task": "learned", "metric": "steps", "weights": {"one": 1}, **keys}]


@pytest.mark.parametrize(
    ("bound", "ends"), [(1e9, (2, 0, 2)), (-1e9, (5, 5, None))], ids=["at the first look", "never"]
)
def test_steps_are_known_from_one_look_to_the_next(written, recipe, tmp_path, bound, ends):
    recipe["train"]["until"] = {**UNTIL, "at_most": min(bound, -1e9)}
    claim = load_claim(
        written(recipe=recipe, measures={"learned": {"measure": "steps", "options": {**STEPS, "at_most": bound}}},
                predicate=[*predicate(at_least=0), *predicate(at_least=0, over={"metric": "prompts"})])
    )  # fmt: skip
    record = run_claim(claim, folder=tmp_path / "claims", progress=False)
    steps, share = record["outcomes"]
    assert (steps["value"], steps["low"], steps["high"]) == ends
    assert share["value"] == 0.5  # of two prompts a batch
    assert ("not reached by 3 of 3" in steps.get("note", "")) == math.isclose(bound, -1e9)


def test_steps_to_a_loss_are_read_from_the_log(tiny, tmp_path):
    from contextlab.claims.steps import Steps
    from contextlab.experiments import run

    found = run(tiny.experiment(), out=tmp_path / "run", progress=False)
    rows = Steps("linear", of="loss", at_most=1e9).rows(found, CPU)
    assert set(rows[rows["metric"] == "steps"]["value"]) == {1.0}
    assert len(rows) == 6


def test_a_claim_without_a_recipe_is_decided_once_and_its_control_fails(written, tmp_path, monkeypatch):
    claim = load_claim(
        written(recipe={}, measures={"same": {"measure": "answer_agreement", "options": answers(0.2) | {"draws": 3}}},
                predicate=[{"said": "s", "task": "same", "weights": {"written": 1}, "at_most": 1e-9}],
                control=["measures.same.options.learners.step.options.step_size=0.3"])
    )  # fmt: skip
    record = run_claim(claim, folder=tmp_path / "claims", progress=False)
    assert (record["verdict"], record["seeds"]) == ("holds", 3)
    assert record["cost"]["whole"]
    assert record["made_with"]["torch"] == torch.__version__
    assert run_control(claim, tmp_path / "control")["verdict"] == "fails"
    monkeypatch.setattr("contextlab.claims.answers.AnswerAgreement.rows", None)  # what was measured is kept
    assert decided(claim, folder=tmp_path / "claims") == record
    other = load_claim(written(**yaml_of(claim, at_most=1e-20)))
    again = run_claim(other, folder=tmp_path / "claims", progress=False)
    assert again["verdict"] == "fails"
    assert again["cost"] == record["cost"]


def yaml_of(claim, at_most):
    data = claim.model_dump(mode="json", exclude_unset=True)
    data["predicate"][0]["at_most"] = at_most
    return data


SSD = {"measure": "form_agreement", "options": {"op": "ssd"}}
FIRST = TINY["predicate"][0]


def ssd(**options):
    return {"measures": {"x": {"measure": "form_agreement", "options": options}}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"recipe": {}}, "expected a recipe or measures"),
        ({"measures": {"linear": SSD}}, "measures.linear: a task of the recipe has this name"),
        ({"measures": {"x": {"measure": "form_agrement"}}}, "x.measure: unknown measure 'form_agrement'; did you mean"),
        (ssd(op="sdd"), "measures.x.options.op: unknown op with several forms 'sdd'"),
        (ssd(op="ssd", lenght=3), "did you mean 'length'"),
        (ssd(op="ssd", length=-3), "measures.x.options.length"),
        (ssd(), "measures.x.options.op: measure 'form_agreement' requires it"),
        (
            {"measures": {"x": {"measure": "size", "options": {"lengths": [8], "models": {"a": {"preset": "gru2"}}}}}},
            "measures.x.options.models.a: unknown model 'gru2'",
        ),
        (
            {"measures": {"x": SSD}, "predicate": [{**FIRST, "task": "x"}]},
            "predicate.0.weights: unknown name of measure x 'one'",
        ),
        (
            {"measures": {"x": {"measure": "steps", "options": STEPS}}},
            "measures.x.options.of: one is not looked at as it trains",
        ),
        (
            {"predicate": [{**FIRST, "over": {"weights": {"rigde": 1}}}]},
            "predicate.0.over.weights: unknown model or learner 'rigde'; did you mean 'ridge'",
        ),
        (
            {"predicate": [{**FIRST, "slope": "length", "split": "lenght *"}]},
            "predicate.0.split: unknown split",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(written, changes, told):
    with pytest.raises(InputError) as error:
        load_claim(written(**changes))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


COMPRESSED = {
    "tasks": {"recall": {"task": "associative_recall", "options": {"vocabulary": 16, "pairs": 2, "length": 32}}},
    "models": {"one": {"preset": "transformer", "options": {"width": 8, "depth": 1, "heads": 2}}},
    "train": {"steps": 1, "batch": 2},
    "evaluate": {"prompts": 4, "splits": ["train"]},
    "seeds": [0, 1, 2],
    "compress": {
        "model": "one", "policies": ["chai:clusters=1,tokens=2", "random:sinks=0,window=1"], "prompts": 6,
        "tasks": ["mqar:pairs=2"], "lengths": [32], "budgets": ["50%"],
    },
}  # fmt: skip


def asked(metric, name, **bound):
    return {"said": f"{metric} of {name}", "task": "kept", "metric": metric, "weights": {name: 1}, **bound}


def test_policies_are_told_beside_the_full_cache_of_the_same_training(written, tmp_path):
    predicate = [
        asked("accuracy", "full", at_least=0),
        asked("excess_accuracy", "random:sinks=0,window=1", at_most=1),
        asked("excess_accuracy", "full", at_most=0),
        asked("bytes", "chai:clusters=1,tokens=2", at_most=0.8),
    ]
    measures = {"kept": {"measure": "policies", "options": {"task": "mqar:pairs=2", "budget": "50%"}}}
    claim = load_claim(written("kept", recipe=COMPRESSED, measures=measures, predicate=predicate))
    record = run_claim(claim, folder=tmp_path / "runs", progress=False)
    found = pd.read_parquet(tmp_path / "runs" / "kept" / "run" / "compress.parquet")
    means = found.groupby(["model", "metric"])["value"].mean()
    own, lost, nothing, size = record["outcomes"]
    assert own["value"] == pytest.approx(means["full", "accuracy"])
    assert lost["value"] == pytest.approx(
        means["full", "accuracy"] - means["random:sinks=0,window=1", "accuracy"], abs=1e-6
    )
    assert lost["low"] < lost["value"] < lost["high"]
    assert nothing["value"] == 0
    assert size["value"] == pytest.approx(
        means["chai:clusters=1,tokens=2", "state_bytes"] / means["full", "state_bytes"]
    )
    assert 0.75 < size["value"] < 0.8  # of two heads one keeps its keys, both their values; and which is told
    assert record["seeds"] == 3


@pytest.mark.parametrize(
    ("options", "recipe", "said"),
    [
        ({"task": "mqar"}, COMPRESSED, "did you mean 'mqar:pairs=2'"),
        ({"task": "mqar:pairs=2", "budget": "5%"}, COMPRESSED, "unknown budget of compress '5%'"),
        ({"task": "mqar:pairs=2", "length": 64}, COMPRESSED, "unknown length of compress '64'"),
        ({"task": "mqar:pairs=2"}, TINY["recipe"], "expected a recipe with compress"),
    ],
)
def test_policies_that_the_recipe_does_not_measure_are_refused(written, options, recipe, said):
    measures = {"kept": {"measure": "policies", "options": options}}
    with pytest.raises(InputError, match=re.escape(said)):
        load_claim(written("kept", recipe=recipe, measures=measures, predicate=[asked("bytes", "full", at_most=1)]))
