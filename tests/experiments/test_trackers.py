"""Trackers are told what a run tells; the real ones offline, each where it is installed."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from contextlab import run
from contextlab.cli.commands import app
from contextlab.errors import InputError, ResourceError
from contextlab.experiments import trackers
from contextlab.experiments.run import Interrupted

SPEC = {
    "name": "told",
    "tasks": {"line": {"task": "linear_regression", "options": {"dimensions": 2, "examples": 4}}},
    "models": {"small": {"preset": "transformer", "options": {"width": 8, "depth": 1, "heads": 1}}},
    "train": {"steps": 6, "batch": 4, "log_every": 2, "warmup": 1, "checkpoint_every": 2},
    "evaluate": {"prompts": 16, "splits": ["train"]},
}
KEY = "line.small.seed0"


@pytest.fixture
def heard(monkeypatch):
    """A tracker in memory, in the place of TensorBoard's: what it was told, by job."""
    told = {}

    class Fake:
        def __init__(self, name, group, identity, config, folder):
            self.name = name
            told.setdefault(name, {"config": config, "identity": identity, "group": group, "logged": [], "ends": []})

        def log(self, step, values):
            told[self.name]["logged"].append((step, dict(values)))

        def end(self, step, values, status):
            told[self.name]["ends"].append((step, dict(values), status))

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Fake)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else object())
    return told


def test_a_tracker_is_told_losses_and_what_was_measured(heard, tmp_path):
    done = run(SPEC, out=tmp_path / "run", log=["tensorboard", "tensorboard"])  # named twice, told once
    training, learners = heard[KEY], heard["learners.line"]
    history = done.records[0]["history"]
    assert training["logged"] == [
        (step, {"loss": loss}) for step, loss in zip(history["step"], history["loss"], strict=True)
    ]
    [(step, values, status)] = training["ends"]
    assert (step, status) == (6, "finished")
    rows = done.results[(done.results["model"] == "small") & done.results["shot"].isna()]
    assert (
        values["train/squared_error"]
        == rows.loc[(rows["split"] == "train") & (rows["metric"] == "squared_error"), "value"].item()
    )
    assert values["cost/parameters"] == done.records[0]["parameters"]
    assert training["config"]["train.batch"] == 4
    assert training["config"]["model.width"] == 8
    assert (training["config"]["task"], training["config"]["seed"]) == ("line", 0)
    assert training["group"] == "told/run"
    assert learners["ends"][0][1]["ridge/train/squared_error"] > 0
    quiet = run(SPEC, out=tmp_path / "untold").results
    assert timeless(done.results).equals(timeless(quiet))


def test_a_run_that_is_resumed_is_the_same_run_to_a_tracker(heard, tmp_path):
    class Stop:
        def update(self, key, step, steps, loss):
            if step == 4:
                raise KeyboardInterrupt

        def phase(self, key, text): ...

        def done(self, key, status, message): ...

    with pytest.raises(Interrupted, match="--resume --log tensorboard"):
        run(SPEC, out=tmp_path / "run", log=["tensorboard"], progress=Stop())
    first = heard[KEY]
    identity = first["identity"]
    assert [status for *_, status in first["ends"]] == ["interrupted"]
    run(SPEC, out=tmp_path / "run", log=["tensorboard"], resume=True)
    assert heard[KEY]["identity"] == identity
    assert [status for *_, status in heard[KEY]["ends"]] == ["interrupted", "finished"]


def test_a_tracker_that_fails_is_left_and_the_run_goes_on(heard, monkeypatch, tmp_path):
    class Broken:
        def __init__(self, **about):
            raise OSError("no disk\nsecond line")

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Broken)
    with pytest.warns(UserWarning, match="tensorboard is told no more: OSError: no disk; the run goes on") as told:
        done = run(SPEC, out=tmp_path / "run", log=["tensorboard"])
    assert len([each for each in told if "told no more" in str(each.message)]) == 1
    assert done.record["status"] == "finished"


def test_trackers_are_checked_before_anything_is_written(heard, tmp_path):
    with pytest.raises(InputError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        run(SPEC, out=tmp_path / "run", log=["tensorbord"])
    with pytest.raises(ResourceError, match=r"wandb is not installed; pip install 'contextlab\[wandb\]'"):
        run(SPEC, out=tmp_path / "run", log=["wandb"])
    assert not (tmp_path / "run").exists()
    found = CliRunner().invoke(app, ["run", "demo", "--log", "tensorbord"])
    assert isinstance(found.exception, InputError) or found.exit_code == 2


def timeless(results):
    return results[results["metric"] != "training_seconds"].reset_index(drop=True)


def loss_of(done):
    history = done.records[0]["history"]
    return dict(zip(history["step"], history["loss"], strict=True))


def test_tensorboard_reads_the_curve_from_the_run_folder(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = run(SPEC, out=tmp_path / "run", log=["tensorboard"], jobs=2)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / KEY))
    events.Reload()
    found = {each.step: each.value for each in events.Scalars("loss")}
    expected = loss_of(done)
    assert set(found) <= set(expected)  # a worker tells at most ten times a second
    assert found[6] == pytest.approx(expected[6])
    assert events.Scalars("train/squared_error")[0].step == 6


def test_wandb_writes_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(SPEC, out=tmp_path / "run", log=["wandb"])
    written = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(written) == 2
    assert all(path.stat().st_size > 500 for path in written)


def test_trackio_holds_every_loss(tmp_path):
    """In a process of its own: it reads where it keeps its files when it is imported."""
    import json
    import os
    import subprocess
    import sys

    pytest.importorskip("trackio")
    code = f"import json; from contextlab import run; run({SPEC!r}, out={str(tmp_path / 'run')!r}, log=['trackio'])"
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "kept")}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
    [database] = Path(tmp_path / "kept").rglob("told.db")
    rows = sqlite3.connect(database).execute("select run_name, step, metrics from metrics").fetchall()
    kept = [
        (step, json.loads(values)["loss"])
        for name, step, values in rows
        if name.startswith(KEY) and b"loss" in values[:9]
    ]
    record = json.loads((tmp_path / "run" / "trainings" / KEY / "record.json").read_text())
    assert kept == list(zip(record["history"]["step"], record["history"]["loss"], strict=True))


def test_mlflow_holds_config_curve_and_end(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'kept.db'}")
    done = run(SPEC, out=tmp_path / "run", log=["mlflow"])
    client = mlflow.MlflowClient()
    at = client.get_experiment_by_name("told").experiment_id
    [found] = client.search_runs([at], "params.model = 'small'")
    assert found.info.status == "FINISHED"
    assert found.data.params["train.batch"] == "4"
    assert {each.step: each.value for each in client.get_metric_history(found.info.run_id, "loss")} == loss_of(done)
    assert math.isfinite(found.data.metrics["train/squared_error"])


def test_each_trial_of_a_sweep_is_told_with_its_score(heard, tmp_path):
    sweep = {"over": {"train.learning_rate": [1e-3, 3e-3]}, "validation": {"prompts": 8}}
    done = run({**SPEC, "sweep": sweep}, out=tmp_path / "run", log=["tensorboard"])
    for number, rate in enumerate([1e-3, 3e-3]):
        told = heard[f"line.small.trial{number}.seed0"]
        assert (told["config"]["trial"], told["config"]["train.learning_rate"]) == (number, rate)
        assert told["ends"] == [(6, {"validation/squared_error": done.sweep["value"][number]}, "finished")]
    assert "train/squared_error" in heard[KEY]["ends"][0][1]
