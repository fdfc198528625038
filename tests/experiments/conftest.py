"""Finished runs for tests of what comes after: each is trained once, and a test gets a copy of its folder."""

from __future__ import annotations

import json
import shutil

import pytest

from contextlab import open_run, run


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
