"""Finished runs for tests of what comes after: each is trained once, and a test gets a copy of its folder."""

from __future__ import annotations

import json
import shutil

import pytest

from contextlab import open_run, run


@pytest.fixture(autouse=True)
def _without_page(request, monkeypatch):
    """Half of a tiny run is its page, which tests/report has tests of: here those marked `page` have it drawn."""
    if "page" not in request.keywords:
        monkeypatch.setattr("contextlab.experiments.closing.build_report", lambda *args, **_: args[4].write_text(""))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Call it with a spec and a folder that is to hold a copy of the finished run. Returns that Run."""
    made = {}

    def copy(spec, folder):
        key = json.dumps(spec, sort_keys=True)
        if key not in made:
            made[key] = run(spec, out=tmp_path_factory.mktemp("finished") / "run").folder
        return open_run(shutil.copytree(made[key], folder))

    return copy
