"""A claim of the smallest size, and runs without their page."""

from __future__ import annotations

import pytest
import yaml

from contextlab.claims import load_claim

TINY = {
    "paper": "1706.03762",
    "sentence": "A model that is not trained predicts as badly as it should.",
    "published": "nowhere",
    "scaled": "all",
    "recipe": {
        "tasks": {"linear": {"task": "linear_regression", "options": {"dimensions": 2, "examples": 4}}},
        "models": {"one": {"preset": "transformer", "options": {"width": 8, "depth": 1, "heads": 1}}},
        "train": {"steps": 1, "batch": 2},
        "evaluate": {"prompts": 16, "splits": ["train"]},
        "seeds": [0, 1, 2],
    },
    "predicate": [
        {"said": "error above that of ridge", "task": "linear", "weights": {"one": 1, "ridge": -1}, "at_least": 0.0}
    ],
    "control": ["train.batch=3"],
}


@pytest.fixture(autouse=True)
def _without_page(monkeypatch):
    monkeypatch.setattr("contextlab.experiments.closing.build_report", lambda *args, **_: args[4].write_text(""))


@pytest.fixture
def written(tmp_path):
    """Call it with changes of `TINY`'s keys: the path of a claim's file."""

    def write(name="tiny", **changes):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**TINY, **changes}))
        return path

    return write


@pytest.fixture
def tiny(written):
    return load_claim(written())
