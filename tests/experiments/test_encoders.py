"""A recipe of encoders and pooled ones: trained, measured and reported beside causal ones, or refused by the check."""

from __future__ import annotations

import pytest

from contextlab import run
from contextlab.errors import InputError
from contextlab.experiments import ExperimentSpec

ENCODER = {"spec": {"layers": ["encoder_attention"], "pool": "mean", "width": 16, "depth": 1, "heads": 2}}
SPEC = {
    "name": "encoders",
    "tasks": {
        "listops": {"task": "listops", "options": {"length": 24, "shortest": 5, "depth": 3, "arguments": 3}},
        "digits": {"task": "induction_head", "options": {"length": 8, "vocabulary": 4}},
        "curves": {
            "task": "pathfinder",
            "options": {"size": 10, "segments": 2, "distance": 2, "distractors": 0},
            "train": {"steps": 5},
        },
    },
    "models": {
        "encoder": ENCODER,
        "unpooled": {"spec": {**ENCODER["spec"], "pool": None}},
        "last": {"preset": "transformer", "options": {"width": 16, "depth": 1, "heads": 2, "pool": "last"}},
        "causal": {"preset": "transformer", "options": {"width": 16, "depth": 1, "heads": 2}},
    },
    "train": {"steps": 25, "batch": 16, "log_every": 1, "learning_rate": 0.01},
    "evaluate": {"prompts": 16, "batch": 16},
}


@pytest.mark.page
def test_a_recipe_of_encoders_is_trained_measured_and_reported(tmp_path):
    done = run(ExperimentSpec.parse(SPEC), out=tmp_path / "run")
    results = done.results
    measured = results[(results["kind"] == "model") & (results["metric"] == "accuracy") & results["shot"].isna()]
    splits = measured.groupby("task")["split"].nunique()
    assert len(measured) == 4 * splits.sum()
    assert measured["value"].between(0, 1).all()
    states = results[results["metric"] == "state_bytes"]
    assert set(states["model"]) == {"causal"}  # the others hand none on
    losses = results[(results["metric"] == "cross_entropy") & (results["split"] == "train") & results["shot"].isna()]
    losses = losses[(losses["kind"] == "model") & (losses["task"] == "listops")]
    assert (losses["value"] < 2.6).all()  # an untrained one has about log 15 = 2.7 or more
    report = (tmp_path / "run" / "report.html").read_text()
    assert "unpooled" in report


def test_a_task_of_many_predictions_is_refused_in_the_check(tmp_path):
    spec = {**SPEC, "tasks": {"copy": {"task": "copy", "preset": "easy"}}, "models": {"encoder": ENCODER}}
    with pytest.raises(InputError, match=r"^models.encoder \(for task copy\): pool: .* once a prompt; .*listops"):
        run(ExperimentSpec.parse(spec), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
