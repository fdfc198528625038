"""`--on` and `--log` reach the run."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from contextlab import experiments
from contextlab.cli.commands import app


@pytest.mark.parametrize("command", [["run", "demo"], ["sweep", "demo", "--over", "train.learning_rate=1e-3,1e-2"]])
def test_options_reach_the_run(command, monkeypatch):
    told = {}

    def stop(spec, **options):
        told.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "run", stop)
    CliRunner().invoke(app, [*command, "--on", "ray:auto", "--log", "tensorboard", "--threads", "2"])
    assert (told["on"], told["log"], told["threads"]) == ("ray:auto", ["tensorboard"], 2)
