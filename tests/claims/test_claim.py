"""Claims as files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from contextlab.claims import claim_files, load_claim, spec_hash
from contextlab.errors import InputError
from contextlab.papers import find, verdicts

from .conftest import TINY


@pytest.mark.parametrize("name", claim_files())
def test_every_claim_that_ships_is_whole(name):
    claim = load_claim(name)
    spec = claim.experiment()
    assert claim.name == name == (spec.name if spec is not None else name)
    assert find(claim.paper).id == claim.paper
    assert spec is None or len(spec.seeds) >= 3
    assert claim.experiment(changes=claim.control) != spec or claim.measured(changes=claim.control) != claim.measured()
    if claim.gpu:
        assert claim.experiment("gpu") != spec


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sentense": "x"}, "sentense: unknown key; did you mean 'sentence'?"),
        ({"predicate": []}, "predicate: "),
        (
            {"predicate": [{**TINY["predicate"][0], "task": "linar"}]},
            "predicate.0.task: unknown task of the recipe 'linar'",
        ),
        ({"predicate": [{**TINY["predicate"][0], "weights": {"rigde": 1}}]}, "did you mean 'ridge'?"),
        ({"predicate": [{**TINY["predicate"][0], "split": "scaled inputs"}]}, "predicate.0.split: unknown split"),
        ({"recipe": {**TINY["recipe"], "models": {}}}, "models: expected at least one model"),
        (
            {"recipe": {**TINY["recipe"], "tasks": {"linear": {"task": "linear_regresion"}}}},
            "did you mean 'linear_regression'",
        ),
        ({"control": []}, "control: "),
    ],
)
def test_a_claim_that_cannot_be_decided_is_refused_in_one_line(written, changes, told):
    with pytest.raises(InputError) as error:
        load_claim(written(**changes))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_claim_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'transformers-match-least-squares'"):
        load_claim("transformer-matches-least-squares")
    with pytest.raises(InputError, match="unknown claim"):
        load_claim("not-there.yaml")


def test_a_claim_without_a_larger_form_says_so(tiny, written):
    with pytest.raises(InputError, match="no form for a GPU"):
        tiny.experiment("gpu")
    assert load_claim(written(gpu=["train.steps=2"])).experiment("gpu").train.steps == 2


def test_the_claim_in_the_docs_can_be_run(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "claims.md").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    assert load_claim(path).experiment().seeds == (0, 1, 2)


def test_published_verdicts_are_of_the_claims_as_they_stand():
    for name, record in verdicts().items():
        claim = load_claim(name)
        assert record["spec"] == spec_hash(claim), f"{name}: run it again, then python docs/claims_page.py"
        assert record["paper"] == claim.paper
        assert record["seeds"] is None or record["seeds"] >= 3
        assert record["verdict"] in ("holds", "fails", "unclear")
        assert not (record["verdict"] == "fails" and not claim.analysis), f"{name}: say why it fails"
